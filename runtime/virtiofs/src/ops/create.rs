//! CREATE, TMPFILE, MKNOD, MKDIR and SYMLINK: what makes files, in the caller's name.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::MODE_BITS;
use super::names::RESOLVE;
use crate::abi::{CreateIn, MkdirIn, MknodIn};
use crate::handles::Handle;
use crate::inodes::{self, Inode};
use crate::server::{Call, Server};

impl Server {
    pub(crate) fn mkdir(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: MkdirIn = call.arguments.take()?;
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let directory = parent.directory()?;
        let mode = Mode::from_raw_mode(request.mode & MODE_BITS);
        let work = || fs::mkdirat(directory, name, mode);
        call.worker.as_caller(&call.header, request.umask, work)?;
        self.reply_new_entry(call, &parent, name)
    }

    pub(crate) fn mknod(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: MknodIn = call.arguments.take()?;
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let directory = parent.directory()?;
        let kind = FileType::from_raw_mode(request.mode);
        let mode = Mode::from_raw_mode(request.mode & MODE_BITS);
        let device = decode_device(request.rdev);
        let work = || fs::mknodat(directory, name, kind, mode, device);
        call.worker.as_caller(&call.header, request.umask, work)?;
        self.reply_new_entry(call, &parent, name)
    }

    pub(crate) fn symlink(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let target = call.arguments.take_link_target()?;
        let directory = parent.directory()?;
        let work = || fs::symlinkat(target, directory, name);
        call.worker.as_caller(&call.header, 0, work)?;
        self.reply_new_entry(call, &parent, name)
    }

    /// Makes a file and opens it. Without `O_EXCL`, what is there already is opened: by a second
    /// step, so that nothing but a new file is ever opened with `O_CREAT`.
    pub(crate) fn create(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: CreateIn = call.arguments.take()?;
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let flags = self.host_flags(request.flags);
        let made = {
            let directory = parent.directory()?;
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            let mode = Mode::from_raw_mode(request.mode & MODE_BITS);
            let work = || fs::openat2(directory, name, flags, mode, RESOLVE);
            call.worker.as_caller(&call.header, request.umask, work)
        };
        match made {
            Ok(file) => self.reply_created(call, &parent, name, file),
            Err(Errno::EXIST) if request.flags & OFlags::EXCL.bits() == 0 => {
                let (inode, stat) = self.mention(&parent, name)?;
                let path = inode.path();
                let file = self
                    .open_with(call, &inode, path, request.flags, request.open_flags)
                    .inspect_err(|_| self.inodes.forget(inode.id, 1))?;
                let entry = self.entry(&parent, &inode, &stat);
                call.reply_with(&entry)?;
                self.reply_opened(call, &inode, Handle::of_file(file))
                    .inspect_err(|_| self.inodes.forget(inode.id, 1))
            }
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn tmpfile(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: CreateIn = call.arguments.take()?;
        let parent = self.inodes.find(call.header.nodeid)?;
        let directory = parent.directory()?;
        // With O_EXCL, the file can't be given a name later.
        let exclusive = OFlags::from_bits_retain(request.flags) & OFlags::EXCL;
        let flags = self.host_flags(request.flags) | exclusive | OFlags::TMPFILE;
        let mode = Mode::from_raw_mode(request.mode & MODE_BITS);
        let work = || fs::openat2(directory, c".", flags, mode, RESOLVE);
        let file = call.worker.as_caller(&call.header, request.umask, work)?;
        self.reply_created(call, &parent, c"", file)
    }

    /// Names the file just made, by its descriptor: the name may be another's by now.
    fn reply_created(
        &self,
        call: &mut Call<'_, '_>,
        parent: &Inode,
        name: &CStr,
        file: OwnedFd,
    ) -> Result<(), Errno> {
        let path = inodes::reopen(&self.options, file.as_fd(), OFlags::PATH)?;
        let stat = inodes::stat(path.as_fd())?;
        let inode = self
            .inodes
            .mention(&self.options, parent, name, path, &stat)?;
        let entry = self.entry(parent, &inode, &stat);
        call.reply_with(&entry)?;
        self.reply_opened(call, &inode, Handle::of_file(file))
            .inspect_err(|_| self.inodes.forget(inode.id, 1))
    }
}

/// The device number that the kernel has put in 32 bits (`new_decode_dev` of `linux/kdev_t.h`).
fn decode_device(encoded: u32) -> fs::Dev {
    let major = (encoded & 0xf_ff00) >> 8;
    let minor = (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00);
    fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_decoded_as_the_kernel_does() {
        let device = decode_device(0x1231_0345);
        assert_eq!((fs::major(device), fs::minor(device)), (0x103, 0x12345));
    }
}
