//! virtio-net: the pod's interface, by way of a tap (virtio 1.2, 5.1).
//!
//! The tap was handed over; it carries the same header before each frame as the queues do, so that
//! a frame goes straight between guest memory and the tap, unlooked at. Checksums and segmentation
//! are left undone on the way, as far as the driver agrees: what passes is up to 64 KiB at a time.
//!
//! One thread serves both directions in turns of limited length, and waits in between. The tap is
//! not read while the driver has no buffers: the kernel's queue fills, and it drops what is too much.
//!
//! A device may be there before its tap is: it then has no address yet, is hidden from the guest, and
//! what the guest sends is lost. A tap may also be pulled out and replaced while the guest runs.
//!
//! The link has no `mtu` field: the agent sets the MTU, which may change while the pod runs, and a
//! driver takes that field as an upper bound for ever.

mod receive;
mod ring;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::receive::Receive;
use self::tap::Tap;
use self::transmit::Transmit;
use crate::device::{Activation, Device, DeviceError, Profile};
use crate::devices::fd::borrow;

const NAME: &str = "net";

const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;

/// Frames that may be on their way in each direction. A full queue of receive buffers is what the
/// guest pays for it: some 400 KiB.
const QUEUE_SIZE: u16 = 256;

/// Frames that one direction may move before the other one, and the stop, get their turn.
const FRAMES_PER_TURN_MAX: usize = 64;

/// virtio 1.2, 5.1.6: `struct virtio_net_hdr`, with `num_buffers`.
const HEADER_BYTES: usize = 12;

/// Ethernet's header with a VLAN tag, and that of IPv6, whose payload has up to 65535 bytes.
const PACKET_BYTES_MAX: usize = 18 + 40 + 65535;

/// The longest that passes, with its header.
const FRAME_BYTES_MAX: usize = HEADER_BYTES + PACKET_BYTES_MAX;

/// virtio 1.2, 5.1.4: `mac`, `status`.
const CONFIG_BYTES: usize = 8;
/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u16 = 1;

/// See the module.
pub struct NetDevice {
    /// It was made without a tap.
    is_spare: bool,
    slot: Arc<Slot>,
    /// Written to when the slot has changed.
    changed: EventFd,
    features: u64,
    config: [u8; CONFIG_BYTES],
    counters: Arc<Counters>,
}

/// What has passed, since the device was made.
#[derive(Debug, Default)]
struct Counters {
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    dropped_frames: AtomicU64,
}

/// What has passed through a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To the guest.
    pub received_frames: u64,
    /// Headers of virtio included.
    pub received_bytes: u64,
    /// From the guest.
    pub sent_frames: u64,
    /// Headers of virtio included.
    pub sent_bytes: u64,
    /// Malformed, too long, or refused by the tap, in either direction.
    pub dropped_frames: u64,
}

impl Traffic {
    /// That of two devices.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            received_frames: self.received_frames.wrapping_add(other.received_frames),
            received_bytes: self.received_bytes.wrapping_add(other.received_bytes),
            sent_frames: self.sent_frames.wrapping_add(other.sent_frames),
            sent_bytes: self.sent_bytes.wrapping_add(other.sent_bytes),
            dropped_frames: self.dropped_frames.wrapping_add(other.dropped_frames),
        }
    }
}

