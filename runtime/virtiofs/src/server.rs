//! The server: takes a request, finds the operation, writes the reply.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{self, InHeader, Opcode, OutHeader};
use crate::counters::{Counters, Totals};
use crate::handles::Handles;
use crate::inodes::Inodes;
use crate::memory::{HEADER_BYTES, ReplyWriter, RequestReader};
use crate::ops::{Echo, TRANSFER_BYTES_MAX};
use crate::options::Options;
use crate::request::Arguments;
use crate::worker::{ARGUMENTS_BYTES_MAX, Worker};

/// Serves one directory tree to one guest. All threads share it.
#[derive(Debug)]
pub struct Server {
    pub(crate) options: Options,
    pub(crate) inodes: Inodes,
    pub(crate) handles: Handles,
    pub(crate) totals: Totals,
    /// The flags that both sides agreed on at INIT; [`NOT_INITIALISED`] before.
    negotiated: AtomicU64,
    /// Number of files that were found for an echo alone.
    pub(crate) ghosts: AtomicU64,
}

/// No flag of INIT: the highest bit stands for nothing yet.
const NOT_INITIALISED: u64 = 1 << 63;

/// Why a directory can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The root descriptor isn't a directory's, or doesn't work.
    #[error("cannot use the root directory of the share")]
    Root(#[source] Errno),
}

/// A request at work.
pub(crate) struct Call<'c, 'm> {
    pub(crate) header: InHeader,
    pub(crate) arguments: Arguments<'c>,
    /// File data that follows the arguments, in WRITE only.
    pub(crate) request: &'c mut RequestReader<'m>,
    pub(crate) reply: &'c mut ReplyWriter<'m>,
    pub(crate) worker: &'c mut Worker,
}

impl Call<'_, '_> {
    /// Appends a structure to the reply.
    pub(crate) fn reply_with<T: IntoBytes + zerocopy::Immutable>(
        &mut self,
        value: &T,
    ) -> Result<(), Errno> {
        self.reply.write(value.as_bytes())
    }
}

impl Server {
    /// Serves the directory `root`, open by `O_PATH` or for reading.
    ///
    /// # Errors
    /// If `root` isn't a directory.
    pub fn new(root: OwnedFd, options: Options) -> Result<Self, ServerError> {
        Ok(Self {
            inodes: Inodes::new(root, &options).map_err(ServerError::Root)?,
            handles: Handles::default(),
            totals: Totals::default(),
            negotiated: AtomicU64::new(NOT_INITIALISED),
            ghosts: AtomicU64::default(),
            options,
        })
    }

