//! OPEN, RELEASE, FLUSH, FSYNC, SYNCFS, FALLOCATE, LSEEK and IOCTL.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::{self, Errno};

use super::attributes::has_privilege_bits;
use crate::abi::{
    self, FallocateIn, FlushIn, FsyncIn, IoctlIn, IoctlOut, LseekIn, LseekOut, OpenIn, OpenOut,
    ReleaseIn, fopen, init,
};
use crate::handles::Handle;
use crate::inodes::{self, Inode};
use crate::server::{Call, Server};
use crate::sys;

/// Flags of `open(2)` that are passed on. Not among them: `O_APPEND`, since a handle is also used
/// to write pages back (WRITE says itself when to append); `O_DIRECT`, which binds the guest's
/// cache and not the host's; `O_NOFOLLOW`, `O_CREAT` and the like, for which the server decides.
const PASSED_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

/// `FS_IOC_GETFLAGS` of `linux/fs.h`.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;

impl Server {
    pub(crate) fn open(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: OpenIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let path = inode.path();
        let file = self.open_with(call, &inode, path, request.flags, request.open_flags)?;
        self.reply_opened(call, &inode, Handle::of_file(file))
    }

    /// Opens a regular file as a guest's OPEN or CREATE asks for it.
    pub(super) fn open_with(
        &self,
        call: &Call<'_, '_>,
        inode: &Inode,
        path: BorrowedFd<'_>,
        flags: u32,
        open_flags: u32,
    ) -> Result<OwnedFd, Errno> {
        let mut flags = self.host_flags(flags);
        if inode.mount.is_generated {
            // A read of some waits until there is something to tell, with this thread.
            flags |= OFlags::NONBLOCK;
        }
        let clears = flags.contains(OFlags::TRUNC) && open_flags & abi::OPEN_KILL_SUIDGID != 0;
        if clears && has_privilege_bits(path)? {
            call.worker
                .without_fsetid(&call.header, || self.reopen_file(inode, path, flags))
        } else {
            self.reopen_file(inode, path, flags)
        }
    }

    /// Opens a regular file. To open anything else may block, or act on a device.
    pub(super) fn reopen_file(
        &self,
        inode: &Inode,
        path: BorrowedFd<'_>,
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        match inode.kind {
            FileType::RegularFile => inodes::reopen(&self.options, path, flags),
            FileType::Directory => Err(Errno::ISDIR),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::NXIO),
        }
    }

    /// The flags to open a file with on the host.
    pub(super) fn host_flags(&self, guest: u32) -> OFlags {
        let mut flags = OFlags::from_bits_retain(guest) & PASSED_FLAGS;
        // To fill a page before it writes a part of it, the guest's cache reads by any handle.
        if self.has(init::WRITEBACK_CACHE) && flags & OFlags::ACCMODE == OFlags::WRONLY {
            flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
        flags | OFlags::CLOEXEC
    }

    /// Ends the reply of what opens a file or directory.
    pub(super) fn reply_opened(
        &self,
        call: &mut Call<'_, '_>,
        inode: &Inode,
        handle: Handle,
    ) -> Result<(), Errno> {
        let open_flags = match (inode.kind, inode.mount.policy.contents) {
            // The guest reads up to the size that a file has, unless it is told not to keep it.
            (FileType::RegularFile, _) if inode.mount.is_generated => fopen::DIRECT_IO,
            (FileType::Directory, true) => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            (_, true) => fopen::KEEP_CACHE | fopen::NOFLUSH,
            (FileType::RegularFile, false) => {
                let are_as_before = inodes::stat(handle.as_fd())
                    .is_ok_and(|stat| inode.contents.are_as_before(&stat));
                if are_as_before { fopen::KEEP_CACHE } else { 0 }
            }
            (_, false) => 0,
        };
        let fh = self.handles.add(handle, self.options.handles_max)?;
        let opened = OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        };
        call.reply_with(&opened)
            .or_else(|errno| self.handles.remove(fh).and(Err(errno)))
    }

    pub(crate) fn release(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: ReleaseIn = call.arguments.take()?;
        self.handles.remove(request.fh)
    }

    /// The guest has closed one of its descriptors. File systems that report errors of earlier
    /// writes do so when a descriptor is closed, so one is.
    pub(crate) fn flush(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: FlushIn = call.arguments.take()?;
        let handle = self.handles.find_file(request.fh)?;
        sys::close(io::dup(handle.as_fd())?)
    }

    pub(crate) fn fsync(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: FsyncIn = call.arguments.take()?;
        let handle = self.handles.find(request.fh)?;
        if request.fsync_flags & abi::FSYNC_FDATASYNC != 0 {
            fs::fdatasync(handle.as_fd())
        } else {
            fs::fsync(handle.as_fd())
        }
    }

    /// Linux names the root of the share, whatever file system is to be written. All of them are not:
    /// the agent syncs at the end of each pod, which would write the host's disks to the last block.
    pub(crate) fn syncfs(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let inode = self.inodes.find(call.header.nodeid)?;
        let path = inode.directory()?;
        let directory = inodes::reopen(&self.options, path, OFlags::RDONLY)?;
        fs::syncfs(directory)
    }

    pub(crate) fn fallocate(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: FallocateIn = call.arguments.take()?;
        let handle = self.handles.find_file(request.fh)?;
        let mode = FallocateFlags::from_bits(request.mode).ok_or(Errno::OPNOTSUPP)?;
        let work = || fs::fallocate(handle.as_fd(), mode, request.offset, request.length);
        // The request doesn't say who may keep set-user-id. Root may.
        if call.header.uid != 0 && has_privilege_bits(handle.as_fd())? {
            call.worker.without_fsetid(&call.header, work)
        } else {
            work()
        }
    }

    pub(crate) fn lseek(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: LseekIn = call.arguments.take()?;
        let handle = self.handles.find_file(request.fh)?;
        let position = match request.whence.cast_signed() {
            libc::SEEK_HOLE => SeekFrom::Hole(request.offset),
            libc::SEEK_DATA => SeekFrom::Data(request.offset),
            // The guest kernel does all others itself.
            _ => return Err(Errno::INVAL),
        };
        if i64::try_from(request.offset).is_err() {
            return Err(Errno::INVAL);
        }
        let offset = fs::seek(handle.as_fd(), position)?;
        call.reply_with(&LseekOut { offset })
    }

    /// Flags of a file can be read (`lsattr`). To set them would reach into the host's file
    /// system: quotas, encryption, layout.
    pub(crate) fn ioctl(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: IoctlIn = call.arguments.take()?;
        let handle = self.handles.find(request.fh)?;
        if request.cmd != FS_IOC_GETFLAGS {
            return Err(Errno::NOTTY);
        }
        let flags = fs::ioctl_getflags(handle.as_fd())?.bits().to_ne_bytes();
        let length = usize::try_from(request.out_size).unwrap_or(0);
        let flags = flags.get(..length).ok_or(Errno::INVAL)?;
        call.reply_with(&IoctlOut::default())?;
        call.reply.write(flags)
    }
}
