//! The files the guest knows: each from the reply that names it first to the FORGET that gives its
//! last mention back.
//!
//! Each is held by a descriptor. File handles (`open_by_handle_at(2)`) would cost none, but whoever
//! may open them may open any file of the file system, in the share or not: with
//! `CAP_DAC_READ_SEARCH` there is no jail.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use rustix::fs::{self, AtFlags, FileType, FsWord, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::abi::ROOT_ID;
use crate::contents::Contents;
use crate::options::{CachePolicy, Options};

/// What every `statx` here asks for.
pub(crate) const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// Between the inode numbers of one mount and those of another. Far from every power of two, since
/// file systems that number files in parts, such as overlayfs, use the upper bits.
const INO_STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// The same between those of one device and of another on the same mount.
const DEVICE_STRIDE: u64 = 0xd1b5_4a32_d192_ed03;

/// One file that the guest knows.
#[derive(Debug)]
pub(crate) struct Inode {
    /// Its name in requests. Never used again for another file.
    pub(crate) id: u64,
    pub(crate) kind: FileType,
    pub(crate) mount: Arc<Mount>,
    key: Key,
    /// An `O_PATH` descriptor of it.
    file: OwnedFd,
    /// How often replies named it, less what was forgotten.
    lookups: AtomicU64,
    pub(crate) contents: Contents,
}

/// A mount that files known to the guest are on. It goes with the last of them, so that the host
/// can unmount it.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    pub(crate) policy: CachePolicy,
    /// Added to the inode numbers of its files.
    ///
    /// The guest sees one file system, where the host may have several: equal numbers on two of
    /// them must not look like one file. Linux has submounts for that (FUSE_SUBMOUNTS), but checks
    /// no POSIX ACLs on them, since their superblocks lack SB_POSIXACL: whom an ACL shuts out
    /// would be let in.
    ino_offset: u64,
    /// Of the first of its files that was named, as a rule its root. Others have it too, but for
    /// subvolumes of btrfs and for overlayfs over several file systems.
    device: Device,
    place: Place,
    /// Its files are made as they are read, and their size says nothing.
    pub(crate) is_generated: bool,
}

/// Which of the three policies of [`Options`] a mount is under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Private,
    Shared,
}

/// What makes two files the same. An inode number may be used again when the file is gone, which
/// it can't be while a descriptor holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: Device,
    inode: u64,
}

/// Major and minor number.
type Device = (u32, u32);

/// All of them.
#[derive(Debug)]
pub(crate) struct Inodes {
    tables: RwLock<Tables>,
    mounts: Mutex<HashMap<u64, Weak<Mount>>>,
    root: Arc<Inode>,
    next_id: AtomicU64,
}

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, Arc<Inode>>,
}

impl Mount {
    /// The number by which the guest knows the file with this inode number on this device.
    pub(crate) fn guest_ino(&self, device: Device, ino: u64) -> u64 {
        let (major, minor) = device;
        let device_offset = match device == self.device {
            true => 0,
            false => (u64::from(major) << 32 | u64::from(minor)).wrapping_mul(DEVICE_STRIDE),
        };
        ino.wrapping_add(self.ino_offset)
            .wrapping_add(device_offset)
    }
}

impl Inode {
    /// An `O_PATH` descriptor of the file.
    pub(crate) fn path(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The device it is on.
    pub(crate) fn device(&self) -> Device {
        self.key.device
    }

    /// As [`Inode::path`], for a directory.
    pub(crate) fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        match self.kind {
            FileType::Directory => Ok(self.path()),
            _ => Err(Errno::NOTDIR),
        }
    }
}

impl Inodes {
    /// Only the root, which is never forgotten.
    pub(crate) fn new(root: OwnedFd, options: &Options) -> Result<Self, Errno> {
        let stat = stat(root.as_fd())?;
        let kind = kind(&stat);
        if kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let mount = Arc::new(Mount {
            id: stat.stx_mnt_id,
            policy: options.root,
            ino_offset: 0,
            device: device(&stat),
            place: Place::Root,
            is_generated: is_generated(root.as_fd()),
        });
        let root = Arc::new(Inode {
            id: ROOT_ID,
            kind,
            key: Key::of(&stat),
            file: root,
            lookups: AtomicU64::new(1),
            contents: Contents::default(),
            mount: Arc::clone(&mount),
        });
        let inodes = Self {
            tables: RwLock::default(),
            mounts: Mutex::new(HashMap::from([(mount.id, Arc::downgrade(&mount))])),
            root,
            next_id: AtomicU64::new(ROOT_ID),
        };
        inodes.forget_all();
        Ok(inodes)
    }

    /// The file that a request names. `ESTALE` if there is none.
    pub(crate) fn find(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        if id == ROOT_ID {
            return Ok(Arc::clone(&self.root));
        }
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.by_id.get(&id).cloned().ok_or(Errno::STALE)
    }

    /// Number of files known.
    pub(crate) fn count(&self) -> usize {
        self.tables
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .by_id
            .len()
    }

    /// The inode of the file behind `file`, an `O_PATH` descriptor that was just found in
    /// `parent` by the name `name`. Counts as one mention.
    pub(crate) fn mention(
        &self,
        options: &Options,
        parent: &Inode,
        name: &CStr,
        file: OwnedFd,
        stat: &Statx,
    ) -> Result<Arc<Inode>, Errno> {
        let key = Key::of(stat);
        if let Some(known) = self.mention_known(key) {
            return Ok(known);
        }
        let mount = self.mount(options, parent, name, &file, stat);
        let inode = Arc::new(Inode {
            // Numbers never run out: 2^64 at one in a nanosecond are 500 years.
            id: self.next_id.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            kind: kind(stat),
            mount,
            key,
            file,
            lookups: AtomicU64::new(1),
            contents: Contents::default(),
        });
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tables.by_key.get(&key) {
            // Another thread was faster.
            known.lookups.fetch_add(1, Ordering::Relaxed);
            return Ok(Arc::clone(known));
        }
        if tables.by_id.len() >= options.inodes_max {
            return Err(Errno::NFILE);
        }
        tables.by_id.insert(inode.id, Arc::clone(&inode));
        tables.by_key.insert(key, Arc::clone(&inode));
        Ok(inode)
    }

