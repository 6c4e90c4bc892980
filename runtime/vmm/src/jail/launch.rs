//! The step into a PID namespace, and with it from one process to another.
//!
//! A process can't move itself into a PID namespace, only a child. The child is made a child of
//! *our* parent (`CLONE_PARENT`), which so watches the virtual machine itself, with nothing of ours
//! in between: this process reports the child and ends. The child is PID 1 of its namespace: when it
//! ends, the kernel kills whatever else there is.
//!
//! The child is born in the pod's cgroup (`CLONE_INTO_CGROUP`), so that all it ever allocates is charged
//! to the pod. To move there later would cost it one of the host's RCU grace periods, milliseconds in
//! which it could do nothing.
//!
//! `clone3(2)` is called directly because libc's `fork` takes no flags. That is sound while the
//! process has one thread.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_vmm_control::{Channel, ChannelError, Message};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags};

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
    /// There is no such cgroup.
    #[error("cannot open the cgroup {path:?}")]
    Cgroup {
        /// Its directory.
        path: PathBuf,
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

/// Makes the process that becomes the virtual machine, in the cgroup of `cgroup_dir` or else in the
/// caller's, and reports it on `channel`. Must be called
/// while there is only one thread. The new process returns only after the parent has been told.
///
/// # Errors
/// [`LaunchError`], in either process. The other one does not outlive the error.
pub fn launch(channel: &Channel, cgroup_dir: Option<&Path>) -> Result<Launched, LaunchError> {
    let cgroup = cgroup_dir.map(open_cgroup).transpose()?;
    let step = |step| move |source| LaunchError::Step { step, source };
    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| LaunchError::Step {
        step: "unshare",
        source: errno.into(),
    })?;
    let (told, telling) = io::pipe().map_err(step("pipe"))?;
    match clone_sibling(cgroup.as_ref()).map_err(step("clone"))? {
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

fn open_cgroup(path: &Path) -> Result<OwnedFd, LaunchError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| LaunchError::Cgroup {
        path: path.to_owned(),
        source: errno.into(),
    })
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

/// fork(2), but the child's parent is the caller's parent, and its cgroup may be another one.
fn clone_sibling(cgroup: Option<&OwnedFd>) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let flag = |flag: libc::c_int| u64::from(flag.cast_unsigned());
    let mut arguments = libc::clone_args {
        flags: flag(libc::CLONE_PARENT) | flag(libc::CLONE_PIDFD),
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        child_tid: 0,
        parent_tid: 0,
        // With CLONE_PARENT, clone3 takes none, and the caller's own is used.
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: without CLONE_VM and with no stack given, clone3 is a fork: the child runs on in a copy
    // of this memory. `arguments` is whole, and its `pidfd` a valid place for the one number that is
    // stored there. There is one thread, so no lock is left held by a thread the child does not have.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of_val(&arguments),
        )
    };
    match i32::try_from(pid) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) if pid > 0 => Ok(Cloned::Caller {
            pid,
            // SAFETY: clone3 succeeded in the caller, so it has stored a new descriptor there, and
            // nothing else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// linux/sched.h; libc's constant has a type that can't hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
