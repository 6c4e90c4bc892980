//! From the tap to the guest.
//!
//! The tap hands out whole frames and cuts what does not fit, so it is read straight into guest
//! memory only while the buffers there hold the longest of frames. With fewer, the frame goes to memory
//! of our own first and waits there until there are enough.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Used, give_back, wants_interrupt};
use super::tap::{Iovecs, Moved, PIECES_MAX, Slice, Tap};
use super::{
    Counters, FRAME_BYTES_MAX, FRAMES_PER_TURN_MAX, HEADER_BYTES, Next, RECEIVE_QUEUE, broken,
};
use crate::device::{DeviceError, ReadyQueue};
use crate::memory::GuestRam;

/// Most pieces of one buffer. Linux makes them of one.
const BUFFER_PIECES_MAX: usize = 64;

/// Buffers are taken from the queue up to this many pieces, so that one more always fits.
const PIECES_WANTED_MAX: usize = PIECES_MAX.saturating_sub(BUFFER_PIECES_MAX);

/// For a frame that is read before there are buffers for it.
const HOLDER_BYTES: usize = FRAME_BYTES_MAX.saturating_add(1);

/// virtio 1.2, 5.1.6: where `num_buffers` is in the header.
const COUNT_OFFSET: usize = 10;

/// The queue of buffers for what the guest receives.
pub(super) struct Receive<'m> {
    ready: ReadyQueue,
    memory: &'m GuestRam,
    counters: &'m Counters,
    /// A frame may be spread over several buffers.
    is_mergeable: bool,
    /// Taken from the queue, in order, and not used yet.
    buffers: VecDeque<Buffer>,
    /// Of all buffers, in order.
    pieces: Vec<Slice<'m>>,
    /// Bytes of all buffers.
    room: usize,
    iovecs: Iovecs,
    /// A frame that waits for buffers: its length, and where it is.
    held: Option<usize>,
    holder: Vec<u8>,
}

/// One chain.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    bytes: usize,
    pieces: usize,
}

impl<'m> Receive<'m> {
    pub(super) fn new(
        ready: ReadyQueue,
        memory: &'m GuestRam,
        is_mergeable: bool,
        counters: &'m Counters,
    ) -> Self {
        Self {
            ready,
            memory,
            counters,
            is_mergeable,
            buffers: VecDeque::new(),
            pieces: Vec::new(),
            room: 0,
            iovecs: Iovecs::default(),
            held: None,
            holder: Vec::new(),
        }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.ready.kick
    }

    /// Passes on what there is, up to [`FRAMES_PER_TURN_MAX`].
    pub(super) fn take_turn(&mut self, tap: Option<&Tap>) -> Result<Next, DeviceError> {
        let Some(tap) = tap else {
            return Ok(Next::Nothing);
        };
        let before = self.ready.queue.next_used();
        let next = self.receive_frames(tap);
        let queue = &self.ready.queue;
        if wants_interrupt(queue, self.memory, before).map_err(broken(RECEIVE_QUEUE))? {
            self.ready.interrupt.signal_used();
        }
        next.map_err(broken(RECEIVE_QUEUE))
    }

    fn receive_frames(&mut self, tap: &Tap) -> Result<Next, virtio_queue::Error> {
        self.ready.queue.disable_notification(self.memory)?;
        for _ in 0..FRAMES_PER_TURN_MAX {
            self.take_buffers()?;
            if let Some(bytes) = self.held {
                if bytes > self.room_for_one() && !self.is_hopeless() {
                    if self.has_to_wait()? {
                        return Ok(Next::Kick);
                    }
                    continue;
                }
                self.deliver_held(bytes)?;
                continue;
            }
            if self.buffers.is_empty() {
                if self.has_to_wait()? {
                    return Ok(Next::Kick);
                }
                continue;
            }
            let is_direct = self.room_for_one() >= FRAME_BYTES_MAX;
            let moved = if is_direct {
                tap.read(&self.pieces, &mut self.iovecs)
            } else {
                // One more, to tell a frame that was cut.
                self.holder.resize(HOLDER_BYTES, 0);
                tap.read_bytes(&mut self.holder)
            };
            match moved {
                // Without a packet, or longer than any that this system makes.
                Moved::Bytes(bytes) if bytes <= HEADER_BYTES || bytes > FRAME_BYTES_MAX => {
                    self.counters.drop_frame();
                }
                Moved::Bytes(bytes) if is_direct => self.deliver(bytes)?,
                Moved::Bytes(bytes) => self.held = Some(bytes),
                Moved::Nothing => return Ok(Next::Frames),
                Moved::Refused => self.counters.drop_frame(),
                Moved::Gone => return Ok(Next::Nothing),
            }
        }
        Ok(Next::Turn)
    }

    /// Bytes that one frame may have now.
    fn room_for_one(&self) -> usize {
        match self.is_mergeable {
            true => self.room,
            false => self.buffers.front().map_or(0, |buffer| buffer.bytes),
        }
    }

