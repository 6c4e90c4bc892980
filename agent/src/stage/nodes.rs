//! /dev: the nodes and links that every container has, and the spec's own.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, makedev};
use rustix::io::Errno;

use super::mounts::{Kind, bind_onto, exists_in, open_in, open_or_create};
use super::{OrFail, Step, refusal};
use crate::oci::{Device, Spec};

/// Makes them, unless /dev is one that was bound in from elsewhere.
pub(super) fn create(root: BorrowedFd<'_>, spec: &Spec) -> Step {
    if is_dev_bound(spec) {
        return Ok(());
    }
    for (path, major, minor) in USUAL {
        let device = Device {
            kind: "c".into(),
            path: path.into(),
            major,
            minor,
            file_mode: Some(0o666),
            uid: None,
            gid: None,
        };
        // The spec may list one of them with its own mode; that one counts.
        if !spec.linux.devices.iter().any(|own| own.path == device.path) {
            create_node(root, &device)?;
        }
    }
    for device in &spec.linux.devices {
        create_node(root, device)?;
    }
    for (path, target) in LINKS {
        create_link(root, Path::new(path), target)?;
    }
    Ok(())
}

/// runtime-spec, config-linux: default devices. /dev/console and /dev/ptmx are made elsewhere.
const USUAL: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// runtime-linux: dev symbolic links.
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

fn is_dev_bound(spec: &Spec) -> bool {
    spec.mounts.iter().any(|mount| {
        mount.destination == Path::new("/dev")
            && (mount.kind == "bind"
                || mount
                    .options
                    .iter()
                    .any(|option| option == "bind" || option == "rbind"))
    })
}

fn create_node(root: BorrowedFd<'_>, device: &Device) -> Step {
    let step = || format!("make the device {}", device.path.display());
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        kind => {
            return Err(refusal(format!(
                "linux.devices: {} has the unknown type {kind:?}",
                device.path.display()
            )));
        }
    };
    let (parent, name) = split(&device.path)?;
    let parent = open_or_create(root, &parent, Kind::Directory).or_fail(step)?;
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666));
    let number = makedev(device.major, device.minor);
    match rustix::fs::mknodat(&parent, &name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        // In a user namespace, or on a file system that keeps no nodes, the guest's own serves.
        Err(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS) => {
            return bind_node(root, device).or_fail(step);
        }
        Err(error) => return Err(error).or_fail(step),
    }
    if device.uid.is_some() || device.gid.is_some() {
        let owner = device.uid.map(Uid::from_raw);
        let group = device.gid.map(Gid::from_raw);
        rustix::fs::chownat(&parent, &name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
            .or_fail(step)?;
    }
    Ok(())
}

fn bind_node(root: BorrowedFd<'_>, device: &Device) -> io::Result<()> {
    let target = open_or_create(root, &device.path, Kind::File)?;
    bind_onto(&device.path, std::os::fd::AsFd::as_fd(&target))
}

fn create_link(root: BorrowedFd<'_>, path: &Path, target: &str) -> Step {
    let step = || format!("make the link {}", path.display());
    if target == "pts/ptmx" && !exists_in(root, Path::new("/dev/pts/ptmx")) {
        return Ok(());
    }
    let (parent, name) = split(path)?;
    let parent = open_in(root, &parent).or_fail(step)?;
    match rustix::fs::symlinkat(target, &parent, &name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).or_fail(step),
    }
}

fn split(path: &Path) -> Step<(PathBuf, PathBuf)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if path.is_absolute() => Ok((parent.into(), name.into())),
        _ => Err(refusal(format!(
            "linux.devices: {} is not the absolute path of a device",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::stage::mounts::open_here;

    #[test]
    fn unknown_device_type_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_here(dir.path()).unwrap();
        let device = Device {
            kind: "x".into(),
            path: "/dev/odd".into(),
            ..Device::default()
        };
        let failure = create_node(root.as_fd(), &device).unwrap_err();
        assert!(failure.is_request_at_fault);
    }

    #[test]
    fn relative_device_path_is_refused() {
        assert!(split(Path::new("null")).unwrap_err().is_request_at_fault);
        assert!(split(Path::new("/")).unwrap_err().is_request_at_fault);
    }
}
