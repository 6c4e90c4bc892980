//! One request: what the driver asks for, and the byte that tells it what came of it
//! (virtio 1.2, 5.2.6).
//!
//! How a chain is cut into buffers means nothing: a header is the first 16 bytes to be read, the
//! status the last one to be written, and the data is what lies between.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::disk::{Disk, PIECES_MAX, SERIAL_BYTES_MAX, Slice, Zero};
use super::{REQUEST_BYTES_MAX, SECTOR_BYTES, ZERO_PARTS_MAX, ZERO_SECTORS_MAX};
use crate::memory::GuestRam;

/// `struct virtio_blk_req`, before its data: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const ZERO_PART_BYTES: usize = 16;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
const UNMAP: u32 = 1;

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// It failed, or makes no sense for this disk.
    Failed,
    /// This disk knows no such request.
    Unknown,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Self::Unknown,
            _ => Self::Failed,
        }
    }
}

/// Carries out the request of a chain, on a disk that is pulled out if there is none. Returns the
/// bytes written: none to a chain without a place for the status.
pub(super) fn answer(
    chain: DescriptorChain<&GuestRam>,
    memory: &GuestRam,
    disk: Option<&Disk>,
) -> usize {
    let mut request = Request::default();
    let is_whole = request.collect(chain, memory);
    let Some(status) = request.take_status() else {
        return 0;
    };
    let done = match (is_whole, disk) {
        (true, Some(disk)) => request.carry_out(disk),
        _ => Err(Refusal::Failed),
    };
    let (code, written) = match done {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Refusal::Failed) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Refusal::Unknown) => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    let code = u8::try_from(code).unwrap_or(u8::MAX);
    match status.write_obj(code, 0) {
        Ok(()) => written.saturating_add(size_of_val(&code)),
        Err(_) => 0,
    }
}

/// The buffers of a request.
#[derive(Default)]
struct Request<'m> {
    readable: Pieces<'m>,
    writable: Pieces<'m>,
}

impl<'m> Request<'m> {
    /// Takes the buffers of a chain. Whether it is one that virtio 1.2, 2.7.4 allows, and lies in
    /// guest memory; one that does not may still have a place for its status.
    fn collect(&mut self, chain: DescriptorChain<&GuestRam>, memory: &'m GuestRam) -> bool {
        let mut is_whole = true;
        for descriptor in chain {
            let list = match descriptor.is_write_only() {
                true => &mut self.writable,
                false => &mut self.readable,
            };
            let bytes = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let added = list.add(memory, descriptor.addr(), bytes);
            // virtio 1.2, 2.7.4.2: what the device reads comes first.
            let is_in_order = descriptor.is_write_only() || self.writable.is_empty();
            if added.is_none() && descriptor.is_write_only() {
                // The status would be in it, or behind it.
                self.writable.clear();
            }
            is_whole &= added.is_some() && is_in_order;
        }
        is_whole
    }

    /// The last byte to be written.
    fn take_status(&mut self) -> Option<Slice<'m>> {
        self.writable.take_last_byte()
    }

    /// Returns the bytes of data that were written.
    fn carry_out(mut self, disk: &Disk) -> Result<usize, Refusal> {
        let header = self.readable.take::<HEADER_BYTES>();
        let header = header.ok_or(Refusal::Failed)?;
        let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
        match kind {
            VIRTIO_BLK_T_IN => {
                let (bytes, place) = data(&self.writable, sector, disk)?;
                disk.read(&self.writable.list, place)?;
                Ok(bytes)
            }
            VIRTIO_BLK_T_OUT => {
                writable(disk)?;
                let (_, place) = data(&self.readable, sector, disk)?;
                disk.write(&self.readable.list, place)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH if disk.geometry().is_read_only => Ok(0),
            VIRTIO_BLK_T_FLUSH => Ok(disk.flush().map(|()| 0)?),
            VIRTIO_BLK_T_GET_ID => Ok(self.writable.fill(&serial(disk))),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                writable(disk)?;
                if !disk.geometry().can_zero {
                    return Err(Refusal::Unknown);
                }
                self.zero(disk, kind).map(|()| 0)
            }
            _ => Err(Refusal::Unknown),
        }
    }

    /// Nothing is done if any of the parts makes no sense.
    fn zero(mut self, disk: &Disk, kind: u32) -> Result<(), Refusal> {
        let bytes = self.readable.bytes();
        let parts_bytes_max = ZERO_PARTS_MAX.saturating_mul(ZERO_PART_BYTES);
        if bytes == 0 || bytes > parts_bytes_max || !bytes.is_multiple_of(ZERO_PART_BYTES) {
            return Err(Refusal::Failed);
        }
        let mut parts = Vec::new();
        while let Some(part) = self.readable.take::<ZERO_PART_BYTES>() {
            let (sector, sectors, flags) = (u64_at(&part, 0), u32_at(&part, 8), u32_at(&part, 12));
            // virtio 1.2, 5.2.6.2: neither an unknown flag nor one that the kind does not have.
            let how = match (kind, flags) {
                (VIRTIO_BLK_T_DISCARD, 0) | (VIRTIO_BLK_T_WRITE_ZEROES, UNMAP) => Zero::Free,
                (VIRTIO_BLK_T_WRITE_ZEROES, 0) => Zero::Keep,
                _ => return Err(Refusal::Unknown),
            };
            if sectors > ZERO_SECTORS_MAX {
                return Err(Refusal::Failed);
            }
            let bytes = u64::from(sectors).saturating_mul(SECTOR_BYTES);
            let place = disk.place(sector, bytes).ok_or(Refusal::Failed)?;
            parts.push((place, bytes, how));
        }
        for (place, bytes, how) in parts.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            disk.zero(place, bytes, how)?;
        }
        Ok(())
    }
}