    /// More buffers would not help: the driver has none, or they count for nothing.
    fn is_hopeless(&self) -> bool {
        let has_all = self.buffers.len() >= usize::from(self.ready.queue.size());
        has_all
            || self.pieces.len() >= PIECES_WANTED_MAX
            || (!self.is_mergeable && !self.buffers.is_empty())
    }

    /// Asks for a kick when there are buffers. Whether there are none yet.
    fn has_to_wait(&mut self) -> Result<bool, virtio_queue::Error> {
        if self.ready.queue.enable_notification(self.memory)? {
            // Some came in between.
            self.ready.queue.disable_notification(self.memory)?;
            return Ok(false);
        }
        Ok(true)
    }

    /// Takes buffers from the queue until they hold the longest of frames.
    fn take_buffers(&mut self) -> Result<(), virtio_queue::Error> {
        let memory = self.memory;
        for _ in 0..self.ready.queue.size() {
            if self.room >= FRAME_BYTES_MAX || self.pieces.len() >= PIECES_WANTED_MAX {
                break;
            }
            let Some(chain) = self.ready.queue.iter(memory)?.next() else {
                break;
            };
            let head = chain.head_index();
            if self.take_buffer(chain).is_none() {
                // Not a buffer: back it goes, as it came.
                let used = Used { head, bytes: 0 };
                give_back(&mut self.ready.queue, memory, [used])?;
            }
        }
        Ok(())
    }

    /// Adds a chain; `None` if it is none that can be written to.
    fn take_buffer(&mut self, chain: DescriptorChain<&'m GuestRam>) -> Option<()> {
        let (head, first) = (chain.head_index(), self.pieces.len());
        let added = self.add_pieces(chain);
        let pieces = self.pieces.len().saturating_sub(first);
        match added.filter(|bytes| *bytes > HEADER_BYTES) {
            Some(bytes) => {
                self.room = self.room.saturating_add(bytes);
                self.buffers.push_back(Buffer {
                    head,
                    bytes,
                    pieces,
                });
                Some(())
            }
            None => {
                self.pieces.truncate(first);
                None
            }
        }
    }

    /// Adds the pieces of a chain. Returns their bytes.
    fn add_pieces(&mut self, chain: DescriptorChain<&'m GuestRam>) -> Option<usize> {
        let memory = self.memory;
        let (mut bytes, mut pieces) = (0_usize, 0_usize);
        for descriptor in chain {
            let length = usize::try_from(descriptor.len()).ok()?;
            if !descriptor.is_write_only() {
                return None;
            }
            for piece in GuestMemoryBackend::get_slices(memory, descriptor.addr(), length) {
                pieces = pieces.checked_add(1)?;
                if pieces > BUFFER_PIECES_MAX {
                    return None;
                }
                self.pieces.push(piece.ok()?);
            }
            bytes = bytes.checked_add(length)?;
        }
        Some(bytes)
    }

    /// Copies the frame that waits, or drops it if it can never fit.
    fn deliver_held(&mut self, bytes: usize) -> Result<(), virtio_queue::Error> {
        self.held = None;
        if bytes > self.room_for_one() {
            self.counters.drop_frame();
            return Ok(());
        }
        let mut rest = self.holder.get(..bytes).unwrap_or_default();
        for piece in &self.pieces {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        }
        self.deliver(bytes)
    }

    /// Gives the buffers back that hold a frame of that many bytes.
    fn deliver(&mut self, bytes: usize) -> Result<(), virtio_queue::Error> {
        let mut used = Vec::new();
        let (mut left, mut pieces) = (bytes, 0_usize);
        while left > 0 {
            let Some(buffer) = self.buffers.pop_front() else {
                break;
            };
            let filled = buffer.bytes.min(left);
            left = left.saturating_sub(filled);
            pieces = pieces.saturating_add(buffer.pieces);
            self.room = self.room.saturating_sub(buffer.bytes);
            used.push(Used {
                head: buffer.head,
                bytes: filled,
            });
        }
        self.write_count(u16::try_from(used.len()).unwrap_or_default());
        self.pieces.drain(..pieces.min(self.pieces.len()));
        self.counters.receive(bytes);
        give_back(&mut self.ready.queue, self.memory, used)
    }

    /// Writes `num_buffers` into the header, which the tap leaves alone.
    fn write_count(&self, count: u16) {
        let mut skipped = COUNT_OFFSET;
        let bytes = count.to_le_bytes();
        let mut rest = bytes.as_slice();
        for piece in &self.pieces {
            if let Ok(place) = piece.offset(skipped) {
                let (now, later) = rest.split_at(place.len().min(rest.len()));
                place.copy_from(now);
                rest = later;
            }
            skipped = skipped.saturating_sub(piece.len());
            if rest.is_empty() {
                break;
            }
        }
    }
}
