//! The mounts of config.json.
//!
//! Destinations are names inside the container's root and belong to the image: each is resolved
//! with that root as `/` (openat2, RESOLVE_IN_ROOT), and what is mounted goes onto the descriptor
//! found, so that no symbolic link leads out.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount as mount_call};
use nix::sys::statvfs::{FsFlags, statvfs};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::{OrFail, Step, refusal};
use crate::oci;
use crate::sys;

/// Mounts one of the list.
pub(super) fn mount(root: BorrowedFd<'_>, mount: &oci::Mount) -> Step {
    let options = Options::parse(&mount.options)?;
    let step = || {
        format!(
            "mount {} on {}",
            mount.source.display(),
            mount.destination.display()
        )
    };
    if mount.kind == "bind" || options.flags.contains(MsFlags::MS_BIND) {
        return bind(root, mount, &options).or_fail(step);
    }
    let target = open_or_create(root, &mount.destination, Kind::Directory).or_fail(step)?;
    let kind = if mount.kind == "cgroup" {
        "cgroup2"
    } else {
        &mount.kind
    };
    // tmpcopyup is ours, not the file system's.
    let data = options.data.join(",");
    let data = (!data.is_empty() && kind != "cgroup2").then_some(data.as_str());
    let path = fd_path(target.as_fd());
    mount_call(Some(&mount.source), &path, Some(kind), options.flags, data).or_fail(step)?;
    let mounted = open_in(root, &mount.destination).or_fail(step)?;
    options.apply_tree(mounted.as_fd()).or_fail(step)
}

fn bind(root: BorrowedFd<'_>, mount: &oci::Mount, options: &Options) -> io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if options.flags.contains(MsFlags::MS_REC) {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree =
        rustix::mount::open_tree(rustix::fs::CWD, &mount.source, flags).map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                format!("its source {}: {error}", mount.source.display()),
            )
        })?;
    let stat = rustix::fs::fstat(&tree)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    let target = open_or_create(root, &mount.destination, kind)?;
    rustix::mount::move_mount(
        &tree,
        "",
        &target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?;
    let change = options.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if !change.is_empty() {
        let flags = change | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        remount(&fd_path(tree.as_fd()), flags)?;
    }
    options.apply_tree(tree.as_fd())
}

/// Remounts, keeping what a less privileged owner may not take off.
pub(super) fn remount(path: &Path, flags: MsFlags) -> io::Result<()> {
    let none: Option<&str> = None;
    match mount_call(none, path, none, flags, none) {
        Err(nix::Error::EPERM) => {
            let locked = locked_flags(path)?;
            Ok(mount_call(none, path, none, flags | locked, none)?)
        }
        other => Ok(other?),
    }
}

fn locked_flags(path: &Path) -> io::Result<MsFlags> {
    let has = statvfs(path)?.flags();
    Ok([
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ]
    .into_iter()
    .filter(|(flag, _)| has.contains(*flag))
    .fold(MsFlags::empty(), |all, (_, flag)| all | flag))
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

/// Binds a tree of the agent's onto a place in the container.
pub(super) fn bind_onto(source: &Path, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(rustix::fs::CWD, source, flags)?;
    Ok(rustix::mount::move_mount(
        &tree,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?)
}

/// A mount's options, sorted out.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    /// For the mount call.
    flags: MsFlags,
    /// Propagation, set by calls of their own.
    propagation: Vec<MsFlags>,
    /// Attributes (`MOUNT_ATTR_…`) for the whole tree.
    tree_attributes: u64,
    /// For the file system.
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Step<Options> {
        let mut parsed = Options {
            flags: MsFlags::empty(),
            propagation: Vec::new(),
            tree_attributes: 0,
            data: Vec::new(),
        };
        for option in options {
            if let Some((set, flag)) = flag_named(option) {
                parsed.flags.set(flag, set);
            } else if let Some(flag) = propagation_named(option) {
                parsed.propagation.push(flag);
            } else if let Some(attribute) = tree_attribute_named(option) {
                parsed.tree_attributes |= attribute;
            } else if matches!(option.as_str(), "idmap" | "ridmap") {
                return Err(refusal(format!(
                    "mounts: the option {option} is not supported"
                )));
            } else if option != "defaults" && option != "tmpcopyup" {
                parsed.data.push(option.clone());
            }
        }
        Ok(parsed)
    }

    /// What can only be set on a tree that is mounted already.
    fn apply_tree(&self, tree: BorrowedFd<'_>) -> io::Result<()> {
        let none: Option<&str> = None;
        for flag in &self.propagation {
            mount_call(none, &fd_path(tree), none, *flag, none)?;
        }
        if self.tree_attributes != 0 {
            sys::set_mount_attributes(tree, self.tree_attributes)?;
        }
        Ok(())
    }
}

/// Options that are a flag of mount(2), and whether they set or clear it.
fn flag_named(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "bind" => (true, MsFlags::MS_BIND),
        "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "suid" => (false, MsFlags::MS_NOSUID),
        "nodev" => (true, MsFlags::MS_NODEV),
        "dev" => (false, MsFlags::MS_NODEV),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "mand" => (true, MsFlags::MS_MANDLOCK),
        "nomand" => (false, MsFlags::MS_MANDLOCK),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "atime" => (false, MsFlags::MS_NOATIME),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "iversion" => (true, MsFlags::MS_I_VERSION),
        "noiversion" => (false, MsFlags::MS_I_VERSION),
        "silent" => (true, MsFlags::MS_SILENT),
        "loud" => (false, MsFlags::MS_SILENT),
        _ => return None,
    })
}

fn propagation_named(option: &str) -> Option<MsFlags> {
    let (recursive, name) = match option.strip_prefix('r') {
        Some(name) => (MsFlags::MS_REC, name),
        None => (MsFlags::empty(), option),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

fn tree_attribute_named(option: &str) -> Option<u64> {
    Some(match option {
        "rro" => libc::MOUNT_ATTR_RDONLY,
        "rnosuid" => libc::MOUNT_ATTR_NOSUID,
        "rnodev" => libc::MOUNT_ATTR_NODEV,
        "rnoexec" => libc::MOUNT_ATTR_NOEXEC,
        "rnosymfollow" => libc::MOUNT_ATTR_NOSYMFOLLOW,
        _ => return None,
    })
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
