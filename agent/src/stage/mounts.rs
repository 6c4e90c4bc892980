//! The mounts of config.json.
//!
//! Destinations are names inside the container's root and belong to the image: each is resolved
//! with that root as `/` (openat2, RESOLVE_IN_ROOT), and what is mounted goes onto the descriptor
//! found, so that no symbolic link leads out.

mod options;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use husk_protocol::POD_VOLUMES_DIR;
use nix::mount::{MsFlags, mount as mount_call};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::copy::copy_tree;
use super::volumes::open_place;
use super::{OrFail, Step};
use crate::oci;
pub(super) use options::{Attributes, Depth, Options};

/// Mounts that become read-only once everything is in them.
pub(super) type SealedLater = Vec<OwnedFd>;

/// Mounts one of the list. `made` is its tree, if that was made already.
pub(super) fn mount(
    root: BorrowedFd<'_>,
    mount: &oci::Mount,
    made: Option<&OwnedFd>,
    sealed_later: &mut SealedLater,
) -> Step {
    let mut options = Options::parse(&mount.options)?;
    let step = || {
        format!(
            "mount {} on {}",
            mount.source.display(),
            mount.destination.display()
        )
    };
    if let Some(tree) = made {
        return attach(root, mount, tree, &options).or_fail(step);
    }
    if mount.kind == "bind" || options.bind.is_some() {
        let depth = options.bind.unwrap_or(Depth::Single);
        return clone_tree(&mount.source, depth)
            .and_then(|tree| attach(root, mount, &tree, &options))
            .or_fail(step);
    }
    // Nodes and mount points are made in it still.
    let is_filled_later =
        mount.kind == "tmpfs" || normal_names(&mount.destination) == [OsStr::new("dev")];
    let is_sealed_later = is_filled_later && options.own.take_read_only();
    if is_sealed_later {
        options.flags.remove(MsFlags::MS_RDONLY);
    }
    let mounted = match make(root, mount, &options) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => match guest_tree(&mount.kind) {
            Some(tree) => tree.and_then(|tree| {
                attach(root, mount, &tree, &options)?;
                Ok(tree)
            }),
            None => Err(error),
        },
        made => made,
    };
    let mounted = mounted.or_fail(step)?;
    if is_sealed_later {
        sealed_later.push(mounted);
    }
    Ok(())
}

/// Makes what was kept writable read-only.
pub(super) fn seal(mounts: &SealedLater) -> Step {
    for mount in mounts {
        Attributes::READ_ONLY
            .apply(mount.as_fd(), Depth::Single)
            .or_fail(|| "make a mount read-only".into())?;
    }
    Ok(())
}

/// Mounts a new file system.
fn make(root: BorrowedFd<'_>, mount: &oci::Mount, options: &Options) -> io::Result<OwnedFd> {
    let covered = open_in(root, &mount.destination);
    let mut data = options.data.clone();
    if mount.kind == "tmpfs"
        && let Ok(covered) = &covered
    {
        // It looks like what it covers, unless the options say otherwise.
        let stat = rustix::fs::fstat(covered)?;
        data.insert(0, format!("mode={:04o}", stat.st_mode & 0o7777));
    }
    let kind = match mount.kind.as_str() {
        "cgroup" | "cgroup2" => {
            // Those that callers know are of the first version.
            data.clear();
            "cgroup2"
        }
        kind => kind,
    };
    let target = open_or_create(root, &mount.destination, Kind::Directory)?;
    let data = data.join(",");
    let data = (!data.is_empty()).then_some(data.as_str());
    let path = fd_path(target.as_fd());
    mount_call(Some(&mount.source), &path, Some(kind), options.flags, data)?;
    let mounted = open_in(root, &mount.destination)?;
    if options.copies_up {
        copy_tree(target.as_fd(), mounted.as_fd())?;
    }
    options.apply_tree(mounted.as_fd())?;
    Ok(mounted)
}

