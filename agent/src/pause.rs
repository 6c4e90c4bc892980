//! Process 1 of a PID namespace that the containers of a pod share: it collects orphans, and lasts.
//!
//! Containers join the namespace and leave it; it ends with the guest. Signals from inside do nothing
//! to it, as it handles none.

use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, WaitOptions, set_dumpable_behavior};

/// What it is executed as; what Kubernetes' users expect process 1 to be called.
pub const NAME: &str = "/pause";

/// Runs until it is killed.
pub fn main() -> ExitCode {
    match collect() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pause: {error}");
            ExitCode::FAILURE
        }
    }
}

fn collect() -> std::io::Result<()> {
    // The agent's program is no business of the containers'.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that one that comes between the two calls below is kept.
    children.thread_block()?;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(Errno::CHILD) => {
                children.wait()?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
