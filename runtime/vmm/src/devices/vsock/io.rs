//! Moving bytes between guest memory and descriptors without waiting.
//!
//! `O_NONBLOCK` belongs to the open file description, which other processes may share, so it is
//! never set here. Sockets are told per call; a regular file never waits for long; a blocking
//! pipe is polled before each call and written in pieces that fit as soon as it is writable.
//!
//! The only module of the device with unsafe code: system calls on iovecs that point into guest
//! memory, to which no Rust reference may exist.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{FileType, OFlags};
use rustix::net::Shutdown;
use vm_memory::VolatileSlice;

/// A piece of guest memory.
pub(super) type Slice<'m> = VolatileSlice<'m, ()>;

/// Why a descriptor can't be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndpointError {
    #[error("cannot find out what it is")]
    Inspect(#[source] io::Error),
    #[error("it is a {what}, which must be non-blocking")]
    Blocking { what: &'static str },
    #[error("it is a {what}, which carries no stream")]
    NoStream { what: &'static str },
    #[error("cannot watch it")]
    Watch(#[source] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Socket,
    /// Reads and writes return at once of themselves.
    File,
    /// Any other non-blocking description.
    NonBlocking,
    /// Polled before each call.
    BlockingPipe,
}

/// A descriptor that belongs to a connection, watched by the device's epoll set while it lives.
#[derive(Debug)]
pub(super) struct Endpoint {
    fd: OwnedFd,
    kind: Kind,
    /// Where to unregister; `None` for what epoll can't watch because it is always ready.
    watched_by: Option<Rc<OwnedFd>>,
}

impl Endpoint {
    /// Takes `fd` and watches it, edge-triggered, for `interest`.
    pub(super) fn new(
        fd: OwnedFd,
        epoll: &Rc<OwnedFd>,
        token: u64,
        interest: epoll::EventFlags,
    ) -> Result<Self, EndpointError> {
        let inspect = |errno: rustix::io::Errno| EndpointError::Inspect(errno.into());
        let status = rustix::fs::fstat(&fd).map_err(inspect)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(inspect)?;
        let file_type = FileType::from_raw_mode(status.st_mode);
        let data = epoll::EventData::new_u64(token);
        let is_watched = match epoll::add(epoll, &fd, data, interest | epoll::EventFlags::ET) {
            Ok(()) => true,
            // What has no readiness, like a regular file and /dev/null, is refused with EPERM.
            Err(rustix::io::Errno::PERM) => false,
            Err(errno) => return Err(EndpointError::Watch(errno.into())),
        };
        // From here on dropping the endpoint stops the watching.
        let mut endpoint = Self {
            fd,
            kind: Kind::File,
            watched_by: is_watched.then(|| Rc::clone(epoll)),
        };
        endpoint.kind = Kind::of(file_type, flags.contains(OFlags::NONBLOCK), is_watched)?;
        Ok(endpoint)
    }

    /// Whether no event will ever tell that it is ready, because it always is.
    pub(super) fn is_always_ready(&self) -> bool {
        self.watched_by.is_none()
    }

    /// Whether a hang-up means that writing is over: a socket's does. A pipe's comes from its
    /// other reader or writer.
    pub(super) fn is_socket(&self) -> bool {
        self.kind == Kind::Socket
    }

    /// Reads into guest memory; zero is the end.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is there; else what the descriptor says.
    pub(super) fn read(&self, into: &[Slice<'_>]) -> io::Result<usize> {
        let iovecs = Iovecs::of_guest(into, usize::MAX);
        retry(|| match self.kind {
            Kind::Socket => receive_message(&self.fd, &iovecs),
            Kind::BlockingPipe if !is_ready(&self.fd, PollFlags::IN)? => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => read_vectored(&self.fd, &iovecs),
        })
    }

    /// Writes from guest memory; may take less than all.
    ///
    /// # Errors
    /// `WouldBlock` if nothing fits now; else what the descriptor says.
    pub(super) fn write_guest(&self, from: &[Slice<'_>]) -> io::Result<usize> {
        self.write(&Iovecs::of_guest(from, self.write_bytes_max()))
    }

    /// Writes from our own memory; may take less than all.
    ///
    /// # Errors
    /// As [`Self::write_guest`].
    pub(super) fn write_bytes(&self, from: [&[u8]; 2]) -> io::Result<usize> {
        self.write(&Iovecs::of_bytes(from, self.write_bytes_max()))
    }

    /// Shuts one direction of a duplex socket.
    pub(super) fn shut(&self, how: Shutdown) {
        // A peer that is already gone makes it fail, and needs to be told nothing.
        let _ = rustix::net::shutdown(&self.fd, how);
    }

    fn write_bytes_max(&self) -> usize {
        match self.kind {
            Kind::BlockingPipe => BLOCKING_PIPE_WRITE_BYTES_MAX,
            _ => usize::MAX,
        }
    }

    fn write(&self, iovecs: &Iovecs<'_>) -> io::Result<usize> {
        retry(|| match self.kind {
            Kind::Socket => send_message(&self.fd, iovecs),
            Kind::BlockingPipe if !is_ready(&self.fd, PollFlags::OUT)? => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            _ => write_vectored(&self.fd, iovecs),
        })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(epoll) = &self.watched_by {
            // Closing the descriptor is not enough: epoll watches the description, which lives on
            // if another process has it too.
            let _ = epoll::delete(epoll, &self.fd);
        }
    }
}

impl Kind {
    fn of(
        file: FileType,
        is_nonblocking: bool,
        has_readiness: bool,
    ) -> Result<Self, EndpointError> {
        match (file, is_nonblocking) {
            (FileType::Socket, _) => Ok(Self::Socket),
            (FileType::RegularFile, _) => Ok(Self::File),
            (FileType::CharacterDevice, _) if !has_readiness => Ok(Self::File),
            (FileType::Fifo | FileType::CharacterDevice, true) => Ok(Self::NonBlocking),
            (FileType::Fifo, false) => Ok(Self::BlockingPipe),
            (FileType::CharacterDevice, false) => Err(EndpointError::Blocking {
                what: "character device",
            }),
            (FileType::Directory, _) => Err(EndpointError::NoStream { what: "directory" }),
            _ => Err(EndpointError::NoStream {
                what: "file of another kind",
            }),
        }
    }
}

/// A pipe that polls as writable has a page free, and so takes this much without waiting
/// (pipe(7), `PIPE_BUF`).
const BLOCKING_PIPE_WRITE_BYTES_MAX: usize = 4096;

/// Most parts of one transfer (`IOV_MAX`). What lies beyond waits for the next one.
const PARTS_MAX: usize = 1024;

/// Pieces of memory for one transfer, valid for `'a`.
struct Iovecs<'a> {
    parts: Vec<libc::iovec>,
    memory: PhantomData<&'a ()>,
}

impl<'a> Iovecs<'a> {
    fn of_guest(slices: &'a [Slice<'_>], mut bytes_max: usize) -> Self {
        let mut parts = Vec::with_capacity(slices.len().min(PARTS_MAX));
        for slice in slices.iter().take(PARTS_MAX) {
            let bytes = slice.len().min(bytes_max);
            bytes_max -= bytes;
            parts.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: bytes,
            });
        }
        let memory = PhantomData;
        Self { parts, memory }
    }

    /// Only for writing: the memory is not ours to change.
    fn of_bytes(slices: [&'a [u8]; 2], mut bytes_max: usize) -> Self {
        let mut parts = Vec::with_capacity(slices.len());
        for slice in slices {
            let bytes = slice.len().min(bytes_max);
            bytes_max -= bytes;
            parts.push(libc::iovec {
                iov_base: slice.as_ptr().cast_mut().cast(),
                iov_len: bytes,
            });
        }
        let memory = PhantomData;
        Self { parts, memory }
    }

    /// The number of parts, at most [`PARTS_MAX`].
    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.parts.len()).unwrap_or(libc::c_int::MAX)
    }

    fn message(&self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: self.parts.as_ptr().cast_mut(),
            msg_iovlen: self.parts.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }
}

