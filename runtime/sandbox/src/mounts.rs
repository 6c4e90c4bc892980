//! Mounts on the host, below a pod's share.
//!
//! A mount is finished in the private staging directory first and moved into the share then: moving
//! makes it shared with nobody but the VMM. Bound right into place, it would for a moment be a peer
//! of its source, and what happens to it would happen to the host's mounts as well.

mod options;

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::RootfsMount;
pub(crate) use options::Options;

/// Why something could not be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// A step failed.
    #[error("cannot mount {what:?} at {target:?}: {step}")]
    Step {
        /// What was to be mounted.
        what: PathBuf,
        /// Where.
        target: PathBuf,
        /// The step that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A mount that can't be made as asked.
    #[error("cannot mount {what:?}: {reason}")]
    Unsupported {
        /// What was to be mounted.
        what: PathBuf,
        /// Why it can't be.
        reason: &'static str,
    },
}

/// A host path that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// On the host; relative to the bundle.
    pub(crate) source: PathBuf,
    /// With what is mounted below it.
    pub(crate) is_recursive: bool,
    /// With what is mounted below it later.
    pub(crate) is_slave: bool,
    /// The guest may not write to it.
    pub(crate) is_read_only: bool,
}

/// Makes `shared` show `layout`, read-only, and pass on mounts made below it.
pub(crate) fn mount_share(layout: &Path, shared: &Path) -> io::Result<()> {
    bind(layout, shared, false)?;
    // First out of the peer group of whatever `layout` lies on, or that would get our mounts too.
    change(shared, MsFlags::MS_PRIVATE)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    change(shared, read_only | MsFlags::MS_NOSUID)?;
    change(shared, MsFlags::MS_SHARED)
}

/// Makes a directory a mount point that passes nothing on.
pub(crate) fn mount_private(directory: &Path) -> io::Result<()> {
    bind(directory, directory, false)?;
    change(directory, MsFlags::MS_PRIVATE)
}

/// Mounts a root file system in `staging`, an empty directory on a private mount. It goes to
/// `target` with [`publish`].
pub(crate) fn stage_rootfs(
    mounts: &[RootfsMount],
    staging: &Path,
    target: &Path,
) -> Result<(), MountError> {
    for mount in mounts {
        let what = PathBuf::from(&mount.source);
        mount_one(mount, staging).map_err(|error| match error {
            OneError::Unsupported(reason) => MountError::Unsupported { what, reason },
            OneError::Step(step, source) => MountError::Step {
                what,
                target: target.to_owned(),
                step,
                source,
            },
        })?;
    }
    Ok(())
}

/// Binds a volume to `target`. `staging` is a place of the same kind, directory or file, on a
/// private mount.
pub(crate) fn mount_volume(
    volume: &Volume,
    staging: &Path,
    target: &Path,
) -> Result<(), MountError> {
    let failed = step_error(&volume.source, target, "bind");
    bind(&volume.source, staging, volume.is_recursive).map_err(failed)?;
    // A slave gets what is mounted on the host and gives nothing back.
    let propagation = match volume.is_slave {
        true => MsFlags::MS_SLAVE,
        false => MsFlags::MS_PRIVATE,
    };
    // With all that is below it: to the guest the whole volume is one mount.
    let flags = match volume.is_read_only {
        true => MsFlags::MS_RDONLY,
        false => MsFlags::empty(),
    };
    publish_as(staging, target, propagation, flags)
}

/// Lets mounts made at and below a place appear wherever else it is mounted from now on, and
/// nowhere else.
pub(crate) fn pass_on(place: &Path) -> io::Result<()> {
    change(place, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    change(place, MsFlags::MS_SHARED | MsFlags::MS_REC)
}

/// Keeps mounts made at and below a place to this namespace.
pub(crate) fn cut_off(place: &Path) -> io::Result<()> {
    change(place, MsFlags::MS_SLAVE | MsFlags::MS_REC)
}

/// Mounts a tree at a further place.
pub(crate) fn bind_tree(tree: &Path, place: &Path) -> io::Result<()> {
    bind(tree, place, true)
}

/// Undoes [`bind_tree`], and nothing of the tree elsewhere.
pub(crate) fn hide(place: &Path) -> io::Result<()> {
    change(place, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    Ok(nix::mount::umount2(place, flags)?)
}

/// Unmounts all that is mounted at a place, with what is below it. Nothing there is no error.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    for _ in 0..STACKED_MOUNTS_MAX {
        match nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other("too many mounts on top of each other"))
}

