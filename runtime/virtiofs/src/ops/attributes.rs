//! GETATTR, SETATTR, STATX, STATFS, and attributes as replies hold them.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::process::{Gid, Uid};

use crate::abi::{
    self, Attr, AttrOut, GetattrIn, Kstatfs, SetattrIn, StatxIn, StatxOut, SxTime, set,
};
use crate::inodes::{self, Inode};
use crate::server::{Call, Server};

/// Permission bits with set-user-id, set-group-id and sticky.
pub(super) const MODE_BITS: u32 = 0o7777;
/// Set-user-id and set-group-id.
const PRIVILEGE_BITS: u16 = 0o6000;

impl Server {
    pub(crate) fn getattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: GetattrIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let stat = if request.flags & abi::GETATTR_FH != 0 {
            inodes::stat(self.handles.find(request.fh)?.as_fd())?
        } else {
            inodes::stat(inode.path())?
        };
        reply_attributes(call, &inode, &stat)
    }

    pub(crate) fn statx(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: StatxIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let mask = StatxFlags::from_bits_truncate(request.sx_mask)
            & (StatxFlags::BASIC_STATS | StatxFlags::BTIME);
        let sync = AtFlags::STATX_FORCE_SYNC | AtFlags::STATX_DONT_SYNC;
        let flags = AtFlags::from_bits_truncate(request.sx_flags) & sync | AtFlags::EMPTY_PATH;
        let stat = if request.getattr_flags & abi::GETATTR_FH != 0 {
            fs::statx(self.handles.find(request.fh)?.as_fd(), c"", flags, mask)?
        } else {
            fs::statx(inode.path(), c"", flags, mask)?
        };
        let (attr_valid, attr_valid_nsec) = seconds(inode.mount.policy.attributes);
        call.reply_with(&StatxOut {
            attr_valid,
            attr_valid_nsec,
            stat: statx_reply(&inode, &stat),
            ..StatxOut::default()
        })
    }

    /// SETATTR, in any combination. The owner before the mode, since a change of owner clears
    /// set-user-id; times last, since all else changes them.
    pub(crate) fn setattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: SetattrIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let handle = match request.valid & set::FH {
            0 => None,
            _ => Some(self.handles.find(request.fh)?),
        };
        let path = inode.path();
        if request.valid & (set::UID | set::GID) != 0 {
            let uid = (request.valid & set::UID != 0).then_some(request.uid);
            let gid = (request.valid & set::GID != 0).then_some(request.gid);
            // To the kernel, this means "leave it".
            if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
                return Err(Errno::INVAL);
            }
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            fs::chownat(path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if request.valid & set::MODE != 0 {
            self.chmod(path, inode.kind, request.mode)?;
        }
        if request.valid & set::SIZE != 0 {
            let kill = request.valid & set::KILL_SUIDGID != 0;
            match &handle {
                Some(handle) => resize(call, handle.as_fd(), request.size, kill)?,
                None => {
                    let file = self.reopen_file(&inode, path, OFlags::WRONLY)?;
                    resize(call, file.as_fd(), request.size, kill)?;
                }
            }
        }
        if let Some(times) = times(&request) {
            let name = DecInt::from_fd(path);
            let descriptors = &self.options.proc_self_fd;
            fs::utimensat(descriptors, name.as_c_str(), &times, AtFlags::empty())?;
        }
        let stat = inodes::stat(path)?;
        reply_attributes(call, &inode, &stat)
    }

    pub(crate) fn statfs(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let inode = self.inodes.find(call.header.nodeid)?;
        let found = fs::fstatvfs(inode.path())?;
        let narrow = |wide: u64| u32::try_from(wide).unwrap_or(u32::MAX);
        call.reply_with(&Kstatfs {
            blocks: found.f_blocks,
            bfree: found.f_bfree,
            bavail: found.f_bavail,
            files: found.f_files,
            ffree: found.f_ffree,
            bsize: narrow(found.f_bsize),
            namelen: narrow(found.f_namemax),
            frsize: narrow(found.f_frsize),
            ..Kstatfs::default()
        })
    }

    /// Changes the mode of the file behind an `O_PATH` descriptor.
    pub(super) fn chmod(
        &self,
        path: BorrowedFd<'_>,
        kind: FileType,
        mode: u32,
    ) -> Result<(), Errno> {
        if kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let name = DecInt::from_fd(path);
        let mode = Mode::from_raw_mode(mode & MODE_BITS);
        fs::chmodat(
            &self.options.proc_self_fd,
            name.as_c_str(),
            mode,
            AtFlags::empty(),
        )
    }
}