impl Counters {
    fn read(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            received_frames: read(&self.received_frames),
            received_bytes: read(&self.received_bytes),
            sent_frames: read(&self.sent_frames),
            sent_bytes: read(&self.sent_bytes),
            dropped_frames: read(&self.dropped_frames),
        }
    }

    fn receive(&self, bytes: usize) {
        self.received_frames.fetch_add(1, Ordering::Relaxed);
        self.received_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn send(&self, bytes: usize) {
        self.sent_frames.fetch_add(1, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn drop_frame(&self) {
        self.dropped_frames.fetch_add(1, Ordering::Relaxed);
    }
}

impl NetDevice {
    /// The device of an address and a tap, which does not block and has a header of 12 bytes before
    /// each frame; none: one that gets its tap later. Taps are plugged into the socket.
    ///
    /// # Errors
    /// The descriptor is not such a tap, or the host has no events left.
    pub fn new(booted: Option<([u8; 6], OwnedFd)>) -> io::Result<(Self, Socket)> {
        let with_tap = |(mac, fd)| Ok::<_, io::Error>((mac, Tap::new(fd)?));
        Self::with(booted.map(with_tap).transpose()?)
    }

    fn with(booted: Option<([u8; 6], Tap)>) -> io::Result<(Self, Socket)> {
        let mut config = [0; CONFIG_BYTES];
        let mut features = features();
        if let Some((mac, tap)) = &booted {
            config[..mac.len()].copy_from_slice(mac);
            features |= 1 << VIRTIO_NET_F_MAC;
            if tap.can_segment_udp() {
                features |= UDP_SEGMENTATION;
            }
        }
        config[CONFIG_BYTES - size_of::<u16>()..].copy_from_slice(&LINK_UP.to_le_bytes());
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let counters = Arc::default();
        let is_spare = booted.is_none();
        let slot = Arc::new(Slot::default());
        slot.replace(booted.map(|(_, tap)| tap));
        let socket = Socket {
            slot: Arc::clone(&slot),
            changed: changed.try_clone()?,
            counters: Arc::clone(&counters),
        };
        let device = Self {
            is_spare,
            slot,
            changed,
            features,
            config,
            counters,
        };
        Ok((device, socket))
    }
}

/// Where taps are plugged in, from outside of the device's thread.
#[derive(Debug)]
pub struct Socket {
    slot: Arc<Slot>,
    changed: EventFd,
    counters: Arc<Counters>,
}

impl Socket {
    /// Replaces the device's tap, or takes it away. The old one is closed at once, or by the device as
    /// soon as it sees that.
    ///
    /// # Errors
    /// The descriptor is no tap.
    pub fn plug(&self, tap: Option<OwnedFd>) -> io::Result<()> {
        let tap = tap.map(Tap::new).transpose()?;
        self.slot.replace(tap);
        self.changed.write(1)
    }

    /// What has passed so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.counters.read()
    }
}

/// The tap that is plugged in. The device has a share in it only while it runs, so that one which is
/// pulled out does not stay open for as long as the guest has no driver.
#[derive(Debug, Default)]
struct Slot(Mutex<Option<Arc<Tap>>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Tap>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tap(&self) -> Option<Arc<Tap>> {
        self.lock().clone()
    }

    fn replace(&self, tap: Option<Tap>) {
        let old = std::mem::replace(&mut *self.lock(), tap.map(Arc::new));
        // Closed without the lock.
        drop(old);
    }
}

impl Device for NetDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_NET,
            features: self.features,
            queue_sizes: &[QUEUE_SIZE, QUEUE_SIZE],
            is_hidden: self.is_spare,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.config.get(at..));
        for (place, byte) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *place = *byte;
        }
    }

    fn run(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        // Before the tap is taken: if there is another one by then, it is taken twice.
        clear(borrow(&self.changed));
        let mut tap = self.slot.tap();
        set_offloads(tap.as_deref(), features)?;
        let mut take = |index| {
            let queue = activation.queues.get_mut(index);
            queue.and_then(Option::take)
        };
        let (receive, transmit) = (take(RECEIVE_QUEUE), take(TRANSMIT_QUEUE));
        let memory = &*activation.memory;
        let is_mergeable = has(features)(VIRTIO_NET_F_MRG_RXBUF);
        let mut receive =
            receive.map(|queue| Receive::new(queue, memory, is_mergeable, &self.counters));
        let mut transmit = transmit.map(|queue| Transmit::new(queue, memory, &self.counters));
        // The driver may have kicked before this thread looked.
        let mut to_do = ToDo {
            receive: Next::Turn,
            transmit: Next::Turn,
        };
        loop {
            if let (Next::Turn, Some(receive)) = (to_do.receive, &mut receive) {
                to_do.receive = receive.take_turn(tap.as_deref())?;
            }
            if let (Next::Turn, Some(transmit)) = (to_do.transmit, &mut transmit) {
                to_do.transmit = transmit.take_turn(tap.as_deref())?;
            }
            let stop = &activation.stop;
            let watched = Watched {
                stop,
                plug: &self.changed,
                tap: tap.as_deref(),
                receive: receive.as_ref().map_or(stop, Receive::kick),
                transmit: transmit.as_ref().map_or(stop, Transmit::kick),
            };
            match to_do.wait(&watched)? {
                Woken::Stop => return Ok(()),
                Woken::Plug => {
                    clear(borrow(&self.changed));
                    tap = self.slot.tap();
                    set_offloads(tap.as_deref(), features)?;
                    to_do.receive = Next::Turn;
                }
                Woken::Work => {}
            }
        }
    }
}

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: it has more to do.
    Turn,
    /// The driver's kick.
    Kick,
    /// Frames at the tap.
    Frames,
    /// Nothing will ever come.
    Nothing,
}

