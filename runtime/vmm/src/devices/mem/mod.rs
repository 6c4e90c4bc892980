//! virtio-mem: memory that the guest is given while it runs, and gives back (virtio 1.2, 5.15).
//!
//! The host says how much it is to have (`requested_size`), and the driver asks for blocks, or for
//! their end, until it has as much. A block that is unplugged is the host's again at once.
//!
//! What a driver could use without having asked for it is bounded as well: the usable region is no
//! longer than what was once requested, in whole units of the guest's kernel, and neither the guest
//! nor a device on its behalf reaches anything behind it. See `Memory::give`.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod blocks;
mod request;
#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test that panics has failed"
)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_queue::DescriptorChain;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fd::borrow;
use super::simple::SimpleQueue;
use crate::device::{Activation, ConfigSpace, Device, DeviceError, News, Profile};
use crate::last_words;
use crate::memory::{self, Growth, GuestRam};
use blocks::Blocks;
use request::{Answer, BlockState, Request};

const NAME: &str = "mem";

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: a driver must not even look at what it has not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The unit of all requests: what Linux gives back at a time (a page block), and a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// `struct virtio_mem_config` (virtio 1.2, 5.15.4).
const CONFIG_BYTES: usize = 56;

/// Failures of the host that are logged.
const FAILURES_LOGGED_MAX: u32 = 8;

/// See the module.
pub struct MemDevice {
    shared: Arc<Shared>,
    failures_logged: u32,
}

/// The host's side of the device.
#[derive(Clone)]
pub(crate) struct Socket {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Readable once the guest has as much as was awaited.
    reached: EventFd,
}

struct State {
    growth: Growth,
    blocks: Blocks,
    usable_bytes: u64,
    requested_bytes: u64,
    is_awaited: bool,
    config: Option<ConfigSpace>,
}

impl MemDevice {
    /// A device whose guest has nothing of it, and the host's side.
    ///
    /// # Errors
    /// The host has no events left.
    pub(crate) fn new(growth: Growth) -> io::Result<(Self, Socket)> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                growth,
                blocks: Blocks::default(),
                usable_bytes: 0,
                requested_bytes: 0,
                is_awaited: false,
                config: None,
            }),
            reached: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let socket = Socket {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            shared,
            failures_logged: 0,
        };
        Ok((device, socket))
    }

    fn answer(
        &mut self,
        chain: DescriptorChain<&GuestRam>,
        memory: &GuestRam,
    ) -> Result<usize, DeviceError> {
        let request = request::read(chain.clone(), memory);
        let answer = match request {
            Some(request) => self.carry_out(request, memory),
            None => Answer::Error,
        };
        Ok(request::write(chain, memory, answer))
    }

    /// virtio 1.2, 5.15.6.
    fn carry_out(&mut self, request: Request, memory: &GuestRam) -> Answer {
        match request {
            Request::Plug { start, blocks } => self.shared.lock().plug(start, blocks, &self.shared),
            Request::Unplug { start, blocks } => self.unplug(start, blocks, memory),
            Request::UnplugAll => self.unplug_all(memory),
            Request::State { start, blocks } => self.shared.lock().look(start, blocks),
        }
    }

    /// The lock is not held while the host takes pages away, which may take long. No one else plugs or
    /// unplugs.
    fn unplug(&mut self, start: u64, blocks: u16, memory: &GuestRam) -> Answer {
        let range = {
            let state = self.shared.lock();
            state
                .range(start, blocks)
                .filter(|range| state.blocks.count(range) == range.len())
        };
        let Some(range) = range else {
            return Answer::Error;
        };
        let bytes = u64::from(blocks).saturating_mul(BLOCK_BYTES);
        if let Err(error) = memory::discard(memory, GuestAddress(start), bytes) {
            return self.fail(&error);
        }
        let mut state = self.shared.lock();
        state.blocks.set(range, false);
        state.show(News::Known);
        Answer::Ack
    }

    fn unplug_all(&mut self, memory: &GuestRam) -> Answer {
        let (start, bytes) = {
            let state = self.shared.lock();
            (state.growth.start, state.usable_bytes)
        };
        if let Err(error) = memory::discard(memory, GuestAddress(start), bytes) {
            return self.fail(&error);
        }
        let mut state = self.shared.lock();
        state.blocks.clear();
        state.show(News::Known);
        Answer::Ack
    }

    /// The guest may try again.
    fn fail(&mut self, error: &io::Error) -> Answer {
        if self.failures_logged < FAILURES_LOGGED_MAX {
            self.failures_logged = self.failures_logged.saturating_add(1);
            last_words::print(format_args!(
                "{NAME}: cannot give memory back to the host: {error}"
            ));
        }
        Answer::Busy
    }
}

