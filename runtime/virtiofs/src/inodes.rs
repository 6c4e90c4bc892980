//! The files the guest knows: each from the reply that names it first to the FORGET that gives its
//! last mention back.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::abi::ROOT_ID;
use crate::options::{CachePolicy, Options};
use crate::sys::file_handle::FileHandle;

/// What every `statx` here asks for.
pub(crate) const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// Between the inode numbers of one mount and those of another. Far from every power of two, since
/// file systems that number files in parts, such as overlayfs, use the upper bits.
const INO_STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// One file that the guest knows.
#[derive(Debug)]
pub(crate) struct Inode {
    /// Its name in requests. Never used again for another file.
    pub(crate) id: u64,
    pub(crate) kind: FileType,
    pub(crate) mount: Arc<Mount>,
    key: Key,
    reference: Reference,
    /// How often replies named it, less what was forgotten.
    lookups: AtomicU64,
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
    place: Place,
    /// An open file on it, by which handles are opened, if it has handles.
    anchor: OnceLock<Option<OwnedFd>>,
}

/// Which of the three policies of [`Options`] a mount is under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Private,
    Shared,
}

/// What makes two files the same. An inode number may be used again when the file is gone, which
/// it can't be while a descriptor holds it; where a handle does, the handle has to be equal too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    inode: u64,
}

/// What holds the file.
#[derive(Debug)]
enum Reference {
    Descriptor(OwnedFd),
    Handle(FileHandle),
}

/// An `O_PATH` descriptor of an inode, for one request.
pub(crate) enum PathFd<'a> {
    Held(BorrowedFd<'a>),
    Opened(OwnedFd),
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Inodes {
    tables: RwLock<Tables>,
    mounts: Mutex<HashMap<u64, Weak<Mount>>>,
    root: Arc<Inode>,
    next_id: AtomicU64,
    /// How many inodes are held by a descriptor.
    descriptors: AtomicUsize,
}

#[derive(Debug, Default)]
struct Tables {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<Key, Arc<Inode>>,
}

impl AsFd for PathFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(descriptor) => *descriptor,
            Self::Opened(descriptor) => descriptor.as_fd(),
        }
    }
}

impl Mount {
    /// The number by which the guest knows the file with this inode number.
    pub(crate) fn guest_ino(&self, ino: u64) -> u64 {
        ino.wrapping_add(self.ino_offset)
    }
}

