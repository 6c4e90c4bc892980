//! Volumes that live in the guest's memory, and are the pod's: its `/dev/shm`, and those that
//! Kubernetes calls `emptyDir` with `medium: Memory`.
//!
//! On the host they are file systems in memory, empty when the pod begins and seen by nobody but
//! its containers. Shared with the guest they would be in memory twice, and slow; so the guest has
//! file systems in memory of the same size instead.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_protocol::POD_VOLUMES_DIR;
use husk_protocol::messages::MemoryVolume;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// The pod's volumes by their paths on the host.
#[derive(Debug)]
pub(crate) struct MemoryVolumes {
    /// The pod's id.
    pod: String,
    volumes: HashMap<PathBuf, MemoryVolume>,
}

impl MemoryVolumes {
    pub(crate) fn new(pod: &str) -> Self {
        Self {
            pod: pod.to_owned(),
            volumes: HashMap::new(),
        }
    }

    /// The guest's counterpart of a path of the host, if it has one.
    pub(crate) fn find(&mut self, source: &Path) -> Option<&MemoryVolume> {
        if !self.volumes.contains_key(source) {
            let id = u32::try_from(self.volumes.len()).ok()?;
            let volume = self.look_at(source, id)?;
            self.volumes.insert(source.to_owned(), volume);
        }
        self.volumes.get(source)
    }

    fn look_at(&self, source: &Path, id: u32) -> Option<MemoryVolume> {
        if !self.is_shm(source) && !is_empty_dir(source) {
            return None;
        }
        let (metadata, parent) = (
            fs::metadata(source).ok()?,
            fs::metadata(source.parent()?).ok()?,
        );
        let filesystem = statfs(source).ok()?;
        let is_mount = metadata.dev() != parent.dev();
        // An emptyDir on a disk is the host's; so is a subdirectory of one in memory.
        if !is_mount || filesystem.filesystem_type() != TMPFS_MAGIC {
            return None;
        }
        let block = u64::try_from(filesystem.block_size()).ok()?;
        Some(MemoryVolume {
            id,
            size_bytes: filesystem.blocks().saturating_mul(block),
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            ..MemoryVolume::default()
        })
    }

    /// `.../sandboxes/<pod>/shm`, as containerd's CRI makes it for the pod.
    fn is_shm(&self, source: &Path) -> bool {
        let pod = source.parent().and_then(Path::file_name);
        source.file_name() == Some(OsStr::new("shm")) && pod == Some(OsStr::new(&self.pod))
    }
}

/// `.../volumes/kubernetes.io~empty-dir/<name>`, as the kubelet makes it.
fn is_empty_dir(source: &Path) -> bool {
    let kind = source.parent().and_then(Path::file_name);
    kind == Some(OsStr::new("kubernetes.io~empty-dir"))
}

/// Where a volume is in the guest.
pub(crate) fn guest_path(volume: &MemoryVolume) -> PathBuf {
    Path::new(POD_VOLUMES_DIR).join(volume.id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_of_the_host_stay_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut volumes = MemoryVolumes::new("p1");
        for name in [
            "p2/shm",
            "p1/shm",
            "volumes/kubernetes.io~empty-dir/a",
            "secret/a",
        ] {
            let path = directory.path().join(name);
            fs::create_dir_all(&path).unwrap();
            // None is a mount.
            assert!(volumes.find(&path).is_none(), "{name}");
        }
        for path in ["/dev/shm", "/no/p1/shm", "/", ""] {
            assert!(volumes.find(Path::new(path)).is_none(), "{path:?}");
        }
    }
}
