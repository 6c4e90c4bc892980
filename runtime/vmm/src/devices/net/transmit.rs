//! From the guest to the tap.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::ring::{Used, give_back, wants_interrupt};
use super::tap::{Iovecs, Moved, PIECES_MAX, Slice, Tap};
use super::{
    Counters, FRAME_BYTES_MAX, FRAMES_PER_TURN_MAX, HEADER_BYTES, Next, TRANSMIT_QUEUE, broken,
};
use crate::device::{DeviceError, ReadyQueue};
use crate::memory::GuestRam;

/// The queue of frames that the guest sends.
pub(super) struct Transmit<'m> {
    ready: ReadyQueue,
    memory: &'m GuestRam,
    counters: &'m Counters,
    /// Of the frame that is being sent.
    pieces: Vec<Slice<'m>>,
    iovecs: Iovecs,
    sent: Vec<Used>,
}

impl<'m> Transmit<'m> {
    pub(super) fn new(ready: ReadyQueue, memory: &'m GuestRam, counters: &'m Counters) -> Self {
        Self {
            ready,
            memory,
            counters,
            pieces: Vec::new(),
            iovecs: Iovecs::default(),
            sent: Vec::with_capacity(FRAMES_PER_TURN_MAX),
        }
    }

    pub(super) fn kick(&self) -> &EventFd {
        &self.ready.kick
    }

    /// Sends what there is, up to [`FRAMES_PER_TURN_MAX`].
    pub(super) fn take_turn(&mut self, tap: Option<&Tap>) -> Result<Next, DeviceError> {
        let before = self.ready.queue.next_used();
        let sent = self.send_frames(tap);
        let queue = &mut self.ready.queue;
        give_back(queue, self.memory, self.sent.drain(..)).map_err(broken(TRANSMIT_QUEUE))?;
        if wants_interrupt(queue, self.memory, before).map_err(broken(TRANSMIT_QUEUE))? {
            self.ready.interrupt.signal_used();
        }
        sent.map_err(broken(TRANSMIT_QUEUE))
    }

    fn send_frames(&mut self, tap: Option<&Tap>) -> Result<Next, virtio_queue::Error> {
        let memory = self.memory;
        self.ready.queue.disable_notification(memory)?;
        while self.sent.len() < FRAMES_PER_TURN_MAX {
            let Some(chain) = self.ready.queue.iter(memory)?.next() else {
                if self.ready.queue.enable_notification(memory)? {
                    // One came in between.
                    self.ready.queue.disable_notification(memory)?;
                    continue;
                }
                return Ok(Next::Kick);
            };
            let head = chain.head_index();
            self.send(chain, tap);
            self.sent.push(Used { head, bytes: 0 });
        }
        Ok(Next::Turn)
    }

    /// Sends one frame. One that the tap does not take is lost, as on a cable.
    fn send(&mut self, chain: DescriptorChain<&'m GuestRam>, tap: Option<&Tap>) {
        let moved = match (self.collect(chain), tap) {
            (Some(()), Some(tap)) => tap.write(&self.pieces, &mut self.iovecs),
            _ => Moved::Refused,
        };
        match moved {
            Moved::Bytes(bytes) => self.counters.send(bytes),
            Moved::Nothing | Moved::Refused | Moved::Gone => self.counters.drop_frame(),
        }
    }

    /// The pieces of a frame; `None` if it is none.
    fn collect(&mut self, chain: DescriptorChain<&'m GuestRam>) -> Option<()> {
        self.pieces.clear();
        let mut left = FRAME_BYTES_MAX;
        for descriptor in chain.readable() {
            let bytes = usize::try_from(descriptor.len()).ok()?;
            left = left.checked_sub(bytes)?;
            for piece in GuestMemoryBackend::get_slices(self.memory, descriptor.addr(), bytes) {
                if self.pieces.len() >= PIECES_MAX {
                    return None;
                }
                self.pieces.push(piece.ok()?);
            }
        }
        (FRAME_BYTES_MAX.saturating_sub(left) > HEADER_BYTES).then_some(())
    }
}
