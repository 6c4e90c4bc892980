//! The container's root: made a mount of its own, then the only one.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{Mode, OFlags};

use super::mounts::{Attributes, Depth, move_onto, open_here};
use super::{OrFail, Step, refusal};
use crate::oci::Spec;

/// Cuts the mounts off from the agent's and returns the root's directory, a mount of its own. `made` is
/// its tree, if that was made already.
pub(super) fn prepare(spec: &Spec, made: Option<&OwnedFd>) -> Step<OwnedFd> {
    // Slave at most: nothing that is mounted here may show up in the agent's namespace.
    let first =
        propagation(&spec.linux.rootfs_propagation)?.map_or(
            MsFlags::MS_SLAVE,
            |wanted| match wanted {
                MsFlags::MS_PRIVATE => MsFlags::MS_PRIVATE,
                _ => MsFlags::MS_SLAVE,
            },
        );
    mount(NONE, "/", NONE, MsFlags::MS_REC | first, NONE)
        .or_fail(|| "cut the mounts off from the agent's".into())?;
    let path = &spec.root.path;
    let step = || format!("use the root file system {}", path.display());
    if !path.is_absolute() {
        return Err(refusal(format!(
            "root.path: {} is not absolute",
            path.display()
        )));
    }
    // pivot_root wants a mount, and one that propagates nowhere.
    match made {
        Some(tree) => {
            let place = open_here(path).or_fail(step)?;
            move_onto(tree.as_fd(), place.as_fd()).or_fail(step)?;
        }
        None => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(path), path, NONE, flags, NONE).or_fail(step)?;
        }
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty()).or_fail(step)?;
    Ok(root)
}

/// Makes the directory the root and takes all else away.
pub(super) fn pivot(root: &OwnedFd) -> Step {
    let step = || "make the container's root the only one".to_owned();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).or_fail(step)?;
    rustix::process::fchdir(root.as_fd()).or_fail(step)?;
    // The old root ends up stacked on the new one, so no directory inside has to hold it.
    rustix::process::pivot_root(".", ".").or_fail(step)?;
    rustix::process::fchdir(old).or_fail(step)?;
    // What is unmounted here must stay where it came from.
    mount(NONE, ".", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).or_fail(step)?;
    umount2(".", MntFlags::MNT_DETACH).or_fail(step)?;
    rustix::process::chdir("/").or_fail(step)
}

/// Gives the root mount the propagation that the spec asks for.
pub(super) fn set_propagation(spec: &Spec) -> Step {
    let text = &spec.linux.rootfs_propagation;
    let Some(flag) = propagation(text)? else {
        return Ok(());
    };
    let recursive = if text.starts_with('r') {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    mount(NONE, "/", NONE, flag | recursive, NONE)
        .or_fail(|| format!("make the root's propagation {text}"))
}

/// Makes the root mount read-only; mounts below it are not touched.
pub(super) fn make_readonly() -> Step {
    let step = || "make the root read-only".to_owned();
    let root = open_here(Path::new("/")).or_fail(step)?;
    Attributes::READ_ONLY
        .apply(root.as_fd(), Depth::Single)
        .or_fail(step)
}

fn propagation(text: &str) -> Step<Option<MsFlags>> {
    Ok(Some(match text {
        "" => return Ok(None),
        "private" | "rprivate" => MsFlags::MS_PRIVATE,
        "slave" | "rslave" => MsFlags::MS_SLAVE,
        "shared" | "rshared" => MsFlags::MS_SHARED,
        "unbindable" | "runbindable" => MsFlags::MS_UNBINDABLE,
        _ => {
            return Err(refusal(format!(
                "linux.rootfsPropagation: {text:?} is not known"
            )));
        }
    }))
}

const NONE: Option<&str> = None;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_propagation_is_refused() {
        assert!(propagation("sideways").unwrap_err().is_request_at_fault);
    }

    #[test]
    fn root_must_be_absolute() {
        let mut spec = Spec::default();
        spec.linux.rootfs_propagation = "sideways".into();
        assert!(prepare(&spec, None).is_err());
    }
}
