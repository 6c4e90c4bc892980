//! The file behind a disk: bytes between it and guest memory.
//!
//! The only module of the device with unsafe code: system calls on iovecs that point into guest
//! memory, to which no Rust reference may exist.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::FallocateFlags;
use vm_memory::VolatileSlice;

use super::SECTOR_BYTES;

/// A piece of guest memory.
pub(super) type Slice<'m> = VolatileSlice<'m, ()>;

/// Most pieces of one request (`IOV_MAX`).
pub(super) const PIECES_MAX: usize = 1024;

/// Longest serial number (virtio 1.2, 5.2.6).
pub const SERIAL_BYTES_MAX: usize = 20;

/// The smallest and the largest block that Linux can work with.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=4096;

/// What a disk is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Its size. What is left of a block at the end, the guest does not see.
    pub bytes: u64,
    /// Its smallest unit, a power of two.
    pub block_bytes: u32,
    /// The guest may not write to it. The descriptor should not be open for writing either.
    pub is_read_only: bool,
    /// The host can free parts of it, which then read as zeros.
    pub can_zero: bool,
    /// The name by which the guest knows it.
    pub serial: String,
}

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DiskError {
    /// No block fits, or no file can be as large.
    #[error("a disk can't have {bytes} bytes in blocks of {block_bytes}")]
    Size {
        /// Of the disk.
        bytes: u64,
        /// Of its blocks.
        block_bytes: u32,
    },
    /// Not a size that Linux can work with.
    #[error("a disk can't have blocks of {block_bytes} bytes")]
    Block {
        /// Of its blocks.
        block_bytes: u32,
    },
    /// Empty, too long, or not made of letters.
    #[error("the serial number {serial:?} is not 1 to {SERIAL_BYTES_MAX} letters and digits")]
    Serial {
        /// What was given.
        serial: String,
    },
}

/// A disk that is plugged in.
#[derive(Debug)]
pub(super) struct Disk {
    file: OwnedFd,
    geometry: Geometry,
}

/// How the bytes of a part of a disk are done away with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zero {
    /// The host may free what holds them.
    Free,
    /// The host keeps room for them.
    Keep,
}

impl Disk {
    pub(super) fn new(file: OwnedFd, geometry: Geometry) -> Result<Self, DiskError> {
        let Geometry {
            bytes, block_bytes, ..
        } = geometry;
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(DiskError::Block { block_bytes });
        }
        if bytes < u64::from(block_bytes) || i64::try_from(bytes).is_err() {
            return Err(DiskError::Size { bytes, block_bytes });
        }
        let serial = &geometry.serial;
        let is_word = serial.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX || !is_word {
            let serial = serial.clone();
            return Err(DiskError::Serial { serial });
        }
        Ok(Self { file, geometry })
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its size in sectors, whole blocks only.
    pub(super) fn sectors(&self) -> u64 {
        let block_bytes = u64::from(self.geometry.block_bytes);
        let left = self.geometry.bytes.checked_rem(block_bytes);
        let whole = self.geometry.bytes.saturating_sub(left.unwrap_or_default());
        whole.checked_div(SECTOR_BYTES).unwrap_or_default()
    }

    /// The place in the file of `bytes` from a sector on, if the disk has all of them.
    pub(super) fn place(&self, sector: u64, bytes: u64) -> Option<i64> {
        let start = sector.checked_mul(SECTOR_BYTES)?;
        let end = start.checked_add(bytes)?;
        let size = self.sectors().checked_mul(SECTOR_BYTES)?;
        (end <= size).then_some(i64::try_from(start).ok()?)
    }

    /// Fills guest memory from `place` on.
    pub(super) fn read(&self, into: &[Slice<'_>], place: i64) -> io::Result<()> {
        transfer(into, place, |parts, count, at| {
            // SAFETY: the parts lie in guest memory that `into` borrows; the kernel writes only
            // there, and Rust holds no reference to it.
            unsafe { libc::preadv(self.file.as_raw_fd(), parts, count, at) }
        })
    }

    /// Writes guest memory to `place`.
    pub(super) fn write(&self, from: &[Slice<'_>], place: i64) -> io::Result<()> {
        transfer(from, place, |parts, count, at| {
            // SAFETY: the parts lie in guest memory that `from` borrows, and the kernel only reads
            // it.
            unsafe { libc::pwritev(self.file.as_raw_fd(), parts, count, at) }
        })
    }

    /// Returns when all that was written is safe from a loss of power.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.file.as_fd())?)
    }

    /// Makes bytes zero.
    pub(super) fn zero(&self, place: i64, bytes: u64, how: Zero) -> io::Result<()> {
        let mode = match how {
            Zero::Free => FallocateFlags::PUNCH_HOLE,
            Zero::Keep => FallocateFlags::ZERO_RANGE,
        };
        let mode = mode | FallocateFlags::KEEP_SIZE;
        let offset = u64::try_from(place).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(rustix::fs::fallocate(
            self.file.as_fd(),
            mode,
            offset,
            bytes,
        )?)
    }
}

/// Moves all bytes of the slices, in as many calls as it takes.
fn transfer(
    slices: &[Slice<'_>],
    place: i64,
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut parts: Vec<libc::iovec> = slices
        .iter()
        .take(PIECES_MAX)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect();
    let (mut rest, mut place) = (parts.as_mut_slice(), place);
    loop {
        rest = without_empty(rest);
        if rest.is_empty() {
            return Ok(());
        }
        let count = libc::c_int::try_from(rest.len()).unwrap_or(libc::c_int::MAX);
        let Ok(mut done) = usize::try_from(call(rest.as_ptr(), count, place)) else {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => continue,
                _ => return Err(error),
            }
        };
        if done == 0 {
            // The file has become shorter than it was when it was plugged in.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        place = place.saturating_add(i64::try_from(done).unwrap_or(i64::MAX));
        for part in rest.iter_mut() {
            let step = done.min(part.iov_len);
            part.iov_base = part.iov_base.wrapping_byte_add(step);
            part.iov_len = part.iov_len.saturating_sub(step);
            done = done.saturating_sub(step);
        }
    }
}

/// What follows the parts that are used up.
fn without_empty(parts: &mut [libc::iovec]) -> &mut [libc::iovec] {
    let used = parts.iter().take_while(|part| part.iov_len == 0).count();
    parts.get_mut(used..).unwrap_or_default()
}
