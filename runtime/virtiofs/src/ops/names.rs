//! LOOKUP, UNLINK, RMDIR, RENAME, RENAME2, LINK and READLINK.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::attributes::{attributes, seconds};
use crate::abi::{EntryOut, LinkIn, Rename2In, RenameIn};
use crate::inodes::{self, Inode};
use crate::server::{Call, Server};

/// How a name is resolved in its directory: neither up, nor through links of any kind. Mounts are
/// entered.
pub(super) const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

impl Server {
    pub(crate) fn lookup(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        match self.mention(&parent, name) {
            Ok((inode, stat)) => {
                let entry = self.entry(&parent, &inode, &stat);
                call.reply_with(&entry)
            }
            Err(Errno::NOENT) if !parent.mount.policy.negative.is_zero() => {
                // Node id 0: there is none, and that may be remembered.
                let (entry_valid, entry_valid_nsec) = seconds(parent.mount.policy.negative);
                call.reply_with(&EntryOut {
                    entry_valid,
                    entry_valid_nsec,
                    ..EntryOut::default()
                })
            }
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn unlink(&self, call: &mut Call<'_, '_>, directory: bool) -> Result<(), Errno> {
        let parent = self.inodes.find(call.header.nodeid)?;
        let name = call.arguments.take_name()?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        fs::unlinkat(parent.directory()?, name, flags)
    }

    pub(crate) fn rename(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: RenameIn = call.arguments.take()?;
        self.rename_with(call, request.newdir, RenameFlags::empty())
    }

    pub(crate) fn rename2(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: Rename2In = call.arguments.take()?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        match RenameFlags::from_bits(request.flags) {
            Some(flags) if known.contains(flags) => self.rename_with(call, request.newdir, flags),
            _ => Err(Errno::INVAL),
        }
    }

    fn rename_with(
        &self,
        call: &mut Call<'_, '_>,
        new_parent: u64,
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let old_parent = self.inodes.find(call.header.nodeid)?;
        let new_parent = self.inodes.find(new_parent)?;
        let old_name = call.arguments.take_name()?;
        let new_name = call.arguments.take_name()?;
        let (old, new) = (old_parent.directory()?, new_parent.directory()?);
        let rename = || fs::renameat_with(old, old_name, new, new_name, flags);
        if flags.contains(RenameFlags::WHITEOUT) {
            // Creates a file, the whiteout.
            call.worker.as_caller(&call.header, 0, rename)
        } else {
            rename()
        }
    }

    pub(crate) fn link(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: LinkIn = call.arguments.take()?;
        let parent = self.inodes.find(call.header.nodeid)?;
        let inode = self.inodes.find(request.oldnodeid)?;
        let name = call.arguments.take_name()?;
        // To name the file by its descriptor alone (AT_EMPTY_PATH) takes CAP_DAC_READ_SEARCH.
        let number = DecInt::from_fd(inode.path());
        fs::linkat(
            &self.options.proc_self_fd,
            number.as_c_str(),
            parent.directory()?,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.reply_new_entry(call, &parent, name)
    }

    pub(crate) fn readlink(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        const TARGET_BYTES_MAX: usize = 4096;
        let inode = self.inodes.find(call.header.nodeid)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let mut buffer = [0; TARGET_BYTES_MAX];
        let length = fs::readlinkat_raw(inode.path(), c"", &mut buffer)?;
        let target = buffer.get(..length).ok_or(Errno::NAMETOOLONG)?;
        call.reply.write(target)
    }

    /// Finds `name` in `parent`, and counts a mention of what is there.
    pub(super) fn mention(
        &self,
        parent: &Inode,
        name: &CStr,
    ) -> Result<(Arc<Inode>, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat2(parent.directory()?, name, flags, Mode::empty(), RESOLVE)?;
        let stat = inodes::stat(file.as_fd())?;
        let inode = self
            .inodes
            .mention(&self.options, parent, name, file, &stat)?;
        Ok((inode, stat))
    }

    /// Looks up what was made a moment ago, for the reply that names it.
    pub(super) fn reply_new_entry(
        &self,
        call: &mut Call<'_, '_>,
        parent: &Inode,
        name: &CStr,
    ) -> Result<(), Errno> {
        let (inode, stat) = self.mention(parent, name)?;
        let entry = self.entry(parent, &inode, &stat);
        call.reply_with(&entry)
    }

    /// What a reply says of a file found in `parent`.
    pub(super) fn entry(&self, parent: &Inode, inode: &Inode, stat: &Statx) -> EntryOut {
        // The name is in the parent's mount: what is mounted on it may change.
        let (entry_valid, entry_valid_nsec) = seconds(parent.mount.policy.entry);
        let (attr_valid, attr_valid_nsec) = seconds(inode.mount.policy.attributes);
        EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr: attributes(inode, stat),
        }
    }
}