    /// Answers one request. Returns how many bytes of the reply's ranges are used: 0 where there is
    /// no reply. The caller hands the buffers back either way.
    ///
    /// Any thread may call this at any time, with a worker of its own. No request waits for
    /// another one; each takes as long as the host's file system does.
    ///
    /// There is no reply to FORGET, BATCH_FORGET and INTERRUPT (whose request, if it is still
    /// running, ends soon by itself); to a request that is too short for a header; and to one whose
    /// reply has no room for a header. A request whose length isn't what its header says, or is out
    /// of all proportion, gets `EIO`; one that comes before INIT, too; an unknown opcode `ENOSYS`;
    /// wrong arguments `EINVAL`.
    pub fn handle<'m>(
        &self,
        worker: &mut Worker,
        mut request: RequestReader<'m>,
        mut reply: ReplyWriter<'m>,
    ) -> usize {
        self.totals.requests.add(1);
        let received = request.remaining();
        let Some(header) = request.read_struct::<InHeader>() else {
            self.totals.malformed.add(1);
            return 0;
        };
        let opcode = Opcode::from_number(header.opcode);
        let has_reply = opcode.is_none_or(Opcode::has_reply);
        if has_reply && !reply.has_header() {
            self.totals.malformed.add(1);
            return 0;
        }
        let result = match (arguments_length(&header, received), opcode) {
            (None, _) => {
                self.totals.malformed.add(1);
                Err(Errno::IO)
            }
            (Some(_), None) => Err(Errno::NOSYS),
            (Some(length), Some(opcode)) => {
                request.truncate(length);
                self.run(opcode, header, worker, &mut request, &mut reply)
            }
        };
        if !has_reply {
            return 0;
        }
        finish(&mut reply, header.unique, result)
    }

    /// What the server has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        Counters {
            requests: self.totals.requests.value(),
            malformed: self.totals.malformed.value(),
            bytes_read: self.totals.bytes_read.value(),
            bytes_written: self.totals.bytes_written.value(),
            inodes: count(self.inodes.count()),
            handles: count(self.handles.count()),
        }
    }

    /// Whether all of `flags` were agreed on at INIT.
    pub(crate) fn has(&self, flags: u64) -> bool {
        self.negotiated.load(Ordering::Relaxed) & flags == flags
    }

    /// Starts a session with these flags.
    pub(crate) fn start_session(&self, flags: u64) {
        self.end_session();
        self.negotiated
            .store(flags & !NOT_INITIALISED, Ordering::Relaxed);
    }

    /// Ends the session: the guest knows no file any more.
    pub(crate) fn end_session(&self) {
        self.negotiated.store(NOT_INITIALISED, Ordering::Relaxed);
        self.handles.clear();
        self.inodes.forget_all();
    }

    fn run<'m>(
        &self,
        opcode: Opcode,
        header: InHeader,
        worker: &mut Worker,
        request: &mut RequestReader<'m>,
        reply: &mut ReplyWriter<'m>,
    ) -> Result<(), Errno> {
        if self.has(NOT_INITIALISED) && opcode != Opcode::Init {
            return Err(Errno::IO);
        }
        match opcode {
            Opcode::BatchForget => return self.batch_forget(request),
            Opcode::Interrupt => return Ok(()),
            _ => {}
        }
        let length = match opcode {
            Opcode::Write => size_of::<abi::WriteIn>(),
            _ => request.remaining(),
        };
        // The arguments are borrowed while operations use the rest of the worker.
        let mut input = std::mem::take(&mut worker.input);
        let result = input.get_mut(..length).ok_or(Errno::IO).and_then(|bytes| {
            request.read_exact(bytes).ok_or(Errno::INVAL)?;
            self.operate(
                opcode,
                &mut Call {
                    header,
                    arguments: Arguments(bytes),
                    request,
                    reply,
                    worker,
                },
            )
        });
        worker.input = input;
        result
    }

    fn operate(&self, opcode: Opcode, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let echo = Echo::of(&call.header, self.options.echo_group);
        if let Some(answered) = echo.and_then(|echo| self.echo(echo, opcode, call)) {
            return answered;
        }
        match opcode {
            Opcode::Init => self.init(call),
            Opcode::Destroy => {
                self.end_session();
                Ok(())
            }
            Opcode::Lookup => self.lookup(call),
            Opcode::Forget => self.forget(call),
            Opcode::Getattr => self.getattr(call),
            Opcode::Setattr => self.setattr(call),
            Opcode::Statx => self.statx(call),
            Opcode::Statfs => self.statfs(call),
            Opcode::Readlink => self.readlink(call),
            Opcode::Symlink => self.symlink(call),
            Opcode::Mknod => self.mknod(call),
            Opcode::Mkdir => self.mkdir(call),
            Opcode::Create => self.create(call),
            Opcode::Tmpfile => self.tmpfile(call),
            Opcode::Unlink => self.unlink(call, false),
            Opcode::Rmdir => self.unlink(call, true),
            Opcode::Rename => self.rename(call),
            Opcode::Rename2 => self.rename2(call),
            Opcode::Link => self.link(call),
            Opcode::Open => self.open(call),
            Opcode::Read => self.read(call),
            Opcode::Write => self.write(call),
            Opcode::Flush => self.flush(call),
            Opcode::Release | Opcode::Releasedir => self.release(call),
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync(call),
            Opcode::Syncfs => self.syncfs(call),
            Opcode::Fallocate => self.fallocate(call),
            Opcode::Lseek => self.lseek(call),
            Opcode::CopyFileRange => self.copy_file_range(call),
            Opcode::Ioctl => self.ioctl(call),
            Opcode::Opendir => self.opendir(call),
            Opcode::Readdir => self.readdir(call, false),
            Opcode::Readdirplus => self.readdir(call, true),
            Opcode::Setxattr => self.setxattr(call),
            Opcode::Getxattr => self.getxattr(call),
            Opcode::Listxattr => self.listxattr(call),
            Opcode::Removexattr => self.removexattr(call),
            // Answered before there were arguments.
            Opcode::BatchForget | Opcode::Interrupt => Ok(()),
        }
    }
}

/// Longest request: a WRITE. A guest could describe one of gigabytes, since the buffers of a request
/// may be the same pages many times over, and have a BATCH_FORGET of them keep the thread for long.
const REQUEST_BYTES_MAX: usize = TRANSFER_BYTES_MAX as usize + ARGUMENTS_BYTES_MAX;

/// Length of what follows the header, without extensions; `None` if the header can't be right.
fn arguments_length(header: &InHeader, received: usize) -> Option<usize> {
    /// `total_extlen` counts in eight bytes.
    const EXTENSION_UNIT: usize = 8;
    let length = usize::try_from(header.len)
        .ok()
        .filter(|length| *length <= received.min(REQUEST_BYTES_MAX))?;
    let extensions = usize::from(header.total_extlen).checked_mul(EXTENSION_UNIT)?;
    length
        .checked_sub(size_of::<InHeader>())?
        .checked_sub(extensions)
}

/// Writes the header; an error has no body. Returns the length of the reply.
fn finish(reply: &mut ReplyWriter<'_>, unique: u64, result: Result<(), Errno>) -> usize {
    let error = match result {
        Ok(()) => 0,
        Err(errno) => {
            reply.rewind();
            errno.raw_os_error().saturating_neg()
        }
    };
    let length = HEADER_BYTES.saturating_add(reply.written());
    let mut bytes = [0; HEADER_BYTES];
    let header = OutHeader {
        // A reply is a few MiB at most: its ranges are in guest memory, its data one WRITE's.
        len: u32::try_from(length).unwrap_or(u32::MAX),
        error,
        unique,
    };
    bytes.copy_from_slice(header.as_bytes());
    reply.finish(&bytes);
    length
}
