//! OPENDIR, READDIR and READDIRPLUS.

use std::os::fd::AsFd;
use std::sync::PoisonError;

use rustix::fs::{self, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{self, Dirent, EntryOut, ReadIn};
use crate::handles::Handle;
use crate::inodes::{self, Inode};
use crate::server::{Call, Server};
use crate::worker::{ENTRIES_BYTES, OUTPUT_BYTES_MAX};

/// Host entries read for READDIRPLUS in one go: each takes five times as much room in the reply,
/// and what doesn't fit has to be read again.
const ENTRIES_BYTES_PLUS: usize = 8 * 1024;

impl Server {
    pub(crate) fn opendir(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let inode = self.inodes.find(call.header.nodeid)?;
        let path = inode.directory()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = inodes::reopen(&self.options, path, flags)?;
        self.reply_opened(call, &inode, Handle::of_directory(directory))
    }

    /// Entries from the offset on, as many as fit. `plus`: each with what a LOOKUP would say, and
    /// counted as one.
    pub(crate) fn readdir(&self, call: &mut Call<'_, '_>, plus: bool) -> Result<(), Errno> {
        let request: ReadIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let handle = self.handles.find(request.fh)?;
        let room = usize::try_from(request.size).unwrap_or(usize::MAX);
        let room = room.min(call.reply.room()).min(OUTPUT_BYTES_MAX);
        let mut output = std::mem::take(&mut call.worker.output);
        output.clear();
        let result = self.read_entries(call, &inode, &handle, &mut output, room, plus, &request);
        let result = result.and_then(|()| call.reply.write(&output));
        call.worker.output = output;
        result
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the buffers are borrowed apart from each other"
    )]
    fn read_entries(
        &self,
        call: &mut Call<'_, '_>,
        inode: &Inode,
        handle: &Handle,
        output: &mut Vec<u8>,
        room: usize,
        plus: bool,
        request: &ReadIn,
    ) -> Result<(), Errno> {
        let mut position = handle
            .position()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if position.take() != Some(request.offset) {
            fs::seek(handle.as_fd(), SeekFrom::Start(request.offset))?;
        }
        let length = if plus {
            ENTRIES_BYTES_PLUS
        } else {
            ENTRIES_BYTES
        };
        let buffer = call.worker.entries.get_mut(..length).ok_or(Errno::IO)?;
        let mut entries = RawDir::new(handle.as_fd(), buffer);
        let mut next = request.offset;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What is in the reply was counted as mentioned, so it has to be sent. The next
                // request begins here, and meets the error.
                Err(_) if !output.is_empty() => return Ok(()),
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name();
            let dirent = Dirent {
                ino: match name.to_bytes() {
                    // What is above the share is none of the guest's business.
                    b".." if inode.id == abi::ROOT_ID => abi::ROOT_ID,
                    // Of other devices, it is known only once they are looked up.
                    _ => inode.mount.guest_ino(inode.device(), entry.ino()),
                },
                off: entry.next_entry_cookie(),
                namelen: u32::try_from(name.count_bytes()).map_err(|_| Errno::NAMETOOLONG)?,
                kind: u32::from(kind_number(entry.file_type())),
            };
            let head = if plus { size_of::<EntryOut>() } else { 0 };
            let size = abi::aligned(
                head.saturating_add(size_of::<Dirent>())
                    .saturating_add(name.count_bytes()),
            );
            if output.len().saturating_add(size) > room {
                // The position is past an entry that was not sent: seek next time.
                return if output.is_empty() {
                    Err(Errno::INVAL)
                } else {
                    Ok(())
                };
            }
            if plus {
                let entry = match name.to_bytes() {
                    // Not looked up; node id 0 says so.
                    b"." | b".." => EntryOut::default(),
                    _ => match self.mention(inode, name) {
                        Ok((child, stat)) => self.entry(inode, &child, &stat),
                        // Deleted a moment ago.
                        Err(Errno::NOENT) => continue,
                        Err(_) => EntryOut::default(),
                    },
                };
                output.extend_from_slice(entry.as_bytes());
            }
            output.extend_from_slice(dirent.as_bytes());
            output.extend_from_slice(name.to_bytes());
            output.resize(abi::aligned(output.len()), 0);
            next = dirent.off;
            // What is read ahead of a full reply would be read again: stop where the host did.
            if entries.is_buffer_empty() && room.saturating_sub(output.len()) < room / 2 {
                *position = Some(next);
                return Ok(());
            }
        }
        *position = Some(next);
        Ok(())
    }
}

/// The type as directory entries have it (`DT_*`): the upper four bits of the mode, 0 if it is not
/// known.
fn kind_number(kind: fs::FileType) -> u8 {
    match kind {
        fs::FileType::Unknown => 0,
        kind => u8::try_from(kind.as_raw_mode() >> 12).unwrap_or(0) & 0xf,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_those_of_directory_entries() {
        assert_eq!(kind_number(fs::FileType::Unknown), 0);
        assert_eq!(kind_number(fs::FileType::Directory), 4);
        assert_eq!(kind_number(fs::FileType::RegularFile), 8);
        assert_eq!(kind_number(fs::FileType::Symlink), 10);
    }
}
