//! The device: one thread, one epoll set for queues, requests and all descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::GUEST_CID;
use super::connection::Pumped;
use super::handle::{Shared, VsockHandle};
use super::muxer::Muxer;
use super::queues::PacketQueue;
use crate::device::{Activation, Device, DeviceError, Profile};
use crate::devices::fd::borrow;

const NAME: &str = "vsock";

const RX_QUEUE: usize = 0;
const TX_QUEUE: usize = 1;

/// How long sinks may take for what the guest sent before its driver went away.
const STOP_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Most events taken from epoll at once.
const EVENTS_MAX: usize = 64;

/// Tokens of the device's own descriptors; those of connections are 34 bits wide.
const TOKEN_STOP: u64 = u64::MAX;
const TOKEN_WAKE: u64 = u64::MAX - 1;
const TOKEN_RX: u64 = u64::MAX - 2;
const TOKEN_TX: u64 = u64::MAX - 3;

/// See the module's parent.
pub struct VsockDevice {
    shared: Arc<Shared>,
    /// The stream for the agent's connection, until it has come.
    agent: Option<OwnedFd>,
}

impl VsockDevice {
    /// A device that ties the guest's one connection to [`super::AGENT_PORT`] to `agent`, a
    /// stream socket, and the handle for all other connections.
    ///
    /// # Errors
    /// The host is out of descriptors or memory.
    pub fn new(agent: OwnedFd) -> std::io::Result<(Self, VsockHandle)> {
        let shared = Arc::new(Shared::new()?);
        let handle = VsockHandle::new(Arc::clone(&shared));
        let agent = Some(agent);
        Ok((Self { shared, agent }, handle))
    }
}

impl Device for VsockDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_VSOCK,
            features: (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC),
            // rx, tx, event: the last carries transport resets, of which there are none.
            queue_sizes: &[256, 256, 16],
            is_hidden: false,
        }
    }

    /// virtio 1.2, 5.10.4: the guest's CID and nothing else.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let cid = GUEST_CID.to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| cid.get(at..));
        for (place, byte) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *place = *byte;
        }
    }

    fn run(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            mut queues,
            features,
            stop,
        } = activation;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("epoll_create"))?;
        let epoll = Rc::new(epoll);
        watch(&epoll, borrow(&stop), TOKEN_STOP)?;
        // The event queue would carry transport resets, of which there are none.
        let mut take = |index: usize| queues.get_mut(index).and_then(Option::take);
        let (Some(rx), Some(tx)) = (take(RX_QUEUE), take(TX_QUEUE)) else {
            // A driver without these queues has no use for the device, but it may reset it.
            return wait(&epoll, &mut Vec::with_capacity(1), None);
        };
        let has_event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut running = Running {
            muxer: Muxer::new(
                Arc::clone(&self.shared),
                Rc::clone(&epoll),
                self.agent.take(),
            ),
            rx: PacketQueue::new(rx, &memory, has_event_idx),
            tx: PacketQueue::new(tx, &memory, has_event_idx),
            shared: &self.shared,
            stop: borrow(&stop),
            epoll,
            has_kicked: true,
        };
        self.shared.set_driver_up(true);
        let result = running.serve();
        self.shared.set_driver_up(false);
        self.agent = running.drain();
        result
    }
}

/// The device while its driver is up.
struct Running<'m> {
    muxer: Muxer,
    rx: PacketQueue<'m>,
    tx: PacketQueue<'m>,
    shared: &'m Shared,
    stop: BorrowedFd<'m>,
    epoll: Rc<OwnedFd>,
    /// Whether the tx queue may hold packets.
    has_kicked: bool,
}