struct ToDo {
    receive: Next,
    transmit: Next,
}

/// All that a wait may end with.
struct Watched<'a> {
    stop: &'a EventFd,
    plug: &'a EventFd,
    tap: Option<&'a Tap>,
    receive: &'a EventFd,
    transmit: &'a EventFd,
}

/// What a wait has ended with.
enum Woken {
    Stop,
    Plug,
    Work,
}

impl ToDo {
    /// Waits until there is something to do.
    fn wait(&mut self, watched: &Watched<'_>) -> Result<Woken, DeviceError> {
        let stop = borrow(watched.stop);
        let has_work = self.receive == Next::Turn || self.transmit == Next::Turn;
        // A descriptor that nobody waits for is replaced by the stop, which everybody does.
        let tap = match (self.receive, watched.tap) {
            (Next::Frames, Some(tap)) => tap.borrow(),
            _ => stop,
        };
        let (receive_kick, transmit_kick) = (borrow(watched.receive), borrow(watched.transmit));
        let mut polled = [stop, borrow(watched.plug), tap, receive_kick, transmit_kick]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let no_wait = Timespec::default();
        match poll(&mut polled, has_work.then_some(&no_wait)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("poll")(errno.into())),
        }
        // A tap that has gone is told as an error, which reading it tells again.
        let [
            is_stopped,
            is_plugged,
            has_frames,
            receive_kicked,
            transmit_kicked,
        ] = polled.map(|fd| !fd.revents().is_empty());
        if is_stopped {
            return Ok(Woken::Stop);
        }
        if self.receive == Next::Frames && has_frames {
            self.receive = Next::Turn;
        }
        if receive_kicked {
            clear(receive_kick);
            if self.receive == Next::Kick {
                self.receive = Next::Turn;
            }
        }
        if transmit_kicked {
            clear(transmit_kick);
            self.transmit = Next::Turn;
        }
        Ok(if is_plugged { Woken::Plug } else { Woken::Work })
    }
}

/// It is readable, and nobody else reads it.
fn clear(kick: std::os::fd::BorrowedFd<'_>) {
    let _ = rustix::io::read(kick, &mut [0_u8; size_of::<u64>()]);
}

/// What every device offers.
fn features() -> u64 {
    let offered = [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    offered.into_iter().fold(0, |bits, bit| bits | (1 << bit))
}

/// What a device offers as well whose tap can do it.
const UDP_SEGMENTATION: u64 =
    (1 << VIRTIO_NET_F_GUEST_USO4) | (1 << VIRTIO_NET_F_GUEST_USO6) | (1 << VIRTIO_NET_F_HOST_USO);

/// Lets a tap leave undone what the driver can do.
fn set_offloads(tap: Option<&Tap>, features: u64) -> Result<(), DeviceError> {
    let set = tap.map_or(Ok(()), |tap| tap.set_offloads(has(features)));
    set.map_err(failed("tell the tap what the guest can do"))
}

/// Whether a feature is among `features`.
fn has(features: u64) -> impl Fn(u32) -> bool {
    move |bit| features & (1 << bit) != 0
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host {
        device: NAME,
        what,
        source,
    }
}

/// A queue that the driver has broken.
fn broken(index: usize) -> impl Fn(virtio_queue::Error) -> DeviceError {
    move |source| DeviceError::Queue {
        device: NAME,
        index,
        source,
    }
}