/// The guest's own tree instead of a new file system, which a container in a user namespace may not
/// have: its network and its cgroups belong to the pod.
fn guest_tree(kind: &str) -> Option<io::Result<OwnedFd>> {
    let path = match kind {
        "sysfs" => "/sys",
        "cgroup" | "cgroup2" => "/sys/fs/cgroup",
        _ => return None,
    };
    Some(clone_tree(Path::new(path), Depth::Recursive))
}

/// A copy of a tree that is mounted nowhere yet. The source is a path of the guest, or in one of the
/// pod's volumes.
pub(super) fn clone_tree(source: &Path, depth: Depth) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if depth == Depth::Recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let cloned = match open_place(Path::new(POD_VOLUMES_DIR), source) {
        Some(place) => place.and_then(|place| {
            let flags = flags | OpenTreeFlags::AT_EMPTY_PATH;
            Ok(rustix::mount::open_tree(place, "", flags)?)
        }),
        None => rustix::mount::open_tree(rustix::fs::CWD, source, flags).map_err(Into::into),
    };
    cloned.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("its source {}: {error}", source.display()),
        )
    })
}

/// Mounts a tree where the mount says, with its options.
fn attach(
    root: BorrowedFd<'_>,
    mount: &oci::Mount,
    tree: &OwnedFd,
    options: &Options,
) -> io::Result<()> {
    let stat = rustix::fs::fstat(tree)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    let target = open_or_create(root, &mount.destination, kind)?;
    move_onto(tree.as_fd(), target.as_fd())?;
    options.own.apply(tree.as_fd(), Depth::Single)?;
    options.apply_tree(tree.as_fd())
}

/// Mounts a tree that is mounted nowhere yet.
pub(super) fn move_onto(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", target, "", flags)?)
}

/// What a destination that does not exist is made as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// Opens a path inside the root, creating what is missing of it.
pub(super) fn open_or_create(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match create_missing(root, &path, kind)? {
            Created::All => return open_in(root, &path),
            Created::UpToLink(target) => path = target,
        }
    }
    Err(Errno::LOOP.into())
}

/// Symbolic links into nowhere that one destination may lead through.
const LINKS_MAX: usize = 16;

/// How far [`create_missing`] got.
enum Created {
    All,
    /// A link whose target is missing stands in the way: images have /etc/resolv.conf so. What is
    /// to be created instead.
    UpToLink(PathBuf),
}

fn create_missing(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> io::Result<Created> {
    let names = normal_names(path);
    let mut so_far = PathBuf::from("/");
    for (at, name) in names.iter().enumerate() {
        let next = so_far.join(name);
        match open_in(root, &next) {
            Ok(_) => {
                so_far = next;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let parent = open_in(root, &so_far)?;
        if let Ok(target) = rustix::fs::readlinkat(&parent, name.as_os_str(), Vec::new()) {
            let mut instead = so_far.join(OsStr::from_bytes(target.as_bytes()));
            instead.extend(names.iter().skip(at + 1));
            return Ok(Created::UpToLink(instead));
        }
        let is_last = at + 1 == names.len();
        if is_last && kind == Kind::File {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644))?;
        } else {
            rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
        }
        so_far = next;
    }
    Ok(Created::All)
}

/// The names in a path, with its dots taken literally; none leads above the first.
fn normal_names(path: &Path) -> Vec<OsString> {
    let mut names = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::ParentDir => {
                names.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    names
}

/// Opens a path with `root` as its `/`; the descriptor only names the place.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?)
}

/// A path for calls that take no descriptor.
pub(super) fn fd_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Binds a file that is open onto a place in the container.
pub(super) fn bind_onto(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(source, "", flags)?;
    move_onto(tree.as_fd(), target)
}

/// Opens what has this very name in the stage's own view: a link itself, not what it leads to.
pub(super) fn open_name(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a path of the stage's own view.
pub(super) fn open_here(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        rustix::fs::CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Whether a path inside the root is there.
pub(super) fn exists_in(root: BorrowedFd<'_>, path: &Path) -> bool {
    open_in(root, path).is_ok_and(|fd| rustix::fs::statat(&fd, "", AtFlags::EMPTY_PATH).is_ok())
}

#[cfg(test)]
mod tests;
