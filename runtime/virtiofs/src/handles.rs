//! Open files and directories.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::io::Errno;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    file: OwnedFd,
    /// Present in a directory: where the next entry to be read from the host is. `None` inside: not
    /// known, seek first.
    position: Option<Mutex<Option<u64>>>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    by_id: RwLock<HashMap<u64, Arc<Handle>>>,
    next_id: AtomicU64,
}

impl Handle {
    /// A regular file.
    pub(crate) fn of_file(file: OwnedFd) -> Self {
        Self {
            file,
            position: None,
        }
    }

    /// A directory.
    pub(crate) fn of_directory(file: OwnedFd) -> Self {
        Self {
            file,
            position: Some(Mutex::new(Some(0))),
        }
    }

    /// The position in a directory. `ENOTDIR` for a file.
    pub(crate) fn position(&self) -> Result<&Mutex<Option<u64>>, Errno> {
        self.position.as_ref().ok_or(Errno::NOTDIR)
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Handles {
    /// Gives `handle` a number.
    pub(crate) fn add(&self, handle: Handle, handles_max: usize) -> Result<u64, Errno> {
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        if by_id.len() >= handles_max {
            return Err(Errno::NFILE);
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        by_id.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// The handle with this number. `EBADF` if there is none.
    pub(crate) fn find(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        by_id.get(&id).cloned().ok_or(Errno::BADF)
    }

    /// As [`Handles::find`], for a file only: `EISDIR` for a directory.
    pub(crate) fn find_file(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.find(id)?;
        match handle.position {
            None => Ok(handle),
            Some(_) => Err(Errno::ISDIR),
        }
    }

    /// Ends a handle. The file is closed when no request uses it any more.
    pub(crate) fn remove(&self, id: u64) -> Result<(), Errno> {
        let removed = self
            .by_id
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        removed.map(drop).ok_or(Errno::BADF)
    }

    /// Ends all handles.
    pub(crate) fn clear(&self) {
        let old = std::mem::take(&mut *self.by_id.write().unwrap_or_else(PoisonError::into_inner));
        drop(old);
    }

    /// Number of handles.
    pub(crate) fn count(&self) -> usize {
        self.by_id
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }
}
