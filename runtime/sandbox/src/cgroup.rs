//! The VMM's cgroup on the host. Only where the host has cgroup v2.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where cgroup v2 is mounted.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where a VMM's cgroup goes if nobody says where.
const DEFAULT_PARENT: &str = "/sys/fs/cgroup/husk";

/// How often the parent is made again that an ending sandbox removes at the same time.
const CREATE_TRIES_MAX: u32 = 16;

/// For processes that were killed to be gone.
const EMPTY_DEADLINE: Duration = Duration::from_secs(5);

/// The place for a pod's VMM; none where the host has no cgroup v2.
pub(crate) fn place(parent: Option<&Path>, namespace: &str, id: &str) -> Option<PathBuf> {
    if !Path::new(CGROUP_ROOT).join("cgroup.controllers").exists() {
        return None;
    }
    let parent = parent.unwrap_or(Path::new(DEFAULT_PARENT));
    // A character that no name has: else two pairs of names could make one.
    Some(parent.join(format!("husk@{namespace}@{id}")))
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

/// Moves this process into it; answers with where it has been.
pub(crate) fn enter(path: &Path) -> io::Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let left = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let left = Path::new(CGROUP_ROOT).join(left.unwrap_or_default());
    fs::write(path.join("cgroup.procs"), "0")?;
    Ok(left)
}

/// Moves this process back to where it has been, or at least out of what is to be removed.
pub(crate) fn go_back(left: &Path) -> io::Result<()> {
    match enter(left) {
        Err(_) => enter(Path::new(CGROUP_ROOT)).map(drop),
        Ok(_) => Ok(()),
    }
}

/// Removes it, and the default parent if that is empty. Nothing there is no error. What still runs in
/// it is killed: a VMM whose shim died before it wrote down whom it had started.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            empty(path).and_then(|()| fs::remove_dir(path))
        }
        removed => removed,
    };
    match removed {
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

/// Kills all that runs in it and waits for its end.
fn empty(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.kill"), "1")?;
    let deadline = Instant::now() + EMPTY_DEADLINE;
    let mut events = File::open(path.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !text.contains("populated 1") {
            return Ok(());
        }
        // A change is an exceptional condition (cgroup v2, "populated").
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_different_names_have_different_places() {
        let parent = Some(Path::new("/parent"));
        if let Some(one) = place(parent, "ci", "prod-web") {
            assert_ne!(Some(one), place(parent, "ci-prod", "web"));
        }
    }

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
