//! Volumes that live in the guest's memory, and are the pod's: its `/dev/shm`, and those that
//! Kubernetes calls `emptyDir` with `medium: Memory`.
//!
//! On the host they are file systems in memory, empty when the pod begins and seen by nobody but
//! its containers. Shared with the guest they would be in memory twice, and slow; so the guest has
//! file systems in memory of the same size instead. A pod's `/dev/shm` that the host has not, as in pods
//! of containerd's Sandbox API, is the guest's alone.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_protocol::POD_VOLUMES_DIR;
use husk_protocol::messages::MemoryVolume;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use oci_spec::runtime::Mount;

use crate::mounts;

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

    /// The guest's counterpart of a path of the host, if it has one: a volume, and the path in it.
    pub(crate) fn find(&mut self, source: &Path) -> Option<(MemoryVolume, PathBuf)> {
        if let Some(volume) = self.volume(source) {
            return Some((volume, PathBuf::new()));
        }
        let whole = whole_of(source)?;
        let inside = place_in(&whole, source)?;
        Some((self.volume(&whole)?, inside))
    }

    fn volume(&mut self, source: &Path) -> Option<MemoryVolume> {
        if !self.volumes.contains_key(source) {
            let id = u32::try_from(self.volumes.len()).ok()?.checked_add(1)?;
            let volume = self.look_at(source, id)?;
            self.volumes.insert(source.to_owned(), volume);
        }
        self.volumes.get(source).cloned()
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
        // An emptyDir on a disk is the host's.
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

/// The volume that a `subPath` is a part of: the kubelet binds it to
/// `POD/volume-subpaths/VOLUME/CONTAINER/INDEX`, and the volume itself is
/// `POD/volumes/kubernetes.io~empty-dir/VOLUME`.
fn whole_of(source: &Path) -> Option<PathBuf> {
    let volume = source.parent()?.parent()?;
    let subpaths = volume.parent()?;
    if subpaths.file_name() != Some(OsStr::new("volume-subpaths")) {
        return None;
    }
    let volumes = subpaths.parent()?.join("volumes/kubernetes.io~empty-dir");
    Some(volumes.join(volume.file_name()?))
}

/// What part of a file system, mounted as a whole, is mounted at a place.
fn place_in(whole: &Path, place: &Path) -> Option<PathBuf> {
    let device = |path| Some(fs::metadata(path).ok()?.dev());
    if device(whole)? != device(place)? {
        return None;
    }
    let roots = mounts::roots_at(place).ok()?;
    let inside = roots.last()?.strip_prefix("/").ok()?;
    Some(inside.to_owned())
}

/// Whether a mount asks for a `/dev/shm` of the container's own.
pub(crate) fn is_own_shm(mount: &Mount) -> bool {
    mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs")
}

/// The `/dev/shm` of a pod that the host has none of.
pub(crate) fn pod_shm() -> MemoryVolume {
    MemoryVolume {
        id: SHM_ID,
        size_bytes: SHM_BYTES,
        mode: SHM_MODE,
        ..MemoryVolume::default()
    }
}

/// Makes a mount one of a volume in the guest.
pub(crate) fn bind(mount: &mut Mount, volume: &MemoryVolume) {
    let options = ["rbind", "nosuid", "nodev", "noexec", "rw"].map(str::to_owned);
    mount
        .set_typ(Some("bind".to_owned()))
        .set_options(Some(options.into()))
        .set_source(Some(guest_path(volume)));
}

/// Where POSIX shared memory is (shm_overview(7)).
const SHM: &str = "/dev/shm";

/// The others' ids begin after it.
const SHM_ID: u32 = 0;

/// As CRI's servers make it on the host.
const SHM_BYTES: u64 = 64 * 1024 * 1024;
const SHM_MODE: u32 = 0o1777;

/// Where a volume is in the guest.
pub(crate) fn guest_path(volume: &MemoryVolume) -> PathBuf {
    Path::new(POD_VOLUMES_DIR).join(volume.id.to_string())
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::mounts::tests::real::in_own_namespace;

    #[test]
    fn part_of_a_volume_is_found_in_the_whole_of_it() {
        in_own_namespace(|directory| {
            let volume = directory.join("volumes/kubernetes.io~empty-dir/cache");
            let place = directory.join("volume-subpaths/cache/web/0");
            let disk = directory.join("volume-subpaths/disk/web/0");
            for path in [&volume, &place, &disk] {
                fs::create_dir_all(path).unwrap();
            }
            let size = Some("size=1m,mode=1777");
            mount(
                Some("tmpfs"),
                &volume,
                Some("tmpfs"),
                MsFlags::empty(),
                size,
            )
            .unwrap();
            let part = volume.join("a b/c");
            fs::create_dir_all(&part).unwrap();
            let none = None::<&str>;
            mount(Some(&part), &place, none, MsFlags::MS_BIND, none).unwrap();
            let mut volumes = MemoryVolumes::new("p1");

            let (found, inside) = volumes.find(&place).unwrap();

            assert_eq!(inside, Path::new("a b/c"));
            assert_eq!((found.id, found.size_bytes), (1, 1 << 20));
            let (whole, inside) = volumes.find(&volume).unwrap();
            assert_eq!((whole, inside.as_os_str().len()), (found, 0));
            assert!(volumes.find(&disk).is_none());
        });
    }

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
