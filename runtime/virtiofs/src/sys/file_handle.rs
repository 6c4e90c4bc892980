//! File handles: names of inodes that cost no descriptor (`name_to_handle_at(2)`).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::last_errno;

/// `MAX_HANDLE_SZ` of `linux/exportfs.h`.
const HANDLE_BYTES_MAX: usize = 128;

/// A file handle. Two of the same file on the same mount are equal; that of a file which was
/// deleted and whose inode number is in use again is not equal to the new file's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileHandle {
    kind: i32,
    bytes: Box<[u8]>,
}

/// `struct file_handle` with room for any handle.
#[repr(C)]
struct Raw {
    length: u32,
    kind: i32,
    bytes: [u8; HANDLE_BYTES_MAX],
}

const EMPTY: &CStr = c"";

impl FileHandle {
    /// The handle of the file behind `file`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the file system has no handles.
    pub(crate) fn of(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        let mut raw = Raw {
            length: u32::try_from(HANDLE_BYTES_MAX).unwrap_or(0),
            kind: 0,
            bytes: [0; HANDLE_BYTES_MAX],
        };
        let mut mount_id: libc::c_int = 0;
        // SAFETY: `raw` has the layout of `struct file_handle` followed by as many bytes as its
        // first field says, and it and `mount_id` are ours to write; the name is a C string.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_raw_fd(),
                EMPTY.as_ptr(),
                &raw mut raw,
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if result < 0 {
            return Err(last_errno());
        }
        let length = usize::try_from(raw.length).unwrap_or(0);
        let bytes = raw.bytes.get(..length).ok_or(Errno::OVERFLOW)?.into();
        Ok(Self {
            kind: raw.kind,
            bytes,
        })
    }

    /// Opens the file by `O_PATH`. `mount` is any open file or directory on its mount.
    ///
    /// # Errors
    /// `ESTALE` if the file is gone, `EPERM` without `CAP_DAC_READ_SEARCH`.
    pub(crate) fn open(&self, mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut raw = Raw {
            length: u32::try_from(self.bytes.len()).unwrap_or(0),
            kind: self.kind,
            bytes: [0; HANDLE_BYTES_MAX],
        };
        for (to, from) in raw.bytes.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
        // SAFETY: `raw` has the layout of `struct file_handle` followed by at least as many bytes
        // as its first field says.
        let result = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw const raw,
                libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
            )
        };
        let Ok(descriptor @ 0..) = i32::try_from(result) else {
            return Err(last_errno());
        };
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
