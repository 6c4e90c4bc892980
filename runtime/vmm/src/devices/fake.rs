//! A driver for tests: one queue in guest memory, filled and looked at without a guest.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, Device, Interrupt, ReadyQueue};
use crate::memory::GuestRam;
use crate::seccomp::{Filters, ThreadKind};

/// Descriptors of a queue.
pub(crate) const QUEUE_SIZE: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// `VIRTQ_USED_F_NO_NOTIFY`
const NO_NOTIFY: u16 = 1;

/// The driver's side of a split virtqueue (virtio 1.2, 2.7).
pub(crate) struct FakeQueue {
    memory: Arc<GuestRam>,
    base: u64,
    next_descriptor: u16,
    next_avail: u16,
    next_used: u16,
    /// What was available when the device was last kicked, or did not want to be.
    kicked_avail: u16,
    pub(crate) has_event_idx: bool,
    pub(crate) kick: EventFd,
    pub(crate) irq: EventFd,
}

impl FakeQueue {
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    /// Guest memory that a queue takes.
    pub(crate) const BYTES: u64 = 0x3000;

    pub(crate) fn new(memory: &Arc<GuestRam>, base: u64) -> Self {
        Self {
            memory: Arc::clone(memory),
            base,
            next_descriptor: 0,
            next_avail: 0,
            next_used: 0,
            kicked_avail: 0,
            has_event_idx: false,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            irq: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// The device's side.
    pub(crate) fn ready(&self) -> ReadyQueue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        let low = |offset| Some(u32::try_from(self.base + offset).unwrap());
        queue.set_desc_table_address(low(0), Some(0));
        queue.set_avail_ring_address(low(Self::AVAIL), Some(0));
        queue.set_used_ring_address(low(Self::USED), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        let irq = self.irq.try_clone().unwrap();
        ReadyQueue {
            queue,
            kick: self.kick.try_clone().unwrap(),
            interrupt: Interrupt::new(move || irq.write(1).unwrap()),
        }
    }

    /// Makes a chain of (address, length, is writable) available. Returns its head. Descriptors
    /// are taken in turn: no more than the table holds may be in use.
    pub(crate) fn add(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (at, &(address, bytes, is_writable)) in pieces.iter().enumerate() {
            let is_last = at + 1 == pieces.len();
            let next = (self.next_descriptor + 1) % QUEUE_SIZE;
            let mut flags = if is_last { 0 } else { NEXT };
            flags |= if is_writable { WRITE } else { 0 };
            let descriptor = self.base + u64::from(self.next_descriptor) * 16;
            self.store(address, descriptor);
            self.store(bytes, descriptor + 8);
            self.store(flags, descriptor + 12);
            self.store(next, descriptor + 14);
            self.next_descriptor = next;
        }
        self.add_head(head);
        head
    }

    /// Makes a chain available that starts anywhere.
    pub(crate) fn add_head(&mut self, head: u16) {
        let entry = self.base + Self::AVAIL + 4 + u64::from(self.next_avail % QUEUE_SIZE) * 2;
        self.store(head, entry);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail(self.next_avail);
    }

    /// Sets the available index to anything.
    pub(crate) fn set_avail(&self, index: u16) {
        let at = GuestAddress(self.base + Self::AVAIL + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    /// Kicks the device, unless it has said that it does not want to be (virtio 1.2, 2.7.10).
    pub(crate) fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_avail, self.next_avail);
        let flags: u16 = self.load(Self::USED);
        let event: u16 = self.load(Self::USED + 4 + u64::from(QUEUE_SIZE) * 8);
        let since_event = self.next_avail.wrapping_sub(event).wrapping_sub(1);
        let is_wanted = match self.has_event_idx {
            true => since_event < self.next_avail.wrapping_sub(old),
            false => flags & NO_NOTIFY == 0,
        };
        if is_wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// The next chain the device has used: its head and the bytes it says to have written. If
    /// there is none, the device will interrupt when there is (virtio 1.2, 2.7.7).
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            let used_event = Self::AVAIL + 4 + u64::from(QUEUE_SIZE) * 2;
            self.store(self.next_used, self.base + used_event);
            fence(Ordering::SeqCst);
        }
        if self.used_index() == self.next_used {
            return None;
        }
        let entry = Self::USED + 4 + u64::from(self.next_used % QUEUE_SIZE) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.load(entry);
        let bytes: u32 = self.load(entry + 4);
        Some((u16::try_from(head).unwrap(), bytes))
    }

    fn used_index(&self) -> u16 {
        let at = GuestAddress(self.base + Self::USED + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    fn load<T: vm_memory::ByteValued>(&self, offset: u64) -> T {
        let at = GuestAddress(self.base + offset);
        self.memory.read_obj(at).unwrap()
    }

    fn store<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }
}

/// A driver of a device that answers requests on one queue.
pub(crate) struct Driver {
    memory: Arc<GuestRam>,
    index: usize,
    queue: FakeQueue,
    /// What was available in earlier runs.
    answered: u16,
}

impl Driver {
    /// Where tests put their buffers: half a mebibyte.
    pub(crate) const DATA: u64 = 0x8_0000;
    /// No memory is here.
    pub(crate) const OUTSIDE: u64 = 0x100_0000;

    /// A driver that uses only the queue `index`.
    pub(crate) fn new(index: usize) -> Self {
        Self::with_more(index, &[])
    }

    /// The same, where there is more memory, at these places.
    pub(crate) fn with_more(index: usize, more: &[(GuestAddress, usize)]) -> Self {
        let ranges = [&[(GuestAddress(0), 0x10_0000)], more].concat();
        let memory = crate::memory::from_ranges(&ranges);
        let memory = Arc::new(memory);
        let queue = FakeQueue::new(&memory, 0);
        Self {
            memory,
            index,
            queue,
            answered: 0,
        }
    }

    pub(crate) fn add(&mut self, pieces: &[(u64, u32, bool)]) {
        self.queue.add(pieces);
    }

    pub(crate) fn add_head(&mut self, head: u16) {
        self.queue.add_head(head);
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut data, address).unwrap();
        data
    }

    /// Lets the device answer everything that is available, and stops it. The stop is seen only
    /// after the queue was looked at, so nothing has to be waited for. Returns what it has used.
    pub(crate) fn run(&mut self, device: &mut impl Device) -> Vec<(u16, u32)> {
        let mut queues: Vec<_> = device.profile().queue_sizes.iter().map(|_| None).collect();
        let mut ready = self.queue.ready();
        ready.queue.set_next_avail(self.answered);
        ready.queue.set_next_used(self.queue.next_used);
        self.answered = self.queue.next_avail;
        queues[self.index] = Some(ready);
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        stop.write(1).unwrap();
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: device.profile().features,
            stop,
        };
        let filters = Filters::compile().unwrap();
        let kind = ThreadKind::of_device(device.profile().device_type);
        std::thread::scope(|scope| {
            let run = || {
                // A system call that is not on the list of its threads ends the process.
                filters.install(kind).unwrap();
                device.run(activation)
            };
            scope.spawn(run).join().unwrap().unwrap();
        });
        std::iter::from_fn(|| self.queue.used()).collect()
    }
}
