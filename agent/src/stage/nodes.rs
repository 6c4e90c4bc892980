//! /dev: the nodes and links that every container has, and the spec's own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, makedev};
use rustix::io::Errno;

use super::mounts::{Kind, bind_onto, exists_in, open_here, open_in, open_or_create};
use super::{OrFail, Step, refusal};
use crate::oci::{Device, Spec};

/// Makes them, unless /dev is one that was bound in from elsewhere.
pub(super) fn create(root: BorrowedFd<'_>, spec: &Spec) -> Step {
    if is_dev_bound(spec) {
        return Ok(());
    }
    let wanted = wanted(spec)?;
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
        if !wanted.iter().any(|own| own.path == device.path) {
            create_node(root, &device)?;
        }
    }
    for device in &wanted {
        create_node(root, device)?;
    }
    for (path, target) in LINKS {
        create_link(root, Path::new(path), target)?;
    }
    Ok(())
}

/// The spec's devices. Those of the host mean nothing here: a container that is to have all of them
/// gets all of the guest's, and one that wants a certain one is told.
fn wanted(spec: &Spec) -> Step<Vec<Device>> {
    let devices = &spec.linux.devices;
    let rules = spec.linux.resources.iter().flat_map(|all| &all.devices);
    let is_for_all = !devices.is_empty()
        && rules.fold(false, |before, rule| {
            if rule.is_for_all() {
                rule.allow
            } else {
                before
            }
        });
    if is_for_all {
        let step = || "list the devices of the guest".to_owned();
        let own = devices.iter().filter(|device| is_in_guest(device)).cloned();
        let mut wanted: Vec<Device> = own.collect();
        let mut guests = Vec::new();
        list_guests(Path::new("/dev"), &mut guests).or_fail(step)?;
        guests.retain(|device| !wanted.iter().any(|own| own.path == device.path));
        wanted.append(&mut guests);
        return Ok(wanted);
    }
    match devices.iter().find(|device| !is_in_guest(device)) {
        None => Ok(devices.clone()),
        Some(device) => Err(refusal(format!(
            "linux.devices: {} is the device {} {}:{}, which the guest does not have; \
             the host's are not given to it",
            device.path.display(),
            device.kind,
            device.major,
            device.minor
        ))),
    }
}

/// Whether the guest's kernel knows the device. An unknown type is found elsewhere.
fn is_in_guest(device: &Device) -> bool {
    let class = match device.kind.as_str() {
        "c" | "u" => "char",
        "b" => "block",
        _ => return true,
    };
    let number = format!("{}:{}", device.major, device.minor);
    // Pseudo terminals come and go, and are listed nowhere.
    PSEUDO_TERMINALS.contains(&device.major)
        || Path::new("/sys/dev").join(class).join(number).exists()
}

/// linux/major.h: UNIX98_PTY_SLAVE_MAJOR.
const PSEUDO_TERMINALS: std::ops::Range<u32> = 136..144;

/// All device nodes below a directory, but those that a container has of its own.
fn list_guests(directory: &Path, found: &mut Vec<Device>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let metadata = entry.metadata()?;
        let kind = metadata.file_type();
        if OWN.iter().any(|own| path == Path::new(own)) {
            continue;
        }
        if kind.is_dir() {
            list_guests(&path, found)?;
        } else if kind.is_char_device() || kind.is_block_device() {
            found.push(Device {
                kind: if kind.is_char_device() { "c" } else { "b" }.into(),
                path,
                major: rustix::fs::major(metadata.rdev()),
                minor: rustix::fs::minor(metadata.rdev()),
                file_mode: Some(metadata.mode()),
                uid: Some(metadata.uid()),
                gid: Some(metadata.gid()),
            });
        }
    }
    Ok(())
}

/// Each container has its own.
const OWN: [&str; 5] = [
    "/dev/console",
    "/dev/mqueue",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
];

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
const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
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
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & MODE_BITS);
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

/// Binds the guest's own node, wherever it has the device.
fn bind_node(root: BorrowedFd<'_>, device: &Device) -> io::Result<()> {
    let mut guests = Vec::new();
    list_guests(Path::new("/dev"), &mut guests)?;
    let kind = if device.kind == "b" { "b" } else { "c" };
    let same = |other: &&Device| {
        (other.kind.as_str(), other.major, other.minor) == (kind, device.major, device.minor)
    };
    let Some(own) = guests.iter().find(same) else {
        return Err(Errno::PERM.into());
    };
    let target = open_or_create(root, &device.path, Kind::File)?;
    bind_onto(open_here(&own.path)?.as_fd(), target.as_fd())
}

const MODE_BITS: u32 = 0o7777;

fn create_link(root: BorrowedFd<'_>, path: &Path, target: &str) -> Step {
    let step = || format!("make the link {}", path.display());
    let needed = match target {
        "pts/ptmx" => Some("/dev/pts/ptmx"),
        "/proc/kcore" => Some(target),
        _ => None,
    };
    if needed.is_some_and(|needed| !exists_in(root, Path::new(needed))) {
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
    use super::*;
    use crate::stage::mounts::open_here;

    fn wanted_of(devices: &str, rules: &str) -> Step<Vec<Device>> {
        let text =
            format!(r#"{{"linux":{{"devices":[{devices}],"resources":{{"devices":[{rules}]}}}}}}"#);
        wanted(&serde_json::from_str(&text).unwrap())
    }

    /// Numbers that Linux keeps for experiments: no kernel knows a device there.
    const UNKNOWN: &str = r#"{"type":"c","path":"/dev/odd","major":240,"minor":7777}"#;
    const NULL: &str = r#"{"type":"c","path":"/dev/mine","major":1,"minor":3}"#;
    const ALLOW_ALL: &str = r#"{"allow":true,"access":"rwm"}"#;

    #[test]
    fn device_that_the_guest_lacks_is_refused() {
        let failure = wanted_of(&format!("{NULL},{UNKNOWN}"), "").unwrap_err();
        assert!(failure.is_request_at_fault);
        assert!(
            failure.text.contains("/dev/odd is the device c 240:7777"),
            "{failure}"
        );
        let denied = r#"{"allow":true},{"allow":false}"#;
        assert!(wanted_of(UNKNOWN, denied).is_err());
    }

    #[test]
    fn all_devices_are_the_guests() {
        let devices = wanted_of(&format!("{NULL},{UNKNOWN}"), ALLOW_ALL).unwrap();
        let has = |path: &str| devices.iter().any(|device| device.path == Path::new(path));
        assert!(has("/dev/mine") && has("/dev/null") && !has("/dev/odd"));
        assert!(!has("/dev/ptmx") && !has("/dev/console"));
    }

    #[test]
    fn allowance_alone_brings_no_device() {
        assert!(wanted_of("", ALLOW_ALL).unwrap().is_empty());
    }

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
