//! Where hooks find the container's root: at `root.path`, as the spec says.
//!
//! The root is still being staged then. While hooks run it passes mounts on, so that what they mount
//! below `root.path` becomes a part of it, and with it of what the guest will see.

use std::path::Path;
use std::{io, thread};

use nix::sched::CloneFlags;
use oci_spec::runtime::ContainerState;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{HookError, Kind, Lifecycle};
use crate::mounts;
use crate::netns::Netns;

/// A container's root, for as long as its hooks are busy with it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StagedRoot<'a> {
    /// A mount that nobody else knows yet.
    pub(crate) staging: &'a Path,
    /// `root.path` has it already: it is no snapshot but a directory there.
    pub(crate) is_in_place: bool,
}

/// Runs the hooks that belong to the making of a container, in the specification's order. `pid`
/// is that of a process in the pod's network namespace. If the root is on a disk, those of the runtime
/// namespace find an empty directory in its place; a container with others has its root here.
pub(crate) fn run_while_creating(
    lifecycle: &Lifecycle,
    root: Option<StagedRoot<'_>>,
    netns: &Netns,
    pid: u32,
) -> Result<(), HookError> {
    let in_runtime_namespace = [Kind::Prestart, Kind::CreateRuntime];
    let Some(root) = root else {
        let mut kinds = in_runtime_namespace.iter();
        return kinds.try_for_each(|kind| lifecycle.run(*kind, ContainerState::Creating, pid));
    };
    if in_runtime_namespace.iter().any(|kind| lifecycle.has(*kind)) {
        mounts::pass_on(root.staging).map_err(step("share the root"))?;
        let shown = Shown::at(&lifecycle.root, root)?;
        let ended = in_runtime_namespace
            .iter()
            .try_for_each(|kind| lifecycle.run(*kind, ContainerState::Creating, pid));
        shown.hide()?;
        ended?;
    }
    if lifecycle.has(Kind::CreateContainer) {
        mounts::pass_on(root.staging).map_err(step("share the root"))?;
        run_create_container(lifecycle, root.staging, netns, pid)?;
    }
    Ok(())
}

fn run_create_container(
    lifecycle: &Lifecycle,
    staging: &Path,
    netns: &Netns,
    pid: u32,
) -> Result<(), HookError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, staging, flags).map_err(step("take hold of the root"))?;
    let run = || {
        netns.enter().map_err(step("join the network namespace"))?;
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace"))?;
        // The tree is not in it yet, and stays a peer of what is staged.
        mounts::cut_off(Path::new("/")).map_err(step("cut the mounts off from the host's"))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &lifecycle.root, flags).map_err(step("mount the root"))?;
        lifecycle.run(Kind::CreateContainer, ContainerState::Creating, pid)
    };
    // A thread of its own: there is no way back from its namespaces.
    thread::scope(|scope| {
        let hooks = thread::Builder::new().name("hooks".to_owned());
        let hooks = hooks
            .spawn_scoped(scope, run)
            .map_err(step("make a thread"))?;
        hooks
            .join()
            .unwrap_or_else(|_| Err(step("run in it")(io::Error::other("the thread panicked"))))
    })
}

/// The root, at its place on the host.
struct Shown<'a> {
    place: Option<&'a Path>,
}

impl<'a> Shown<'a> {
    fn at(place: &'a Path, root: StagedRoot<'_>) -> Result<Self, HookError> {
        if root.is_in_place {
            return Ok(Self { place: None });
        }
        mounts::bind_tree(root.staging, place).map_err(step("show the root"))?;
        Ok(Self { place: Some(place) })
    }

    fn hide(mut self) -> Result<(), HookError> {
        match self.place.take() {
            Some(place) => mounts::hide(place).map_err(step("hide the root")),
            None => Ok(()),
        }
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            // Only while something else has gone wrong, which is what is told.
            let _ = mounts::hide(place);
        }
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> HookError {
    move |error| HookError::Place {
        step,
        source: error.into(),
    }
}
