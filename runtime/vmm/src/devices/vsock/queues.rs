//! Packets in virtqueues: where a header and a payload lie in the driver's descriptors.
//!
//! Descriptors are input: any number of any length anywhere, changed while we look. A chain is
//! turned into checked pieces of guest memory once, and only those are used afterwards.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::io;
use std::os::fd::BorrowedFd;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::io::Slice;
use super::packet::{HEADER_BYTES, Header};
use crate::device::{Interrupt, ReadyQueue};
use crate::devices::fd::borrow;
use crate::memory::GuestRam;

/// Most descriptors of a chain that are looked at. Linux needs one for the header and one per
/// page fragment of a socket buffer, at most 45 of them (`CONFIG_MAX_SKB_FRAGS`).
const DESCRIPTORS_MAX: usize = 128;

/// Most rx buffers filled by one read of a source. Linux offers buffers of 4 KiB.
const READ_BUFFERS_MAX: usize = 32;

/// A packet of the guest.
pub(super) struct Incoming<'m> {
    pub(super) header: Header,
    /// Exactly as many bytes as the header says.
    pub(super) payload: Vec<Slice<'m>>,
}

/// Why a tx chain is no packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// Less than a header, or it lies outside of guest memory.
    Header,
    /// The header is fine, the payload is not all there.
    Payload(Header),
}

/// What came of an attempt to fill rx buffers from a source.
pub(super) enum Filled {
    /// The driver has no buffers for us.
    NoBuffers,
    /// The source was read; zero is its end.
    Bytes(usize),
    /// The source could not be read. No buffer is lost.
    Failed(io::Error),
}

/// One of the device's queues.
pub(super) struct PacketQueue<'m> {
    queue: Queue,
    kick: EventFd,
    memory: &'m GuestRam,
    interrupt: Interrupt,
    has_used: bool,
}

struct RxBuffer<'m> {
    head: u16,
    header: Vec<Slice<'m>>,
    payload: Vec<Slice<'m>>,
    payload_bytes: usize,
}

impl<'m> PacketQueue<'m> {
    pub(super) fn new(ready: ReadyQueue, memory: &'m GuestRam, has_event_idx: bool) -> Self {
        let mut queue = ready.queue;
        queue.set_event_idx(has_event_idx);
        Self {
            queue,
            kick: ready.kick,
            memory,
            interrupt: ready.interrupt,
            has_used: false,
        }
    }

    /// Readable when the driver has kicked.
    pub(super) fn kick(&self) -> BorrowedFd<'_> {
        borrow(&self.kick)
    }

    /// The number of chains that a loop over the queue may look at before it must look at
    /// something else: the driver may add chains as fast as we use them.
    pub(super) fn fair_share(&self) -> u16 {
        self.queue.size()
    }

    /// Asks the driver for kicks. Whether chains are there already.
    pub(super) fn enable_kicks(&mut self) -> Result<bool, virtio_queue::Error> {
        self.queue.enable_notification(self.memory)
    }

    /// Tells the driver that kicks are of no use now.
    pub(super) fn disable_kicks(&mut self) -> Result<(), virtio_queue::Error> {
        self.queue.disable_notification(self.memory)
    }

    /// Interrupts the driver if it wants to know what has been used since the last call.
    pub(super) fn signal(&mut self) -> Result<(), virtio_queue::Error> {
        if std::mem::take(&mut self.has_used) && self.queue.needs_notification(self.memory)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// The next packet of the guest; its memory stays ours until [`Self::finish`].
    #[expect(
        clippy::type_complexity,
        reason = "each layer of it is a different failure"
    )]
    pub(super) fn receive(
        &mut self,
    ) -> Result<Option<(u16, Result<Incoming<'m>, Malformed>)>, virtio_queue::Error> {
        let Some(chain) = self.pop()? else {
            return Ok(None);
        };
        let head = chain.head_index();
        Ok(Some((head, parse(chain, self.memory))))
    }

    /// Gives a chain back that nothing was written to.
    pub(super) fn finish(&mut self, head: u16) -> Result<(), virtio_queue::Error> {
        self.give_back(head, 0)
    }

    /// Sends a packet without payload. False if the driver has no buffer for it.
    pub(super) fn send(&mut self, header: &Header) -> Result<bool, virtio_queue::Error> {
        let Some(buffer) = self.pop_buffer(true)? else {
            return Ok(false);
        };
        store(&buffer.header, &header.encode());
        self.give_back(buffer.head, HEADER_BYTES)?;
        Ok(true)
    }

    /// Lets `read` fill the payload of as many buffers as `bytes_max` needs, in one call, and
    /// sends each with a copy of `header`.
    pub(super) fn fill(
        &mut self,
        header: &Header,
        bytes_max: usize,
        read: impl FnOnce(&[Slice<'m>]) -> io::Result<usize>,
    ) -> Result<Filled, virtio_queue::Error> {
        let mut buffers: Vec<RxBuffer<'m>> = Vec::new();
        let mut payload = Vec::new();
        let mut room = 0_usize;
        while room < bytes_max && buffers.len() < READ_BUFFERS_MAX {
            let Some(buffer) = self.pop_buffer(buffers.is_empty())? else {
                break;
            };
            payload.extend_from_slice(&buffer.payload);
            room = room.saturating_add(buffer.payload_bytes);
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            return Ok(Filled::NoBuffers);
        }
        let (payload, _) = split(payload, bytes_max);
        let result = read(&payload);
        let mut left = *result.as_ref().unwrap_or(&0);
        let mut unused = 0_usize;
        for buffer in buffers {
            let bytes = left.min(buffer.payload_bytes);
            left = left.saturating_sub(bytes);
            if bytes == 0 {
                unused = unused.saturating_add(1);
                continue;
            }
            let payload_bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            let header = Header {
                payload_bytes,
                ..*header
            };
            store(&buffer.header, &header.encode());
            self.give_back(buffer.head, HEADER_BYTES.saturating_add(bytes))?;
        }
        for _ in 0..unused {
            self.queue.go_to_previous_position();
        }
        Ok(result.map_or_else(Filled::Failed, Filled::Bytes))
    }

    /// The next rx buffer with room for a header and a byte of payload. Those that can't be used
    /// go back to the driver empty; if `may_discard` is false, one of them ends the search, so
    /// that buffers popped before it can still be put back.
    fn pop_buffer(
        &mut self,
        may_discard: bool,
    ) -> Result<Option<RxBuffer<'m>>, virtio_queue::Error> {
        for _ in 0..self.queue.size() {
            let Some(chain) = self.pop()? else {
                return Ok(None);
            };
            let head = chain.head_index();
            let pieces = gather(chain, self.memory, Access::DeviceWrites);
            let (header, payload) = split(pieces.unwrap_or_else(|Incomplete(p)| p), HEADER_BYTES);
            let payload_bytes = total(&payload);
            if total(&header) == HEADER_BYTES && payload_bytes > 0 {
                return Ok(Some(RxBuffer {
                    head,
                    header,
                    payload,
                    payload_bytes,
                }));
            }
            if !may_discard {
                self.queue.go_to_previous_position();
                return Ok(None);
            }
            self.give_back(head, 0)?;
        }
        Ok(None)
    }

    fn pop(&mut self) -> Result<Option<DescriptorChain<&'m GuestRam>>, virtio_queue::Error> {
        Ok(self.queue.iter(self.memory)?.next())
    }

    fn give_back(&mut self, head: u16, bytes: usize) -> Result<(), virtio_queue::Error> {
        self.has_used = true;
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        match self.queue.add_used(self.memory, head, bytes) {
            // A head outside of the table can't be given back, and the driver that made it up
            // does not miss it.
            Err(virtio_queue::Error::InvalidDescriptorIndex) => Ok(()),
            result => result,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    DeviceReads,
    DeviceWrites,
}

/// Takes a tx chain apart.
fn parse<'m>(
    chain: DescriptorChain<&'m GuestRam>,
    memory: &'m GuestRam,
) -> Result<Incoming<'m>, Malformed> {
    let (pieces, is_whole) = match gather(chain, memory, Access::DeviceReads) {
        Ok(pieces) => (pieces, true),
        Err(Incomplete(pieces)) => (pieces, false),
    };
    let (header, rest) = split(pieces, HEADER_BYTES);
    if total(&header) != HEADER_BYTES {
        return Err(Malformed::Header);
    }
    let header = Header::parse(&load(&header));
    let payload_bytes = usize::try_from(header.payload_bytes).unwrap_or(usize::MAX);
    let (payload, _) = split(rest, payload_bytes);
    if !is_whole || total(&payload) != payload_bytes {
        return Err(Malformed::Payload(header));
    }
    Ok(Incoming { header, payload })
}

