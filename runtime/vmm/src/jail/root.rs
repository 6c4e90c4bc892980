//! Mounts: the share becomes the root directory, and nothing of the host's tree is left.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags,
};
use rustix::{fs, mount, process};

use super::JailError;

/// Cuts the way from this mount namespace to the host's, and leaves the way from there to here:
/// what the host mounts below the share appears.
pub(super) fn isolate_mounts() -> Result<(), JailError> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount::mount_change("/", slave).map_err(JailError::step("mount propagation"))
}

/// Opens `self/fd` in a procfs of its own, attached nowhere. In the host's procfs, `..` would lead
/// to `/proc/sys`, which root may write to without any capability.
pub(super) fn open_own_descriptors() -> Result<OwnedFd, JailError> {
    let context = mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(JailError::step("open a procfs"))?;
    // Since Linux 5.8: processes only.
    mount::fsconfig_set_string(&context, "subset", "pid")
        .map_err(JailError::step("restrict the procfs to processes"))?;
    mount::fsconfig_create(&context).map_err(JailError::step("create a procfs"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let procfs = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(JailError::step("make a procfs mount"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(&procfs, "self/fd", flags, Mode::empty()).map_err(JailError::step("open self/fd"))
}

/// Makes `shared_dir` the root and opens it.
pub(super) fn change_root(shared_dir: &Path) -> Result<OwnedFd, JailError> {
    let failed = |step| {
        move |errno: rustix::io::Errno| JailError::Root {
            path: shared_dir.to_owned(),
            step,
            source: errno.into(),
        }
    };
    process::chdir(shared_dir).map_err(failed("change directory"))?;
    let shared = fs::statx(CWD, ".", AtFlags::empty(), StatxFlags::empty())
        .map_err(failed("read attributes"))?;
    // pivot_root(2) takes nothing but a mount point.
    if !shared.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        mount::mount_bind_recursive(".", ".").map_err(failed("bind mount"))?;
        // The directory under the new mount is not the mount.
        process::chdir(shared_dir).map_err(failed("change directory"))?;
    }
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top of the new one.
    process::pivot_root(".", ".").map_err(failed("pivot_root"))?;
    mount::unmount(".", UnmountFlags::DETACH).map_err(failed("detach the old root"))?;
    process::chdir("/").map_err(failed("change directory to the new root"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(CWD, "/", flags, Mode::empty()).map_err(failed("open"))
}
