//! Shared memory mappings of files.

use std::os::fd::AsFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{self, MapFlags, MsyncFlags, ProtFlags};

/// A file mapped for reading and writing, shared.
pub(crate) struct Mapping {
    start: *mut u8,
    length: usize,
}

impl Mapping {
    pub(crate) fn new(file: impl AsFd, length: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so nothing of ours is replaced.
        let start = unsafe {
            mm::mmap(
                ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    pub(crate) fn write(&self, offset: usize, value: u8) {
        assert!(offset < self.length);
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.start.wrapping_add(offset).write_volatile(value) };
    }

    pub(crate) fn read(&self, offset: usize) -> u8 {
        assert!(offset < self.length);
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.start.wrapping_add(offset).read_volatile() }
    }

    pub(crate) fn sync(&self) -> Result<(), Errno> {
        // SAFETY: the whole of a mapping of ours.
        unsafe { mm::msync(self.start.cast(), self.length, MsyncFlags::SYNC) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole of a mapping of ours, which nobody uses after this.
        let unmapped = unsafe { mm::munmap(self.start.cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}
