//! The wire format: what `include/uapi/linux/fuse.h` says, protocol 7.40.
//!
//! A request is [`InHeader`], then a structure that depends on the opcode, then names (each ended
//! by NUL) or data. A reply is [`OutHeader`], then a structure or data. All integers are in the
//! byte order of the machine; host and guest are the same machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub(crate) const MAJOR: u32 = 7;
/// Newest minor version that this server speaks.
pub(crate) const MINOR: u32 = 40;
/// Oldest minor version that it accepts: the first one virtio-fs was made for.
pub(crate) const MINOR_MIN: u32 = 31;
/// Node id of the root directory.
pub(crate) const ROOT_ID: u64 = 1;

/// Declares structures of the wire format.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $kind,)* }
    )*};
}

wire! {
    /// `fuse_in_header`
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// `fuse_out_header`
    OutHeader { len: u32, error: i32, unique: u64, }
    /// `fuse_attr`
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// `fuse_entry_out`
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    /// `fuse_attr_out`
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    /// `fuse_sx_time`
    SxTime { sec: i64, nsec: u32, reserved: i32, }
    /// `fuse_statx`
    Statx {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32,
        mode: u16, spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// `fuse_statx_out`
    StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, }
    /// `fuse_statx_in`
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// `fuse_kstatfs`
    Kstatfs {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    /// `fuse_forget_in`
    ForgetIn { nlookup: u64, }
    /// `fuse_forget_one`
    ForgetOne { nodeid: u64, nlookup: u64, }
    /// `fuse_batch_forget_in`
    BatchForgetIn { count: u32, dummy: u32, }
    /// `fuse_getattr_in`
    GetattrIn { flags: u32, dummy: u32, fh: u64, }
    /// `fuse_setattr_in`
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64,
        atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// `fuse_mknod_in`
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// `fuse_mkdir_in`
    MkdirIn { mode: u32, umask: u32, }
    /// `fuse_rename_in`
    RenameIn { newdir: u64, }
    /// `fuse_rename2_in`
    Rename2In { newdir: u64, flags: u32, padding: u32, }
    /// `fuse_link_in`
    LinkIn { oldnodeid: u64, }
    /// `fuse_open_in`
    OpenIn { flags: u32, open_flags: u32, }
    /// `fuse_create_in`
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// `fuse_open_out`
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// `fuse_release_in`
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// `fuse_flush_in`
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// `fuse_read_in`
    ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// `fuse_write_in`
    WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    /// `fuse_write_out`
    WriteOut { size: u32, padding: u32, }
    /// `fuse_fsync_in`
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// The first half of `fuse_setxattr_in`, all there is without `SETXATTR_EXT`
    SetxattrIn { size: u32, flags: u32, }
    /// The second half of `fuse_setxattr_in`
    SetxattrExtIn { setxattr_flags: u32, padding: u32, }
    /// `fuse_getxattr_in`
    GetxattrIn { size: u32, padding: u32, }
    /// `fuse_getxattr_out`
    GetxattrOut { size: u32, padding: u32, }
    /// `fuse_init_in` before `INIT_EXT`
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// The rest of `fuse_init_in`
    InitExtIn { flags2: u32, unused: [u32; 11], }
    /// `fuse_init_out`
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, unused: [u32; 6],
    }
    /// `fuse_ioctl_in`
    IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    /// `fuse_ioctl_out`
    IoctlOut { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    /// `fuse_fallocate_in`
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// `fuse_lseek_in`
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// `fuse_lseek_out`
    LseekOut { offset: u64, }
    /// `fuse_copy_file_range_in`
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// `fuse_dirent` without the name
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
}

const _: () = {
    assert!(size_of::<InHeader>() == 40);
    assert!(size_of::<OutHeader>() == 16);
    assert!(size_of::<Attr>() == 88);
    assert!(size_of::<EntryOut>() == 128);
    assert!(size_of::<SetattrIn>() == 88);
    assert!(size_of::<InitOut>() == 64);
    assert!(size_of::<Statx>() == 256);
    assert!(size_of::<Kstatfs>() == 80);
};

/// Length of `value` in a reply that aligns every record to eight bytes (`FUSE_REC_ALIGN`).
pub(crate) const fn aligned(length: usize) -> usize {
    length.next_multiple_of(8)
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Opcode {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    Ioctl = 39,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Syncfs = 50,
    Tmpfile = 51,
    Statx = 52,
}

impl Opcode {
    /// The opcode with this number, if this server has it. The others are GETLK, SETLK and SETLKW
    /// (31 to 33: the guest kernel keeps locks itself), ACCESS (34: it checks permissions itself),
    /// BMAP (37), POLL (40), NOTIFY_REPLY (41: nothing is ever retrieved), SETUPMAPPING and
    /// REMOVEMAPPING (48, 49: there is no DAX window), and what is yet to be invented.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::Getattr,
            4 => Self::Setattr,
            5 => Self::Readlink,
            6 => Self::Symlink,
            8 => Self::Mknod,
            9 => Self::Mkdir,
            10 => Self::Unlink,
            11 => Self::Rmdir,
            12 => Self::Rename,
            13 => Self::Link,
            14 => Self::Open,
            15 => Self::Read,
            16 => Self::Write,
            17 => Self::Statfs,
            18 => Self::Release,
            20 => Self::Fsync,
            21 => Self::Setxattr,
            22 => Self::Getxattr,
            23 => Self::Listxattr,
            24 => Self::Removexattr,
            25 => Self::Flush,
            26 => Self::Init,
            27 => Self::Opendir,
            28 => Self::Readdir,
            29 => Self::Releasedir,
            30 => Self::Fsyncdir,
            35 => Self::Create,
            36 => Self::Interrupt,
            38 => Self::Destroy,
            39 => Self::Ioctl,
            42 => Self::BatchForget,
            43 => Self::Fallocate,
            44 => Self::Readdirplus,
            45 => Self::Rename2,
            46 => Self::Lseek,
            47 => Self::CopyFileRange,
            50 => Self::Syncfs,
            51 => Self::Tmpfile,
            52 => Self::Statx,
            _ => return None,
        })
    }

    /// Whether the kernel waits for a reply. Interrupts get none: see [`crate::Server::handle`].
    pub(crate) fn has_reply(self) -> bool {
        !matches!(self, Self::Forget | Self::BatchForget | Self::Interrupt)
    }
}

/// Bits of INIT, 64 wide: the upper half travels in `flags2`.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
}

/// `getattr_flags`: the request names an open handle.
pub(crate) const GETATTR_FH: u32 = 1 << 0;

/// `fuse_setattr_in.valid`
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags in the reply to OPEN, OPENDIR and CREATE.
pub(crate) mod fopen {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
}

/// `open_flags` of OPEN and CREATE: clear set-user-id and set-group-id when truncating.
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `write_flags`: a page that the guest's cache writes back, by any handle it found.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
/// `write_flags`: clear set-user-id and set-group-id.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `setxattr_flags`: clear set-group-id, the new ACL takes it from the caller.
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `fsync_flags`: data only.
pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
