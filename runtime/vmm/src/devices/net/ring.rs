//! Giving several chains back at once.
//!
//! virtio-queue gives one chain back at a time, and the driver may see each as soon as it is there.
//! A frame that is spread over several chains must appear as a whole (virtio 1.2, 5.1.6.4).

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::GuestRam;

/// virtio 1.2, 2.7.6 and 2.7.8: `flags` and `idx` come before the ring.
const RING_HEADER_BYTES: u64 = 4;
const INDEX_OFFSET: u64 = 2;
const AVAIL_ENTRY_BYTES: u64 = 2;
const USED_ENTRY_BYTES: u64 = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`
const NO_INTERRUPT: u16 = 1;

/// A chain, and how many bytes were written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) head: u16,
    pub(super) bytes: usize,
}

/// Gives chains back, all at the same moment. Heads that the descriptor table does not have can't be
/// given back.
pub(super) fn give_back(
    queue: &mut Queue,
    memory: &GuestRam,
    chains: impl IntoIterator<Item = Used>,
) -> Result<(), Error> {
    let ring = GuestAddress(queue.used_ring());
    let mut next = queue.next_used();
    for used in chains {
        if used.head >= queue.size() {
            continue;
        }
        let entry = u64::from(next.checked_rem(queue.size()).unwrap_or_default());
        let at = place(ring, entry, USED_ENTRY_BYTES)?;
        let bytes = u32::try_from(used.bytes).unwrap_or(u32::MAX);
        let entry = u64::from(used.head) | (u64::from(bytes) << u32::BITS);
        memory
            .write_obj(entry.to_le(), at)
            .map_err(Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    let index = ring
        .checked_add(INDEX_OFFSET)
        .ok_or(Error::AddressOverflow)?;
    memory
        .store(next.to_le(), index, Ordering::Release)
        .map_err(Error::GuestMemory)?;
    queue.set_next_used(next);
    Ok(())
}

/// Whether the driver wants to hear of what was given back since the queue was at `before`
/// (virtio 1.2, 2.7.7).
pub(super) fn wants_interrupt(
    queue: &Queue,
    memory: &GuestRam,
    before: u16,
) -> Result<bool, Error> {
    let now = queue.next_used();
    if now == before {
        return Ok(false);
    }
    // What was given back must be seen before the driver's wish is read.
    fence(Ordering::SeqCst);
    let ring = GuestAddress(queue.avail_ring());
    let load = |at| {
        let loaded = memory.load::<u16>(at, Ordering::Relaxed);
        loaded.map(u16::from_le).map_err(Error::GuestMemory)
    };
    if queue.event_idx_enabled() {
        let event = load(place(ring, queue.size().into(), AVAIL_ENTRY_BYTES)?)?;
        let since_event = now.wrapping_sub(event).wrapping_sub(1);
        Ok(since_event < now.wrapping_sub(before))
    } else {
        Ok(load(ring)? & NO_INTERRUPT == 0)
    }
}

/// An entry of a ring, or what follows the last one.
fn place(ring: GuestAddress, entry: u64, entry_bytes: u64) -> Result<GuestAddress, Error> {
    entry
        .checked_mul(entry_bytes)
        .and_then(|offset| offset.checked_add(RING_HEADER_BYTES))
        .and_then(|offset| ring.checked_add(offset))
        .ok_or(Error::AddressOverflow)
}
