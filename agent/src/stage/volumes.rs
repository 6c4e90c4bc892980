//! Places in the pod's volumes in memory, which a container is given a part of.
//!
//! All that is in a volume belongs to the containers that have it, so a path in it is resolved with
//! the volume as `/`. What is missing is made as the kubelet would on the host: with the permissions
//! of the volume.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::Mode;

use super::mounts::{Kind, fd_path, open_here, open_in, open_or_create};

/// Opens the place if it is one in a volume below `volumes`, where each has a directory.
pub(super) fn open_place(volumes: &Path, source: &Path) -> Option<io::Result<OwnedFd>> {
    let mut inside = source.strip_prefix(volumes).ok()?.components();
    let Some(Component::Normal(volume)) = inside.next() else {
        return None;
    };
    let volume = open_here(&volumes.join(volume));
    Some(volume.and_then(|volume| open_or_make(volume.as_fd(), inside.as_path())))
}

fn open_or_make(volume: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(volume)?.st_mode & PERMISSIONS);
    let mut place = open_in(volume, Path::new("."))?;
    let mut so_far = PathBuf::new();
    for part in path.components() {
        so_far.push(part);
        place = match open_in(volume, &so_far) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = open_or_create(volume, &so_far, Kind::Directory)?;
                rustix::fs::chmod(fd_path(made.as_fd()), mode)?;
                made
            }
            found => found?,
        };
    }
    Ok(place)
}

/// The part of a mode that says who may do what.
const PERMISSIONS: u32 = 0o7777;

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn inode(place: Option<io::Result<OwnedFd>>) -> u64 {
        let place = place.unwrap().unwrap();
        rustix::fs::fstat(place).unwrap().st_ino
    }

    #[test]
    fn missing_place_is_made_with_the_permissions_of_the_volume() {
        let volumes = tempfile::tempdir().unwrap();
        let volume = volumes.path().join("7");
        fs::create_dir(&volume).unwrap();
        fs::set_permissions(&volume, Permissions::from_mode(0o1777)).unwrap();

        let place = inode(open_place(volumes.path(), &volume.join("a/b")));

        for path in ["a", "a/b"] {
            let made = fs::metadata(volume.join(path)).unwrap();
            assert_eq!(made.mode() & PERMISSIONS, 0o1777, "{path}");
        }
        assert_eq!(fs::metadata(volume.join("a/b")).unwrap().ino(), place);
        assert_eq!(
            inode(open_place(volumes.path(), &volume.join("a/b"))),
            place
        );
    }

    #[test]
    fn links_of_a_container_do_not_lead_out_of_the_volume() {
        let volumes = tempfile::tempdir().unwrap();
        let volume = volumes.path().join("7");
        fs::create_dir_all(volume.join("etc")).unwrap();
        symlink("/etc", volume.join("absolute")).unwrap();
        symlink("../../../etc", volume.join("relative")).unwrap();
        let own = fs::metadata(volume.join("etc")).unwrap().ino();
        for link in ["absolute", "relative"] {
            assert_eq!(inode(open_place(volumes.path(), &volume.join(link))), own);
        }
    }

    #[test]
    fn other_sources_are_none_of_a_volume() {
        let volumes = Path::new("/run/husk/volumes");
        for source in [
            "/run/husk/volumes",
            "/run/husk/volumes/..",
            "/etc",
            "relative",
        ] {
            assert!(open_place(volumes, Path::new(source)).is_none(), "{source}");
        }
        let missing = open_place(volumes, Path::new("/run/husk/volumes/no-such/x"));
        assert!(missing.unwrap().is_err());
    }
}
