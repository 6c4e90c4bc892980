//! The step into a PID namespace, and with it from one process to another.
//!
//! A process can't move itself into a PID namespace, only a child. The child is made a child of
//! *our* parent (`CLONE_PARENT`), which so watches the virtual machine itself, with nothing of ours
//! in between: this process reports the child and ends. The child is PID 1 of its namespace: when it
//! ends, the kernel kills whatever else there is.
//!
//! `clone(2)` is called directly because libc's `fork` takes no flags. That is sound while the
//! process has one thread.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use husk_vmm_control::{Channel, ChannelError, Message};
use nix::sched::{CloneFlags, unshare};

/// In which process [`launch`] has returned.
#[derive(Debug)]
pub enum Launched {
    /// The first one. The parent knows of the other; nothing is left to do.
    First,
    /// The one to become the virtual machine.
    Jailed,
}

/// Why there is no second process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A system call failed.
    #[error("cannot make a process in a PID namespace: {step}")]
    Step {
        /// The operation that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The parent did not get to know the process.
    #[error("cannot report the new process to the parent")]
    Report(#[source] ChannelError),
    /// In the second process: the first one ended before it had reported this one.
    #[error("the launching process was killed")]
    Orphaned,
}

/// Makes the process that becomes the virtual machine and reports it on `channel`. Must be called
/// while there is only one thread. The new process returns only after the parent has been told.
///
/// # Errors
/// [`LaunchError`], in either process. The other one does not outlive the error.
pub fn launch(channel: &Channel) -> Result<Launched, LaunchError> {
    let step = |step| move |source| LaunchError::Step { step, source };
    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| LaunchError::Step {
        step: "unshare",
        source: errno.into(),
    })?;
    let (told, telling) = io::pipe().map_err(step("pipe"))?;
    match clone_sibling().map_err(step("clone"))? {
        Cloned::Child => {
            drop(telling);
            wait_until_told(told)?;
            Ok(Launched::Jailed)
        }
        Cloned::Caller { pid, pidfd } => {
            drop(told);
            report(channel, pid, &pidfd, telling)?;
            Ok(Launched::First)
        }
    }
}

fn report(
    channel: &Channel,
    pid: i32,
    pidfd: &OwnedFd,
    mut telling: PipeWriter,
) -> Result<(), LaunchError> {
    channel
        .send(&Message::Launched { pid }, &[pidfd.as_fd()])
        .map_err(LaunchError::Report)?;
    telling.write_all(&[0]).map_err(|source| LaunchError::Step {
        step: "tell the new process",
        source,
    })
}

fn wait_until_told(mut told: PipeReader) -> Result<(), LaunchError> {
    match told.read(&mut [0]) {
        Ok(1) => Ok(()),
        _ => Err(LaunchError::Orphaned),
    }
}

enum Cloned {
    /// This is the new process.
    Child,
    /// This is the process that called.
    Caller { pid: i32, pidfd: OwnedFd },
}

/// fork(2), but the child's parent is the caller's parent.
fn clone_sibling() -> io::Result<Cloned> {
    let flags = libc::c_long::from(libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD);
    let unused: libc::c_long = 0;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: without CLONE_VM and with no stack given, clone is a fork: the child runs on in a copy
    // of this memory. `pidfd` is a valid place for the one number it stores with these flags. There
    // is one thread, so no lock is left held by a thread the child does not have.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            flags,
            unused,
            &raw mut pidfd,
            unused,
            unused,
        )
    };
    match i32::try_from(pid) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) if pid > 0 => Ok(Cloned::Caller {
            pid,
            // SAFETY: clone succeeded in the caller, so it has stored a new descriptor there, and
            // nothing else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(io::Error::last_os_error()),
    }
}