    /// The inode with this key, if it is known; one more mention.
    fn mention_known(&self, key: Key) -> Option<Arc<Inode>> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let known = tables.by_key.get(&key)?;
        known.lookups.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(known))
    }

    /// Takes `count` mentions of `id` back. More than there were are taken as all of them.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let Ok(inode) = self.find(id) else { return };
        if id == ROOT_ID {
            return;
        }
        let less = |now: u64| Some(now.saturating_sub(count));
        let before = inode
            .lookups
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        if before.unwrap_or(0) > count {
            return;
        }
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        // A mention takes the table's lock to be made: if there is none now, there can't be.
        if inode.lookups.load(Ordering::Relaxed) != 0 || tables.by_id.remove(&id).is_none() {
            return;
        }
        if tables
            .by_key
            .get(&inode.key)
            .is_some_and(|now| now.id == id)
        {
            tables.by_key.remove(&inode.key);
        }
    }

    /// Forgets all but the root: the guest has unmounted, or begins anew.
    pub(crate) fn forget_all(&self) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::take(&mut *tables);
        tables.by_id.insert(ROOT_ID, Arc::clone(&self.root));
        tables.by_key.insert(self.root.key, Arc::clone(&self.root));
        drop(tables);
        // Closing many descriptors takes a while: not under the lock.
        drop(old);
    }

    /// The mount on which `file` was found as `name` in `parent`.
    fn mount(
        &self,
        options: &Options,
        parent: &Inode,
        name: &CStr,
        file: &OwnedFd,
        stat: &Statx,
    ) -> Arc<Mount> {
        let id = stat.stx_mnt_id;
        if parent.mount.id == id {
            return Arc::clone(&parent.mount);
        }
        // Before the lock is taken: it may ask a server far away.
        let is_generated = is_generated(file.as_fd());
        let mut mounts = self.lock_mounts();
        if let Some(known) = mounts.get(&id).and_then(Weak::upgrade) {
            return known;
        }
        let is_private = || options.private_mount.as_deref() == Some(name);
        let place = match parent.mount.place {
            Place::Root if is_private() => Place::Private,
            Place::Root | Place::Shared => Place::Shared,
            Place::Private => Place::Private,
        };
        let policy = match place {
            Place::Root => options.root,
            Place::Private => options.private,
            Place::Shared => options.shared,
        };
        // A container's root keeps its numbers: it is alone with its volumes, and programs that can
        // only take 32 bits may be in it.
        let is_root_of_container = parent.mount.place == Place::Root && place == Place::Private;
        let mount = Arc::new(Mount {
            id,
            policy,
            ino_offset: match is_root_of_container {
                true => 0,
                false => id.wrapping_sub(self.root.mount.id).wrapping_mul(INO_STRIDE),
            },
            device: device(stat),
            place,
            is_generated,
        });
        mounts.retain(|_, mount| mount.strong_count() > 0);
        mounts.insert(id, Arc::downgrade(&mount));
        mount
    }

    fn lock_mounts(&self) -> MutexGuard<'_, HashMap<u64, Weak<Mount>>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Key {
    fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: device(stat),
            inode: stat.stx_ino,
        }
    }
}

/// Attributes of an open file, or one held by `O_PATH`.
pub(crate) fn stat(file: BorrowedFd<'_>) -> Result<Statx, Errno> {
    fs::statx(file, c"", AtFlags::EMPTY_PATH, STATX_MASK)
}

/// The device that a file is on.
pub(crate) fn device(stat: &Statx) -> Device {
    (stat.stx_dev_major, stat.stx_dev_minor)
}

/// linux/magic.h: file systems of the kernel's own, whose files say that they are empty, or a page
/// long, and are not.
const GENERATED: [FsWord; 8] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x7472_6163, // tracefs
    0x6462_6720, // debugfs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
];

fn is_generated(file: BorrowedFd<'_>) -> bool {
    fs::fstatfs(file).is_ok_and(|found| GENERATED.contains(&found.f_type))
}

/// The type of a file.
pub(crate) fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// Opens what `file`, an `O_PATH` descriptor, stands for. The caller has made sure that it is a
/// regular file or a directory: opening anything else does things.
pub(crate) fn reopen(
    options: &Options,
    file: BorrowedFd<'_>,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let name = DecInt::from_fd(file);
    fs::openat(
        &options.proc_self_fd,
        name.as_c_str(),
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &CStr) -> OwnedFd {
        fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn equal_numbers_on_two_devices_of_a_mount_are_different_to_the_guest() {
        let options = Options::single(open(c"/proc/self/fd"), CachePolicy::SHARED);
        let inodes = Inodes::new(open(c"/"), &options).unwrap();
        let root = inodes.find(ROOT_ID).unwrap();
        let (major, minor) = root.device();
        let others = [(major, minor ^ 1), (major ^ 1, minor), (major, minor ^ 2)];

        let mut numbers = others.map(|device| root.mount.guest_ino(device, 256));

        // What is on the device of the mount's root keeps its number.
        assert_eq!(root.mount.guest_ino(root.device(), 256), 256);
        assert!(!numbers.contains(&256));
        numbers.sort_unstable();
        assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