impl Running<'_> {
    /// Serves until the stop event.
    fn serve(&mut self) -> Result<(), DeviceError> {
        watch(&self.epoll, &self.shared.wake, TOKEN_WAKE)?;
        watch(&self.epoll, self.rx.kick(), TOKEN_RX)?;
        watch(&self.epoll, self.tx.kick(), TOKEN_TX)?;
        self.rx.disable_kicks().map_err(broken(RX_QUEUE))?;
        self.tx.disable_kicks().map_err(broken(TX_QUEUE))?;
        self.take_requests();
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            let has_more = self.serve_queues()?;
            let timeout = if has_more {
                Some(Duration::ZERO)
            } else {
                let next = self.muxer.next_deadline();
                next.map(|at| at.saturating_duration_since(Instant::now()))
            };
            wait(&self.epoll, &mut events, timeout)?;
            let now = Instant::now();
            for event in events.drain(..) {
                match event.data.u64() {
                    TOKEN_STOP => return Ok(()),
                    TOKEN_WAKE => self.take_requests(),
                    TOKEN_RX => drain(self.rx.kick()),
                    TOKEN_TX => {
                        drain(self.tx.kick());
                        self.has_kicked = true;
                    }
                    token => self.muxer.ready(token, event.flags, now),
                }
            }
            self.muxer.expire(now);
        }
    }

    /// Lets packets flow both ways as far as they can without waiting. Whether there are more.
    fn serve_queues(&mut self) -> Result<bool, DeviceError> {
        let now = Instant::now();
        if self.has_kicked {
            self.has_kicked = self.receive(now).map_err(broken(TX_QUEUE))?;
        }
        let pumped = self.muxer.pump(&mut self.rx, now);
        let mut has_more = match pumped.map_err(broken(RX_QUEUE))? {
            Pumped::Idle => false,
            Pumped::More => true,
            Pumped::NoBuffers => {
                let is_refilled = self.rx.enable_kicks().map_err(broken(RX_QUEUE))?;
                if is_refilled {
                    self.rx.disable_kicks().map_err(broken(RX_QUEUE))?;
                }
                is_refilled
            }
        };
        // While answers wait for rx buffers, the tx queue rests; a kick of rx goes on with both.
        has_more |= self.has_kicked && self.muxer.may_receive();
        self.tx.signal().map_err(broken(TX_QUEUE))?;
        self.rx.signal().map_err(broken(RX_QUEUE))?;
        Ok(has_more)
    }

    /// Takes the guest's packets, a fair share of them. Whether there may be more.
    fn receive(&mut self, now: Instant) -> Result<bool, virtio_queue::Error> {
        for _ in 0..self.tx.fair_share() {
            if !self.muxer.may_receive() {
                return Ok(true);
            }
            let Some((head, packet)) = self.tx.receive()? else {
                let has_more = self.tx.enable_kicks()?;
                if has_more {
                    self.tx.disable_kicks()?;
                }
                return Ok(has_more);
            };
            self.muxer.receive(packet, now);
            self.tx.finish(head)?;
        }
        Ok(true)
    }

    fn take_requests(&mut self) {
        for request in self.shared.take_requests() {
            self.muxer.connect(request);
        }
    }

    /// Ends all connections. Sinks get what the guest has sent, within [`STOP_DRAIN_TIMEOUT`].
    fn drain(mut self) -> Option<OwnedFd> {
        let start = Instant::now();
        let mut now = start;
        let mut events = Vec::with_capacity(EVENTS_MAX);
        self.muxer.cut_off(now);
        for fd in [
            self.stop,
            self.rx.kick(),
            self.tx.kick(),
            self.shared.wake.as_fd(),
        ] {
            // The stop event stays readable and would make each wait return at once. What was
            // never watched, because serving failed early, can't be unwatched either.
            let _ = epoll::delete(&self.epoll, fd);
        }
        while !self.muxer.is_empty() {
            let left = STOP_DRAIN_TIMEOUT.saturating_sub(now - start);
            if left.is_zero() || wait(&self.epoll, &mut events, Some(left)).is_err() {
                break;
            }
            now = Instant::now();
            for event in events.drain(..) {
                self.muxer.ready(event.data.u64(), event.flags, now);
            }
        }
        self.muxer.finish(now)
    }
}

/// Waits for events, at most `timeout`.
fn wait(
    epoll: &OwnedFd,
    events: &mut Vec<epoll::Event>,
    timeout: Option<Duration>,
) -> Result<(), DeviceError> {
    events.clear();
    // Seconds of a deadline that is seconds away always fit.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match epoll::wait(epoll, spare_capacity(events), timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(host("epoll_wait")(errno)),
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, token: u64) -> Result<(), DeviceError> {
    let data = epoll::EventData::new_u64(token);
    epoll::add(epoll, fd, data, epoll::EventFlags::IN).map_err(host("epoll_ctl"))
}

/// Makes a kick unreadable.
fn drain(kick: BorrowedFd<'_>) {
    // epoll has just said that it is readable, and nobody else reads it.
    let _ = rustix::io::read(kick, &mut [0_u8; size_of::<u64>()]);
}

fn host(what: &'static str) -> impl Fn(Errno) -> DeviceError {
    move |errno| DeviceError::Host {
        device: NAME,
        what,
        source: errno.into(),
    }
}

fn broken(index: usize) -> impl Fn(virtio_queue::Error) -> DeviceError {
    move |source| DeviceError::Queue {
        device: NAME,
        index,
        source,
    }
}
