//! File systems on disks.
//!
//! They are mounted by the parent, as trees that are mounted nowhere yet: a container need not be
//! allowed to use the disk that one of its file systems is on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_protocol::DISK_FILE_SYSTEMS;
use nix::mount::MsFlags;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::mounts::{Depth, Options};
use super::{OrFail, Step, refusal};
use crate::oci::Mount;

/// Flags of mount(2) that are the file system's, by the names that fsconfig(2) has for them.
const FLAGS: [(MsFlags, &str); 5] = [
    (MsFlags::MS_RDONLY, "ro"),
    (MsFlags::MS_SYNCHRONOUS, "sync"),
    (MsFlags::MS_DIRSYNC, "dirsync"),
    (MsFlags::MS_LAZYTIME, "lazytime"),
    (MsFlags::MS_MANDLOCK, "mand"),
];

/// The tree that is to be a container's root.
pub(super) fn prepare_root(mount: &Mount) -> Step<OwnedFd> {
    let Some(tree) = prepare(mount)? else {
        let kind = &mount.kind;
        return Err(refusal(format!("a root can't be on a disk with {kind:?}")));
    };
    // Here, where nothing that the root holds can be in the way.
    let own = Options::parse(&mount.options)?.own;
    let applied = own.apply(tree.as_fd(), Depth::Single);
    applied.or_fail(|| "set the options of the root's mount".into())?;
    Ok(tree)
}

/// The tree of a mount, if it is one from a disk.
pub(super) fn prepare(mount: &Mount) -> Step<Option<OwnedFd>> {
    if !DISK_FILE_SYSTEMS.contains(&mount.kind.as_str()) {
        return Ok(None);
    }
    let options = Options::parse(&mount.options)?;
    if options.bind.is_some() {
        return Ok(None);
    }
    let step = || {
        let (kind, place) = (&mount.kind, mount.destination.display());
        format!("mount the {kind} file system for {place}")
    };
    tree_of(mount, &options).or_fail(step).map(Some)
}

fn tree_of(mount: &Mount, options: &Options) -> io::Result<OwnedFd> {
    let context = fsopen(mount.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    let made = || -> io::Result<OwnedFd> {
        fsconfig_set_string(context, "source", &mount.source)?;
        for (flag, name) in FLAGS {
            if options.flags.contains(flag) {
                fsconfig_set_flag(context, name)?;
            }
        }
        for option in &options.data {
            match option.split_once('=') {
                Some((name, value)) => fsconfig_set_string(context, name, value)?,
                None => fsconfig_set_flag(context, option.as_str())?,
            }
        }
        fsconfig_create(context)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        Ok(fsmount(context, flags, MountAttrFlags::empty())?)
    };
    made().map_err(|error| match complaint(context) {
        Some(complaint) => io::Error::new(error.kind(), format!("{error}: {complaint}")),
        None => error,
    })
}

/// What the file system itself says is wrong, in its own words (fsopen(2), message retrieval).
fn complaint(context: BorrowedFd<'_>) -> Option<String> {
    let mut words = [0; COMPLAINT_BYTES_MAX];
    for _ in 0..COMPLAINTS_MAX {
        let length = match rustix::io::read(context, &mut words) {
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return None,
        };
        let words = String::from_utf8_lossy(words.get(..length)?);
        // Each is an error, a warning or for information.
        if let Some(error) = words.strip_prefix("e ") {
            return Some(error.trim().to_owned());
        }
    }
    None
}

/// The kernel keeps so many messages, of about a line.
const COMPLAINTS_MAX: usize = 8;
const COMPLAINT_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> Mount {
        Mount {
            destination: "/data".into(),
            kind: kind.to_owned(),
            source: "/dev/no-such-disk".into(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn disk_that_can_not_be_mounted_is_told_of_by_its_place() {
        let failure = prepare(&mount("ext4", &["noatime", "nosuch=1"])).unwrap_err();
        assert!(failure.text.contains("/data"), "{failure}");
        assert!(prepare(&mount("ext4", &["remount"])).is_err());
    }

    #[test]
    fn root_that_can_not_be_mounted_is_told_of() {
        let root = |kind, options| Mount {
            destination: "/".into(),
            ..mount(kind, options)
        };
        for (kind, options) in [("tmpfs", &[][..]), ("bind", &[]), ("ext4", &["bind"])] {
            let failure = prepare_root(&root(kind, options)).unwrap_err();
            assert!(failure.is_request_at_fault, "{kind}: {failure}");
        }
        let failure = prepare_root(&root("ext4", &["ro"])).unwrap_err();
        assert!(failure.text.contains("ext4 file system for /"), "{failure}");
    }

    #[test]
    fn what_is_on_no_disk_is_mounted_later() {
        for (kind, options) in [("tmpfs", &[][..]), ("bind", &[]), ("ext4", &["bind"])] {
            assert!(prepare(&mount(kind, options)).unwrap().is_none(), "{kind}");
        }
    }
}