impl Inode {
    /// An `O_PATH` descriptor of the file. `ESTALE` if it is gone.
    pub(crate) fn path(&self) -> Result<PathFd<'_>, Errno> {
        match &self.reference {
            Reference::Descriptor(descriptor) => Ok(PathFd::Held(descriptor.as_fd())),
            Reference::Handle(handle) => {
                let anchor = self
                    .mount
                    .anchor
                    .get()
                    .and_then(Option::as_ref)
                    .ok_or(Errno::STALE)?;
                handle.open(anchor.as_fd()).map(PathFd::Opened)
            }
        }
    }

    /// As [`Inode::path`], for a directory.
    pub(crate) fn directory(&self) -> Result<PathFd<'_>, Errno> {
        match self.kind {
            FileType::Directory => self.path(),
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
            place: Place::Root,
            anchor: OnceLock::new(),
        });
        let root = Arc::new(Inode {
            id: ROOT_ID,
            kind,
            key: Key::of(&stat),
            reference: Reference::Descriptor(root),
            lookups: AtomicU64::new(1),
            mount: Arc::clone(&mount),
        });
        let inodes = Self {
            tables: RwLock::default(),
            mounts: Mutex::new(HashMap::from([(mount.id, Arc::downgrade(&mount))])),
            root,
            next_id: AtomicU64::new(ROOT_ID),
            descriptors: AtomicUsize::new(1),
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
        let mut handle = None;
        if let Some(known) = self.mention_known(key, &file, &mut handle)? {
            return Ok(known);
        }
        let mount = self.mount(options, parent, name, stat.stx_mnt_id);
        let reference = self.reference(options, &mount, file, stat, handle)?;
        let by_descriptor = matches!(reference, Reference::Descriptor(_));
        let inode = Arc::new(Inode {
            // Numbers never run out: 2^64 at one in a nanosecond are 500 years.
            id: self.next_id.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            kind: kind(stat),
            mount,
            key,
            reference,
            lookups: AtomicU64::new(1),
        });
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tables.by_key.get(&key)
            && known.is_same(&inode.reference)
        {
            // Another thread was faster.
            known.lookups.fetch_add(1, Ordering::Relaxed);
            return Ok(Arc::clone(known));
        }
        if tables.by_id.len() >= options.inodes_max {
            return Err(Errno::NFILE);
        }
        tables.by_id.insert(inode.id, Arc::clone(&inode));
        tables.by_key.insert(key, Arc::clone(&inode));
        if by_descriptor {
            self.descriptors.fetch_add(1, Ordering::Relaxed);
        }
        Ok(inode)
    }

    /// The inode with this key, if it is known; one more mention. `handle` becomes that of `file`
    /// if it took that to know.
    fn mention_known(
        &self,
        key: Key,
        file: &OwnedFd,
        handle: &mut Option<FileHandle>,
    ) -> Result<Option<Arc<Inode>>, Errno> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = tables.by_key.get(&key) else {
            return Ok(None);
        };
        if let Reference::Handle(held) = &known.reference {
            let same = handle.insert(FileHandle::of(file.as_fd())?);
            if held != same {
                return Ok(None);
            }
        }
        known.lookups.fetch_add(1, Ordering::Relaxed);
        Ok(Some(Arc::clone(known)))
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
        drop(tables);
        if matches!(inode.reference, Reference::Descriptor(_)) {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Forgets all but the root: the guest has unmounted, or begins anew.
    pub(crate) fn forget_all(&self) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::take(&mut *tables);
        tables.by_id.insert(ROOT_ID, Arc::clone(&self.root));
        tables.by_key.insert(self.root.key, Arc::clone(&self.root));
        self.descriptors.store(1, Ordering::Relaxed);
        drop(tables);
        // Closing many descriptors takes a while: not under the lock.
        drop(old);
    }

    /// What is to hold `file`.
    fn reference(
        &self,
        options: &Options,
        mount: &Mount,
        file: OwnedFd,
        stat: &Statx,
        handle: Option<FileHandle>,
    ) -> Result<Reference, Errno> {
        let descriptors = self.descriptors.load(Ordering::Relaxed);
        // Where one file of this number was held by a handle, the next one must be too: only
        // handles tell apart what came after the other.
        if handle.is_none() && descriptors < options.inode_descriptors_max {
            return Ok(Reference::Descriptor(file));
        }
        let anchor = mount.anchor.get_or_init(|| anchor(options, &file, stat));
        if let Some(anchor) = anchor
            && let Ok(handle) = handle.map_or_else(|| FileHandle::of(file.as_fd()), Ok)
            && handle.open(anchor.as_fd()).is_ok()
        {
            return Ok(Reference::Handle(handle));
        }
        if descriptors < options.inode_descriptors_hard_max {
            return Ok(Reference::Descriptor(file));
        }
        Err(Errno::NFILE)
    }

    /// The mount with this id, on which `name` in `parent` was found.
    fn mount(&self, options: &Options, parent: &Inode, name: &CStr, id: u64) -> Arc<Mount> {
        if parent.mount.id == id {
            return Arc::clone(&parent.mount);
        }
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
            place,
            anchor: OnceLock::new(),
        });
        mounts.retain(|_, mount| mount.strong_count() > 0);
        mounts.insert(id, Arc::downgrade(&mount));
        mount
    }

    fn lock_mounts(&self) -> MutexGuard<'_, HashMap<u64, Weak<Mount>>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inode {
    /// Whether the file held by `reference`, which has this inode's key, is this inode's.
    fn is_same(&self, reference: &Reference) -> bool {
        match (&self.reference, reference) {
            (Reference::Handle(mine), Reference::Handle(other)) => mine == other,
            // While a descriptor holds the file, its number is no other's.
            (Reference::Descriptor(_), _) => true,
            (Reference::Handle(mine), Reference::Descriptor(other)) => {
                FileHandle::of(other.as_fd()).is_ok_and(|other| other == *mine)
            }
        }
    }
}

impl Key {
    fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }
}

/// Attributes of an open file, or one held by `O_PATH`.
pub(crate) fn stat(file: BorrowedFd<'_>) -> Result<Statx, Errno> {
    fs::statx(file, c"", AtFlags::EMPTY_PATH, STATX_MASK)
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

/// Opens a file for its mount's handles to be opened by.
fn anchor(options: &Options, file: &OwnedFd, stat: &Statx) -> Option<OwnedFd> {
    match kind(stat) {
        FileType::Directory | FileType::RegularFile => {
            reopen(options, file.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK).ok()
        }
        _ => None,
    }
}