/// A chain with an end that can't be used, and what comes before it.
struct Incomplete<'m>(Vec<Slice<'m>>);

/// The memory that a chain describes.
fn gather<'m>(
    chain: DescriptorChain<&'m GuestRam>,
    memory: &'m GuestRam,
    access: Access,
) -> Result<Vec<Slice<'m>>, Incomplete<'m>> {
    let mut pieces = Vec::with_capacity(2);
    let mut count = 0_usize;
    for descriptor in chain {
        count = count.saturating_add(1);
        let is_for_device_to_write = descriptor.is_write_only();
        if count > DESCRIPTORS_MAX || is_for_device_to_write != (access == Access::DeviceWrites) {
            return Err(Incomplete(pieces));
        }
        let bytes = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        for piece in memory.get_slices(descriptor.addr(), bytes) {
            match piece {
                Ok(piece) => pieces.push(piece),
                Err(_) => return Err(Incomplete(pieces)),
            }
        }
    }
    Ok(pieces)
}

/// The first `at` bytes of some pieces, or all there are, and the rest.
pub(super) fn split(pieces: Vec<Slice<'_>>, at: usize) -> (Vec<Slice<'_>>, Vec<Slice<'_>>) {
    let mut before = Vec::with_capacity(pieces.len());
    let mut after = Vec::with_capacity(pieces.len());
    let mut left = at;
    for piece in pieces {
        let bytes = left.min(piece.len());
        left = left.saturating_sub(bytes);
        // `bytes` is at most the length, which is all that `split_at` asks for.
        if let Ok((head, tail)) = piece.split_at(bytes) {
            before.extend((!head.is_empty()).then_some(head));
            after.extend((!tail.is_empty()).then_some(tail));
        }
    }
    (before, after)
}

/// The bytes that some pieces hold.
pub(super) fn total(pieces: &[Slice<'_>]) -> usize {
    pieces
        .iter()
        .fold(0, |sum, piece| piece.len().saturating_add(sum))
}

/// Copies a header out of guest memory.
fn load(pieces: &[Slice<'_>]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let mut rest = bytes.as_mut_slice();
    for piece in pieces {
        let copied = piece.copy_to(rest);
        rest = rest.get_mut(copied..).unwrap_or_default();
    }
    bytes
}

/// Copies a header into guest memory.
fn store(pieces: &[Slice<'_>], bytes: &[u8; HEADER_BYTES]) {
    let mut rest = bytes.as_slice();
    for piece in pieces {
        piece.copy_from(rest);
        rest = rest.get(piece.len()..).unwrap_or_default();
    }
}
