//! What the process was started with.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::net::SocketType;

/// The first descriptor that is not one of the standard ones.
const FIRST_SURPLUS: libc::c_uint = 3;

/// Why the process can't be used by whoever started it.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Most likely the program was started by hand.
    #[error("standard input is not a control socket: this program is started by husk")]
    NoControlSocket,
    /// A system call failed.
    #[error("cannot put the inherited descriptors in order: {step}")]
    Step {
        /// The operation.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Closes every descriptor but the standard ones, and moves the control socket away from standard
/// input. Input and output then are `/dev/null`; standard error stays, for last words. Must be called
/// before the process has opened anything.
///
/// # Errors
/// [`InheritError`].
pub fn take_control_socket() -> Result<OwnedFd, InheritError> {
    let step = |step| {
        move |errno: rustix::io::Errno| InheritError::Step {
            step,
            source: errno.into(),
        }
    };
    close_surplus().map_err(|source| InheritError::Step {
        step: "close_range",
        source,
    })?;
    let stdin = io::stdin();
    match rustix::net::sockopt::socket_type(stdin.as_fd()) {
        Ok(SocketType::SEQPACKET) => {}
        _ => return Err(InheritError::NoControlSocket),
    }
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)
        .map_err(step("duplicate the control socket"))?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty()).map_err(step("/dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(step("replace standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(step("replace standard output"))?;
    Ok(socket)
}

fn close_surplus() -> io::Result<()> {
    // SAFETY: called before this process has opened a descriptor, so whatever it closes was left
    // open by the parent and is owned by nothing here.
    let result = unsafe { libc::close_range(FIRST_SURPLUS, libc::c_uint::MAX, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
