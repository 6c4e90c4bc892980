//! Kernel parameters, hidden paths and read-only paths, seen from inside the container.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::mounts::{Attributes, Depth, bind_onto, clone_tree, fd_path, move_onto, open_here};
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
    let make = || -> io::Result<()> {
        let tree = clone_tree(path, Depth::Recursive)?;
        move_onto(tree.as_fd(), open_here(path)?.as_fd())?;
        Attributes::READ_ONLY.apply(tree.as_fd(), Depth::Single)
    };
    unless_absent(make()).or_fail(|| format!("make {} read-only", path.display()))
}

/// Hides a path: a directory looks empty, a file is /dev/null.
pub(super) fn mask(path: &Path) -> Step {
    unless_absent(try_mask(path)).or_fail(|| format!("mask {}", path.display()))
}

fn try_mask(path: &Path) -> io::Result<()> {
    let target = open_here(path)?;
    let is_dir = std::fs::metadata(fd_path(target.as_fd()))?.is_dir();
    if is_dir {
        let data = Some("size=0k,nr_inodes=2");
        let flags = MsFlags::MS_RDONLY;
        mount(
            Some("tmpfs"),
            &fd_path(target.as_fd()),
            Some("tmpfs"),
            flags,
            data,
        )?;
        return Ok(());
    }
    // The image might have put something else in its place.
    let null = std::fs::symlink_metadata("/dev/null")?;
    if !null.file_type().is_char_device() || null.rdev() != rustix::fs::makedev(1, 3) {
        return Err(io::Error::other("/dev/null is not the null device"));
    }
    bind_onto(Path::new("/dev/null"), target.as_fd())
}

fn unless_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        other => other,
    }
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
