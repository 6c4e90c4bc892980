//! Echoes: requests that change nothing, and let the guest kernel tell its watchers (inotify) of a
//! change that the host made.
//!
//! Linux tells watchers of what its own system calls do, and FUSE has no message that says so of
//! somebody else's change. So somebody in the guest whom the host trusts with it does what the host
//! has done once more, in the name of a group that no process has, and the server says yes: the
//! guest kernel then tells its watchers. An echo never changes a file, so whoever else in the guest
//! makes one fools only watchers of its own pod.

use std::sync::atomic::Ordering;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::abi::{Attr, EntryOut, InHeader, MkdirIn, MknodIn, Opcode, OpenIn, SetattrIn};
use crate::handles::Handle;
use crate::inodes;
use crate::server::{Call, Server};

/// What an echo repeats, by its group's distance from [`Options::echo_group`](crate::Options).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Echo {
    /// Something was made: it isn't found until it is made again, be it gone or not.
    Made,
    /// What is no directory was removed or renamed: it is found once more, to be removed or renamed.
    GoneFile,
    /// The same of a directory.
    GoneDirectory,
    /// Contents or attributes were changed.
    Touched,
}

/// Names of files that are found for an echo alone have this bit, which no other's has: numbers of
/// inodes count from 1.
const GHOST: u64 = 1 << 63;

/// What would change something. An echo asks for none of it, but for what is answered differently.
const CHANGES: [Opcode; 16] = [
    Opcode::Setattr,
    Opcode::Symlink,
    Opcode::Mknod,
    Opcode::Mkdir,
    Opcode::Unlink,
    Opcode::Rmdir,
    Opcode::Rename,
    Opcode::Rename2,
    Opcode::Link,
    Opcode::Create,
    Opcode::Tmpfile,
    Opcode::Write,
    Opcode::Fallocate,
    Opcode::CopyFileRange,
    Opcode::Setxattr,
    Opcode::Removexattr,
];

impl Echo {
    /// What a request is an echo of, if it is one.
    pub(crate) fn of(header: &InHeader, group: Option<u32>) -> Option<Self> {
        match header.gid.checked_sub(group?)? {
            0 => Some(Self::Made),
            1 => Some(Self::GoneFile),
            2 => Some(Self::GoneDirectory),
            3 => Some(Self::Touched),
            _ => None,
        }
    }
}

impl Server {
    /// Answers an echo; `None` where it is to be answered as any other request.
    pub(crate) fn echo(
        &self,
        echo: Echo,
        opcode: Opcode,
        call: &mut Call<'_, '_>,
    ) -> Option<Result<(), Errno>> {
        match (echo, opcode) {
            (Echo::Made, Opcode::Lookup) => Some(Err(Errno::NOENT)),
            (Echo::Made, Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink) => {
                Some(self.find_made(call, opcode))
            }
            (Echo::GoneFile, Opcode::Lookup) => {
                Some(self.find_or_pretend(call, FileType::RegularFile))
            }
            (Echo::GoneDirectory, Opcode::Lookup) => {
                Some(self.find_or_pretend(call, FileType::Directory))
            }
            (
                Echo::GoneFile | Echo::GoneDirectory,
                Opcode::Unlink | Opcode::Rmdir | Opcode::Rename | Opcode::Rename2,
            ) => Some(Ok(())),
            (Echo::Touched, Opcode::Lookup) => Some(self.find_briefly(call)),
            (Echo::Touched, Opcode::Setattr) => Some(self.attributes_as_they_are(call)),
            (_, Opcode::Open) => Some(self.open_to_close(call)),
            _ if CHANGES.contains(&opcode) => Some(Err(Errno::PERM)),
            _ => None,
        }
    }

    /// Answers a request that makes a file with the one that is there.
    fn find_made(&self, call: &mut Call<'_, '_>, opcode: Opcode) -> Result<(), Errno> {
        let kind = match opcode {
            Opcode::Mkdir => call
                .arguments
                .take::<MkdirIn>()
                .map(|_| FileType::Directory)?,
            Opcode::Mknod => FileType::from_raw_mode(call.arguments.take::<MknodIn>()?.mode),
            _ => FileType::Symlink,
        };
        self.find_or_pretend(call, kind)
    }

    /// Finds what is there, or else a file that nothing can be done with but what is echoed.
    fn find_or_pretend(&self, call: &mut Call<'_, '_>, kind: FileType) -> Result<(), Errno> {
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        match self.reply_new_entry(call, &parent, name) {
            // Valid for no time, so that the next look finds what is there.
            Err(Errno::NOENT) => call.reply_with(&EntryOut {
                nodeid: GHOST | self.ghosts.fetch_add(1, Ordering::Relaxed),
                attr: Attr {
                    ino: GHOST,
                    mode: kind.as_raw_mode(),
                    nlink: 1,
                    ..Attr::default()
                },
                ..EntryOut::default()
            }),
            found => found,
        }
    }

    /// Finds what is there, to be asked for again at the next look.
    fn find_briefly(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let (inode, stat) = self.mention(&parent, name)?;
        let entry = EntryOut {
            entry_valid: 0,
            entry_valid_nsec: 0,
            ..self.entry(&parent, &inode, &stat)
        };
        call.reply_with(&entry)
    }

    fn attributes_as_they_are(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let _: SetattrIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let stat = inodes::stat(inode.path())?;
        super::attributes::reply_attributes(call, &inode, &stat)
    }

    /// Opens a file for reading, however it is to be opened: the guest tells watchers by its own
    /// flags as it closes it.
    fn open_to_close(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let _: OpenIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let flags = OFlags::RDONLY.bits();
        let file = self.open_with(call, &inode, inode.path(), flags, 0)?;
        self.reply_opened(call, &inode, Handle::of_file(file))
    }
}