fn resize(call: &Call<'_, '_>, file: BorrowedFd<'_>, size: u64, kill: bool) -> Result<(), Errno> {
    if kill && has_privilege_bits(file)? {
        call.worker
            .without_fsetid(&call.header, || fs::ftruncate(file, size))
    } else {
        fs::ftruncate(file, size)
    }
}

/// Whether there is anything to clear. Almost never; and to ask costs less than to drop and take
/// back a capability.
pub(super) fn has_privilege_bits(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MODE)?;
    Ok(stat.stx_mode & PRIVILEGE_BITS != 0)
}

/// The times that a SETATTR sets, if any.
fn times(request: &SetattrIn) -> Option<Timestamps> {
    let time = |set: u32, now: u32, sec: u64, nsec: u32| Timespec {
        tv_sec: sec.cast_signed(),
        tv_nsec: match request.valid {
            valid if valid & now != 0 => fs::UTIME_NOW,
            valid if valid & set != 0 => nsec.into(),
            _ => fs::UTIME_OMIT,
        },
    };
    (request.valid & (set::ATIME | set::MTIME) != 0).then(|| Timestamps {
        last_access: time(set::ATIME, set::ATIME_NOW, request.atime, request.atimensec),
        last_modification: time(set::MTIME, set::MTIME_NOW, request.mtime, request.mtimensec),
    })
}

pub(super) fn reply_attributes(
    call: &mut Call<'_, '_>,
    inode: &Inode,
    stat: &Statx,
) -> Result<(), Errno> {
    let (attr_valid, attr_valid_nsec) = seconds(inode.mount.policy.attributes);
    call.reply_with(&AttrOut {
        attr_valid,
        attr_valid_nsec,
        dummy: 0,
        attr: attributes(inode, stat),
    })
}

/// A duration as the protocol has it.
pub(super) fn seconds(duration: Duration) -> (u64, u32) {
    (duration.as_secs(), duration.subsec_nanos())
}

fn guest_ino(inode: &Inode, stat: &Statx) -> u64 {
    let device = inodes::device(stat);
    inode.mount.guest_ino(device, stat.stx_ino)
}

/// Attributes as most replies have them.
pub(super) fn attributes(inode: &Inode, stat: &Statx) -> Attr {
    Attr {
        ino: guest_ino(inode, stat),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// A device number in the kernel's 32 bits (`new_encode_dev` of `linux/kdev_t.h`).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn statx_reply(inode: &Inode, stat: &Statx) -> abi::Statx {
    let time = |time: fs::StatxTimestamp| SxTime {
        sec: time.tv_sec,
        nsec: time.tv_nsec,
        reserved: 0,
    };
    abi::Statx {
        mask: stat.stx_mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
        blksize: stat.stx_blksize,
        attributes: stat.stx_attributes.bits(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: stat.stx_mode,
        spare0: 0,
        ino: guest_ino(inode, stat),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        attributes_mask: stat.stx_attributes_mask.bits(),
        atime: time(stat.stx_atime),
        btime: time(stat.stx_btime),
        ctime: time(stat.stx_ctime),
        mtime: time(stat.stx_mtime),
        rdev_major: stat.stx_rdev_major,
        rdev_minor: stat.stx_rdev_minor,
        dev_major: stat.stx_dev_major,
        dev_minor: stat.stx_dev_minor,
        spare2: [0; 14],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_kernels_encoding() {
        assert_eq!(encode_device(8, 1), 0x0801);
        assert_eq!(encode_device(259, 0x12345), 0x1231_0345);
    }

    #[test]
    fn setattr_without_times_sets_none() {
        let request = SetattrIn {
            valid: set::MODE | set::SIZE,
            ..SetattrIn::default()
        };
        assert!(times(&request).is_none());
    }

    #[test]
    fn time_that_is_not_set_is_left_alone() {
        let request = SetattrIn {
            valid: set::MTIME | set::MTIME_NOW,
            ..SetattrIn::default()
        };
        let times = times(&request).unwrap();
        assert_eq!(times.last_access.tv_nsec, fs::UTIME_OMIT);
        assert_eq!(times.last_modification.tv_nsec, fs::UTIME_NOW);
    }
}