fn read_vectored(fd: &OwnedFd, iovecs: &Iovecs<'_>) -> io::Result<usize> {
    // SAFETY: each part lies in guest memory that outlives the call; the kernel writes only
    // there, and Rust holds no reference to it.
    let done = unsafe { libc::readv(fd.as_raw_fd(), iovecs.parts.as_ptr(), iovecs.count()) };
    result(done)
}

fn write_vectored(fd: &OwnedFd, iovecs: &Iovecs<'_>) -> io::Result<usize> {
    // SAFETY: each part is memory that outlives the call, and the kernel only reads it.
    let done = unsafe { libc::writev(fd.as_raw_fd(), iovecs.parts.as_ptr(), iovecs.count()) };
    result(done)
}

fn receive_message(fd: &OwnedFd, iovecs: &Iovecs<'_>) -> io::Result<usize> {
    let mut message = iovecs.message();
    // SAFETY: as in `read_vectored`; there is no name and no control buffer, so a descriptor that
    // comes along is discarded by the kernel.
    let done = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    result(done)
}

fn send_message(fd: &OwnedFd, iovecs: &Iovecs<'_>) -> io::Result<usize> {
    let message = iovecs.message();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `write_vectored`; there is no name and no control buffer.
    let done = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) };
    result(done)
}

fn result(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Whether a call would not wait. Also true when it would fail at once.
fn is_ready(fd: &OwnedFd, what: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, what)];
    Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
}
