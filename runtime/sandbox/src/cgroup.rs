//! The VMM's cgroup on the host. Only where the host has cgroup v2.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// Where cgroup v2 is mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where a VMM's cgroup goes if nobody says where.
const DEFAULT_PARENT: &str = "/sys/fs/cgroup/husk";

/// How often the parent is made again that an ending sandbox removes at the same time.
const CREATE_TRIES_MAX: u32 = 16;

/// The place for a pod's VMM; none where the host has no cgroup v2.
pub(crate) fn place(parent: Option<&Path>, namespace: &str, id: &str) -> Option<PathBuf> {
    if !Path::new(CGROUP_ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    let parent = parent.unwrap_or(Path::new(DEFAULT_PARENT));
    Some(parent.join(format!("husk-{namespace}-{id}")))
}

/// Makes it, with its parents.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        match fs::create_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < CREATE_TRIES_MAX => {}
            created => return created,
        }
    }
}

/// Removes it, once nothing runs in it, and the default parent if that is empty. Nothing there is
/// no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if path.parent() == Some(Path::new(DEFAULT_PARENT)) {
        // Other sandboxes are in it: the last one removes it.
        let _ = fs::remove_dir(DEFAULT_PARENT);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removal_of_nothing_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        create(&path).unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
    }
}
