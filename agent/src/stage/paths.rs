//! Kernel parameters, hidden paths and read-only paths, seen from inside the container.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::mounts::{Attributes, Depth, bind_onto, clone_tree, move_onto, open_here, open_name};
use super::{OrFail, Step, refusal};
use crate::oci::Spec;

/// Writes the kernel parameters.
pub(super) fn set_sysctls(spec: &Spec) -> Step {
    for (key, value) in &spec.linux.sysctl {
        let path = sysctl_path(key)?;
        OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .or_fail(|| format!("set the kernel parameter {key} to {value:?}"))?;
    }
    Ok(())
}

/// Both spellings name the same file: `net.ipv4.ip_forward` and `net/ipv4/ip_forward`. Where
/// slashes separate, dots belong to names.
fn sysctl_path(key: &str) -> Step<PathBuf> {
    let path = if key.contains('/') {
        key.to_owned()
    } else {
        key.replace('.', "/")
    };
    let is_plain = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !is_plain {
        return Err(refusal(format!(
            "linux.sysctl: {key:?} is not a kernel parameter"
        )));
    }
    Ok(Path::new("/proc/sys").join(path))
}

/// Makes a path read-only, but nothing that is mounted below it; one that is not there needs
/// nothing.
pub(super) fn make_readonly(path: &Path) -> Step {
    let made = match clone_tree(path, Depth::Recursive) {
        Err(error) if is_absence(&error) => Ok(()),
        Err(error) => Err(error),
        Ok(tree) => open_here(path)
            .and_then(|target| move_onto(tree.as_fd(), target.as_fd()))
            .and_then(|()| Attributes::READ_ONLY.apply(tree.as_fd(), Depth::Single)),
    };
    made.or_fail(|| format!("make {} read-only", path.display()))
}

/// Hides a path: a directory looks empty, a file is /dev/null. One that is not there needs nothing.
pub(super) fn mask(path: &Path) -> Step {
    let hide = |target: OwnedFd| match file_type(target.as_fd())? {
        FileType::Directory => move_onto(empty_directory()?.as_fd(), target.as_fd()),
        _ => bind_onto(null_device()?.as_fd(), target.as_fd()),
    };
    let hidden = match open_here(path) {
        Err(error) if is_absence(&error) => Ok(()),
        target => target.and_then(hide),
    };
    hidden.or_fail(|| format!("mask {}", path.display()))
}

/// A read-only directory that is mounted nowhere yet.
fn empty_directory() -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "size", "0")?;
    fsconfig_set_string(&tmpfs, "nr_inodes", "2")?;
    fsconfig_create(&tmpfs)?;
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY;
    Ok(fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, read_only)?)
}

/// /dev/null, in whose place the image or another container might have put something else.
fn null_device() -> io::Result<OwnedFd> {
    let null = open_name(Path::new("/dev/null"))?;
    let stat = rustix::fs::fstat(&null)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    if !is_device || stat.st_rdev != rustix::fs::makedev(1, 3) {
        return Err(io::Error::other("/dev/null is not the null device"));
    }
    Ok(null)
}

fn file_type(fd: BorrowedFd<'_>) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_can_not_leave_its_directory() {
        for key in ["../self/mem", "net/../../x", "", ".", "a..b", "/etc/passwd"] {
            assert!(sysctl_path(key).is_err(), "{key}");
        }
    }

    #[test]
    fn both_spellings_of_a_sysctl_are_understood() {
        let path = Path::new("/proc/sys/net/ipv4/ip_forward");
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), path);
        assert_eq!(sysctl_path("net/ipv4/ip_forward").unwrap(), path);
    }

    #[test]
    fn slashes_leave_dots_in_names() {
        let path = Path::new("/proc/sys/net/ipv4/conf/eth0.5/rp_filter");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.5/rp_filter").unwrap(), path);
    }
}
