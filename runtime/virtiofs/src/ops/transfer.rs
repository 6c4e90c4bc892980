//! READ, WRITE and COPY_FILE_RANGE.

use std::os::fd::AsFd;

use rustix::fs::{self, OFlags};
use rustix::io::Errno;

use super::TRANSFER_BYTES_MAX;
use super::attributes::has_privilege_bits;
use crate::abi::{self, CopyFileRangeIn, ReadIn, WriteIn, WriteOut};
use crate::server::{Call, Server};

/// Most bytes copied by one COPY_FILE_RANGE, so that it doesn't keep a worker for long: the caller
/// gets a short count and asks again.
const COPY_BYTES_MAX: u64 = 64 * 1024 * 1024;

impl Server {
    pub(crate) fn read(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: ReadIn = call.arguments.take()?;
        let length = transfer_length(request.size)?;
        // A short reply is the end of the file: so it must not be one because of small buffers.
        if call.reply.room() < length {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.find_file(request.fh)?;
        let count = call
            .reply
            .read_from_file_at(handle.as_fd(), length, request.offset)?;
        self.totals.bytes_read.add(count);
        Ok(())
    }

    pub(crate) fn write(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: WriteIn = call.arguments.take()?;
        let length = transfer_length(request.size)?;
        if call.request.remaining() < length {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.find_file(request.fh)?;
        let from_cache = request.write_flags & abi::WRITE_CACHE != 0;
        let append = !from_cache && request.flags & OFlags::APPEND.bits() != 0;
        let clears = request.write_flags & abi::WRITE_KILL_SUIDGID != 0;
        let source = &mut *call.request;
        let mut write = || source.write_to_file_at(handle.as_fd(), length, request.offset, append);
        let count = if clears && has_privilege_bits(handle.as_fd())? {
            call.worker.without_fsetid(&call.header, write)?
        } else {
            write()?
        };
        self.totals.bytes_written.add(count);
        let size = u32::try_from(count).map_err(|_| Errno::IO)?;
        call.reply_with(&WriteOut { size, padding: 0 })
    }

    pub(crate) fn copy_file_range(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: CopyFileRangeIn = call.arguments.take()?;
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handles.find_file(request.fh_in)?;
        let to = self.handles.find_file(request.fh_out)?;
        let length = usize::try_from(request.len.min(COPY_BYTES_MAX)).map_err(|_| Errno::INVAL)?;
        let (mut at, mut to_at) = (request.off_in, request.off_out);
        let copy = || {
            let (at, to_at) = (Some(&mut at), Some(&mut to_at));
            fs::copy_file_range(from.as_fd(), at, to.as_fd(), to_at, length)
        };
        // The request doesn't say who may keep set-user-id. Root may.
        let count = if call.header.uid != 0 && has_privilege_bits(to.as_fd())? {
            call.worker.without_fsetid(&call.header, copy)?
        } else {
            let mut copy = copy;
            copy()?
        };
        self.totals.bytes_read.add(count);
        self.totals.bytes_written.add(count);
        let size = u32::try_from(count).map_err(|_| Errno::IO)?;
        call.reply_with(&WriteOut { size, padding: 0 })
    }
}

/// The length of a transfer. A kernel that keeps to what INIT said never asks for more.
fn transfer_length(size: u32) -> Result<usize, Errno> {
    if size > TRANSFER_BYTES_MAX {
        return Err(Errno::INVAL);
    }
    usize::try_from(size).map_err(|_| Errno::INVAL)
}