impl Device for MemDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_MEM,
            features: UNPLUGGED_INACCESSIBLE,
            // Linux has one request at a time, of two descriptors.
            queue_sizes: &[16],
            is_hidden: false,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.shared.lock().config();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(offset..).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn take_config_space(&mut self, config: ConfigSpace) {
        self.shared.lock().config = Some(config);
    }

    /// What is plugged stays so, whatever becomes of the driver (virtio 1.2, 5.15.5.2): the next one
    /// unplugs it.
    fn run(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.get_mut(0).and_then(Option::take);
        let mut queue = SimpleQueue::new(NAME, 0, queue, &activation.memory);
        queue.serve(&activation.stop, |chain, memory| self.answer(chain, memory))
    }
}

impl Socket {
    /// Asks the guest to have `bytes`, of which `usable_bytes` can be reached by now. Answers whether
    /// it has as much already; if not, [`Self::reached_fd`] becomes readable once it has.
    pub(crate) fn request(&self, bytes: u64, usable_bytes: u64) -> bool {
        let mut state = self.shared.lock();
        // What was usable once may be in use, so it stays so (virtio 1.2, 5.15.6.4).
        state.usable_bytes = state.usable_bytes.max(usable_bytes);
        let usable = state.usable_bytes;
        state.blocks.grow(block_count(usable));
        state.requested_bytes = round_up(bytes).min(usable);
        state.is_awaited = state.plugged_bytes() < state.requested_bytes;
        // What was reached before is of no interest any more.
        let _ = self.shared.reached.read();
        state.show(News::Told);
        !state.is_awaited
    }

    /// Readable after the guest has as much as it was asked to have.
    pub(crate) fn reached_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.shared.reached)
    }

    /// Whether it is; once.
    pub(crate) fn take_reached(&self) -> bool {
        self.shared.reached.read().is_ok()
    }

    /// What the guest has.
    pub(crate) fn plugged_bytes(&self) -> u64 {
        self.shared.lock().plugged_bytes()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn plug(&mut self, start: u64, blocks: u16, shared: &Shared) -> Answer {
        let Some(range) = self.range(start, blocks) else {
            return Answer::Error;
        };
        if self.blocks.count(&range) != 0 {
            return Answer::Error;
        }
        let bytes = u64::from(blocks).saturating_mul(BLOCK_BYTES);
        if self.plugged_bytes().saturating_add(bytes) > self.requested_bytes {
            return Answer::Nack;
        }
        self.blocks.set(range, true);
        self.show(News::Known);
        if self.is_awaited && self.plugged_bytes() >= self.requested_bytes {
            self.is_awaited = false;
            // Can't fail: the counter is one at most.
            let _ = shared.reached.write(1);
        }
        Answer::Ack
    }

    fn look(&self, start: u64, blocks: u16) -> Answer {
        let Some(range) = self.range(start, blocks) else {
            return Answer::Error;
        };
        let plugged = self.blocks.count(&range);
        Answer::State(match plugged {
            0 => BlockState::Unplugged,
            all if all == range.len() => BlockState::Plugged,
            _ => BlockState::Mixed,
        })
    }

    /// The numbers of blocks that a request names, at least one and all in the usable region.
    fn range(&self, start: u64, blocks: u16) -> Option<std::ops::Range<usize>> {
        let offset = start.checked_sub(self.growth.start)?;
        if blocks == 0 || !offset.is_multiple_of(BLOCK_BYTES) {
            return None;
        }
        let first = block_count(offset);
        let end = first.checked_add(usize::from(blocks))?;
        (end <= block_count(self.usable_bytes)).then_some(first..end)
    }

    fn plugged_bytes(&self) -> u64 {
        (self.blocks.plugged() as u64).saturating_mul(BLOCK_BYTES)
    }

    fn show(&self, news: News) {
        if let Some(config) = &self.config {
            config.show(&self.config(), news);
        }
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        // The node, which the feature that is not offered would give a meaning, is 0.
        let fields = [
            BLOCK_BYTES,
            0,
            self.growth.start,
            self.growth.region_bytes(),
            self.usable_bytes,
            self.plugged_bytes(),
            self.requested_bytes,
        ];
        let mut config = [0; CONFIG_BYTES];
        for (to, from) in config
            .iter_mut()
            .zip(fields.iter().flat_map(|f| f.to_le_bytes()))
        {
            *to = from;
        }
        config
    }
}

/// Whole blocks in so many bytes.
fn block_count(bytes: u64) -> usize {
    let blocks = bytes.checked_div(BLOCK_BYTES).unwrap_or_default();
    usize::try_from(blocks).unwrap_or(usize::MAX)
}

fn round_up(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(BLOCK_BYTES)
        .unwrap_or(u64::MAX)
}
