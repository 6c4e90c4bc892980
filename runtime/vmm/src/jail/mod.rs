//! What is left of the host for a guest that has taken over the VMM.
//!
//! [`launch()`] puts the process into a PID namespace and the pod's cgroup; [`enter`] does everything else that concerns
//! the process as a whole, in an order that leaves each step the privileges it needs. What concerns
//! single threads is in [`crate::seccomp`].
//!
//! The process stays in the host's user namespace: what keeps it inside the share is that it can name no
//! other file. So it may neither open files by handle nor mount.
//!
//! All of it happens while the process has one thread: namespaces, capabilities and no-new-privs
//! belong to a thread, and threads made later inherit them.

mod capabilities;
mod inherited;
mod launch;
mod root;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::Mode;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

pub use capabilities::KEPT as KEPT_CAPABILITIES;
pub use inherited::{InheritError, take_control_socket};
pub use launch::{LaunchError, Launched, launch};

/// Open files the process may have, if the host's `fs.nr_open` allows as many. A FUSE server holds
/// one for each file the guest has open.
const OPEN_FILES_MAX: u64 = 1024 * 1024;

/// What the process may still reach once it is jailed.
#[derive(Debug)]
pub struct Jailed {
    /// The directory of this process's own descriptors, in a procfs that shows nothing else: `..`
    /// from there meets neither another process nor `sys`.
    pub own_descriptors: OwnedFd,
    /// The share, which is the root directory.
    pub root: OwnedFd,
    /// Files the process may have open.
    pub open_files_max: u64,
}

/// Which part of the jail could not be built.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The shared directory can't become the root.
    #[error("cannot make {path:?} the root: {step}")]
    Root {
        /// The shared directory.
        path: PathBuf,
        /// The operation that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A step that depends on nothing the caller has named.
    #[error("cannot enter the jail: {step}")]
    Step {
        /// The operation that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl JailError {
    fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Step {
            step,
            source: source.into(),
        }
    }
}

/// Jails the process: afterwards its root is `shared_dir`, and its capabilities are
/// [`KEPT_CAPABILITIES`]. Its network namespace stays what it was.
///
/// # Errors
/// [`JailError`]; the process is then half jailed and must end.
pub fn enter(shared_dir: &Path) -> Result<Jailed, JailError> {
    // Signals of the parent's terminal are not meant for the virtual machine.
    rustix::process::setsid().map_err(JailError::step("setsid"))?;
    // Modes come from the guest, which has applied its own mask.
    rustix::process::umask(Mode::empty());
    let open_files_max = limit_resources()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(JailError::step("unshare"))?;
    root::isolate_mounts()?;
    let own_descriptors = root::open_own_descriptors()?;
    let root = root::change_root(shared_dir)?;
    rustix::thread::set_no_new_privs(true).map_err(JailError::step("no-new-privs"))?;
    capabilities::drop_all_but_kept()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(JailError::step("clear the dumpable attribute"))?;
    Ok(Jailed {
        own_descriptors,
        root,
        open_files_max,
    })
}

/// Sets the limits. Returns the one of open files.
fn limit_resources() -> Result<u64, JailError> {
    let fixed = |limit| Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    // A core file would hold the guest's memory.
    rustix::process::setrlimit(Resource::Core, fixed(0))
        .map_err(JailError::step("limit core files"))?;
    if rustix::process::setrlimit(Resource::Nofile, fixed(OPEN_FILES_MAX)).is_ok() {
        return Ok(OPEN_FILES_MAX);
    }
    // The host's fs.nr_open is lower: what the parent was given must do.
    let inherited = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: inherited.maximum,
        maximum: inherited.maximum,
    };
    rustix::process::setrlimit(Resource::Nofile, raised)
        .map_err(JailError::step("raise the limit of open files"))?;
    // No limit at all is above ours, which was refused: that does not occur.
    Ok(inherited.maximum.unwrap_or(OPEN_FILES_MAX))
}