/// Unmounts everything at and below a directory, when no VMM uses it any more.
pub(crate) fn unmount_below(directory: &Path) -> io::Result<()> {
    for _ in 0..STACKED_MOUNTS_MAX {
        let points = mount_points_below(directory)?;
        let Some(first) = points.first() else {
            return Ok(());
        };
        // A sandbox killed at the wrong moment leaves a mount that is still a peer of the host's:
        // unmounting it as it is would unmount the host's.
        change(first, MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
        nix::mount::umount2(
            first.as_path(),
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        )?;
    }
    Err(io::Error::other("too many mounts"))
}

/// More than a sandbox can have left behind.
const STACKED_MOUNTS_MAX: u32 = 4096;

/// Mount points at and below a directory, outer ones first.
pub(crate) fn mount_points_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    // Paths of others' mounts may be in any encoding.
    let mut points: Vec<_> = fs::read("/proc/thread-self/mountinfo")?
        .split(|byte| *byte == b'\n')
        .filter_map(mount_point)
        .filter(|point| point.starts_with(directory))
        .collect();
    points.sort_by_key(|point| point.components().count());
    Ok(points)
}

/// What of its file system each mount at a place shows, the covered ones first.
pub(crate) fn roots_at(place: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read("/proc/thread-self/mountinfo")?;
    let lines = mounts.split(|byte| *byte == b'\n');
    let is_there = |line: &&[u8]| mount_point(line).as_deref() == Some(place);
    Ok(lines.filter(is_there).filter_map(mount_root).collect())
}

/// The mount point in a line of proc_pid_mountinfo(5).
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    path_field(line, 4)
}

/// What is mounted there, below the root of its file system.
fn mount_root(line: &[u8]) -> Option<PathBuf> {
    path_field(line, 3)
}

fn path_field(line: &[u8], at: usize) -> Option<PathBuf> {
    let mut rest = line.split(|byte| *byte == b' ').nth(at)?;
    let mut path = Vec::with_capacity(rest.len());
    while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
        let (before, after) = rest.split_at(at);
        let (digits, behind) = after.get(1..)?.split_at_checked(OCTAL_DIGITS)?;
        path.extend_from_slice(before);
        path.push(u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()?);
        rest = behind;
    }
    path.extend_from_slice(rest);
    Some(OsString::from_vec(path).into())
}

/// Space, tab, newline and backslash are written as three octal digits.
const OCTAL_DIGITS: usize = 3;

