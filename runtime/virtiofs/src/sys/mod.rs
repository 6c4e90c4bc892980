//! The system calls that no safe wrapper is at hand for. Each is one small function; the rest of
//! the crate, but for [`crate::memory`], has no unsafe code.

pub(crate) mod identity;

use std::os::fd::{IntoRawFd, OwnedFd};

use rustix::io::Errno;

/// Closes a descriptor and tells what that says of earlier writes, which dropping it does not.
///
/// # Errors
/// That of `close`. The descriptor is closed all the same.
pub(crate) fn close(file: OwnedFd) -> Result<(), Errno> {
    // SAFETY: the descriptor was owned by `file`, which no longer does.
    match unsafe { libc::close(file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Why the C library's last call on this thread failed.
pub(crate) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