/// The length of a request's data and its place on the disk, if it makes sense there.
fn data(pieces: &Pieces<'_>, sector: u64, disk: &Disk) -> Result<(usize, i64), Refusal> {
    let bytes = pieces.bytes();
    let sector_bytes = usize::try_from(SECTOR_BYTES).unwrap_or(usize::MAX);
    if bytes > REQUEST_BYTES_MAX || !bytes.is_multiple_of(sector_bytes) {
        return Err(Refusal::Failed);
    }
    let place = disk.place(sector, bytes as u64).ok_or(Refusal::Failed)?;
    Ok((bytes, place))
}

/// virtio 1.2, 5.2.6.2: a write to a device that is read-only fails.
fn writable(disk: &Disk) -> Result<(), Refusal> {
    match disk.geometry().is_read_only {
        true => Err(Refusal::Failed),
        false => Ok(()),
    }
}

fn serial(disk: &Disk) -> [u8; SERIAL_BYTES_MAX] {
    let mut padded = [0; SERIAL_BYTES_MAX];
    for (place, byte) in padded.iter_mut().zip(disk.geometry().serial.bytes()) {
        *place = byte;
    }
    padded
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().map_or(0, u64::from_le_bytes)
}

/// Pieces of guest memory, one after the other.
#[derive(Default)]
struct Pieces<'m> {
    list: Vec<Slice<'m>>,
}

impl<'m> Pieces<'m> {
    /// Adds all of a buffer, or nothing.
    fn add(
        &mut self,
        memory: &'m GuestRam,
        start: vm_memory::GuestAddress,
        bytes: usize,
    ) -> Option<()> {
        let before = self.list.len();
        let add = |list: &mut Vec<Slice<'m>>| {
            for piece in GuestMemoryBackend::get_slices(memory, start, bytes) {
                if list.len() >= PIECES_MAX {
                    return None;
                }
                list.push(piece.ok()?);
            }
            Some(())
        };
        let added = add(&mut self.list);
        if added.is_none() {
            self.list.truncate(before);
        }
        added
    }

    fn clear(&mut self) {
        self.list.clear();
    }

    fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    fn bytes(&self) -> usize {
        let sum = |sum: usize, piece: &Slice<'_>| sum.saturating_add(piece.len());
        self.list.iter().fold(0, sum)
    }

    /// Takes bytes off the front; none if there are fewer.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.bytes() < N {
            return None;
        }
        let mut taken = [0; N];
        let mut done = 0_usize;
        while done < N {
            let piece = self.list.first()?;
            let rest = taken.get_mut(done..)?;
            let step = rest.len().min(piece.len());
            piece.read_slice(rest.get_mut(..step)?, 0).ok()?;
            let left = piece.offset(step).ok()?;
            match left.is_empty() {
                true => drop(self.list.remove(0)),
                false => *self.list.first_mut()? = left,
            }
            done = done.saturating_add(step);
        }
        Some(taken)
    }

    fn take_last_byte(&mut self) -> Option<Slice<'m>> {
        while self.list.last()?.is_empty() {
            self.list.pop();
        }
        let last = self.list.pop()?;
        let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
        if !rest.is_empty() {
            self.list.push(rest);
        }
        Some(byte)
    }

    /// Writes as much as there is room for. Returns how much that is.
    fn fill(&self, bytes: &[u8]) -> usize {
        let mut done = 0_usize;
        for piece in &self.list {
            let rest = bytes.get(done..).unwrap_or_default();
            let step = rest.len().min(piece.len());
            let written = piece.write_slice(rest.get(..step).unwrap_or_default(), 0);
            if written.is_err() {
                break;
            }
            done = done.saturating_add(step);
        }
        done
    }
}