enum OneError {
    Unsupported(&'static str),
    Step(&'static str, io::Error),
}

fn mount_one(mount: &RootfsMount, rootfs: &Path) -> Result<(), OneError> {
    let step = |step| move |error: io::Error| OneError::Step(step, error);
    let options = Options::parse(&mount.options).map_err(OneError::Unsupported)?;
    let place = Place::resolve(rootfs, &mount.target).map_err(step("resolve the target"))?;
    let target = place.path(rootfs);
    if options.flags.contains(MsFlags::MS_BIND) || mount.fstype == "bind" {
        let is_recursive = options.flags.contains(MsFlags::MS_REC);
        bind(Path::new(&mount.source), &target, is_recursive).map_err(step("bind"))?;
        let wanted = options.flags - (MsFlags::MS_BIND | MsFlags::MS_REC);
        if !wanted.is_empty() {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | wanted;
            change(&target, flags | locked_flags(&target)).map_err(step("set flags"))?;
        }
        return Ok(());
    }
    let call = Filesystem {
        fstype: mount.fstype.clone(),
        source: mount.source.clone(),
        flags: options.flags,
        data: options.data,
        target,
    };
    call.mount().map_err(step("mount"))
}

/// Where a mount of a root file system goes. What is mounted there already belongs to an image, and
/// its symbolic links must not lead out of it.
enum Place {
    Root,
    Below(rustix::fd::OwnedFd),
}

impl Place {
    fn resolve(rootfs: &Path, target: &str) -> io::Result<Self> {
        if target.trim_matches('/').is_empty() {
            return Ok(Self::Root);
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(rootfs, flags | OFlags::DIRECTORY, Mode::empty())?;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(Self::Below(rustix::fs::openat2(
            root,
            target,
            flags,
            Mode::empty(),
            inside,
        )?))
    }

    fn path(&self, rootfs: &Path) -> PathBuf {
        match self {
            Self::Root => rootfs.to_owned(),
            Self::Below(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into(),
        }
    }
}

/// A call of mount(2) for a new file system.
struct Filesystem {
    fstype: String,
    source: String,
    flags: MsFlags,
    data: Vec<String>,
    target: PathBuf,
}

impl Filesystem {
    fn mount(self) -> io::Result<()> {
        let data = self.data.join(",");
        if data.len() < DATA_BYTES_MAX {
            return self.call(&data);
        }
        let Some((directory, data)) = shorten_layers(&self.data) else {
            return Err(io::Error::other("the options are longer than a page"));
        };
        if data.len() >= DATA_BYTES_MAX {
            return Err(io::Error::other(
                "the options are longer than a page, even relative to the layers' directory",
            ));
        }
        // The working directory belongs to the process: a thread that has its own sets it.
        let mounting =
            thread::Builder::new()
                .name("mount".to_owned())
                .spawn(move || -> io::Result<()> {
                    nix::sched::unshare(CloneFlags::CLONE_FS)?;
                    nix::unistd::chdir(&directory)?;
                    self.call(&data)
                })?;
        mounting
            .join()
            .map_err(|_| io::Error::other("the mounting thread panicked"))?
    }

    fn call(&self, data: &str) -> io::Result<()> {
        Ok(nix::mount::mount(
            Some(self.source.as_str()),
            &self.target,
            Some(self.fstype.as_str()),
            self.flags,
            Some(data),
        )?)
    }
}

/// mount(2): the options, with a final NUL, fit into a page.
const DATA_BYTES_MAX: usize = 4096;

/// Makes the layers of an overlay relative to the deepest directory that holds them all. Answers
/// with that directory and the options.
fn shorten_layers(data: &[String]) -> Option<(PathBuf, String)> {
    let layers = data.iter().find_map(|item| item.strip_prefix(LOWERDIR))?;
    if layers.contains('\\') {
        return None;
    }
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let mut directory = layers.first()?.parent()?;
    while !layers.iter().all(|layer| layer.starts_with(directory)) {
        directory = directory.parent()?;
    }
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(directory).ok()?.to_str())
        .collect();
    let shortened = format!("{LOWERDIR}{}", relative?.join(":"));
    let options: Vec<&str> = data
        .iter()
        .map(|item| match item.starts_with(LOWERDIR) {
            true => shortened.as_str(),
            false => item.as_str(),
        })
        .collect();
    Some((directory.to_owned(), options.join(",")))
}

const LOWERDIR: &str = "lowerdir=";

/// Cuts a finished mount off from the host's and moves it into the share.
pub(crate) fn publish(staging: &Path, target: &Path) -> Result<(), MountError> {
    publish_as(staging, target, MsFlags::MS_PRIVATE, MsFlags::empty())
}

fn publish_as(
    staging: &Path,
    target: &Path,
    propagation: MsFlags,
    flags: MsFlags,
) -> Result<(), MountError> {
    let failed = |step| step_error(staging, target, step);
    change(staging, propagation | MsFlags::MS_REC).map_err(failed("cut off"))?;
    restrict(staging, flags | MsFlags::MS_NODEV).map_err(failed("restrict"))?;
    let none = None::<&str>;
    nix::mount::mount(Some(staging), target, none, MsFlags::MS_MOVE, none)
        .map_err(io::Error::from)
        .map_err(failed("move into the share"))
}

/// Sets flags on a mount and on all below it. Nobody on the host may open device nodes there: the
/// guest makes what nodes it likes, and they are its own devices', but a VMM that was taken over must
/// not find the host's behind them.
fn restrict(staging: &Path, flags: MsFlags) -> io::Result<()> {
    for point in mount_points_below(staging)? {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
        change(&point, flags | locked_flags(&point))?;
    }
    Ok(())
}

fn step_error(
    what: &Path,
    target: &Path,
    step: &'static str,
) -> impl Fn(io::Error) -> MountError + use<> {
    let (what, target) = (what.to_owned(), target.to_owned());
    move |source| MountError::Step {
        what: what.clone(),
        target: target.clone(),
        step,
        source,
    }
}

fn bind(source: &Path, target: &Path, is_recursive: bool) -> io::Result<()> {
    let flags = match is_recursive {
        true => MsFlags::MS_BIND | MsFlags::MS_REC,
        false => MsFlags::MS_BIND,
    };
    let none = None::<&str>;
    Ok(nix::mount::mount(Some(source), target, none, flags, none)?)
}

fn change(target: &Path, flags: MsFlags) -> io::Result<()> {
    let none = None::<&str>;
    Ok(nix::mount::mount(none, target, none, flags, none)?)
}

/// Flags of a mount that a remount must repeat or it would clear them, on which the kernel insists
/// where it has locked them.
fn locked_flags(target: &Path) -> MsFlags {
    use nix::sys::statvfs::FsFlags;
    let Ok(found) = nix::sys::statvfs::statvfs(target) else {
        return MsFlags::empty();
    };
    [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
    ]
    .into_iter()
    .filter(|(is_set, _)| found.flags().contains(*is_set))
    .fold(MsFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
pub(crate) mod tests;
