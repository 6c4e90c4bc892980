//! A guest's vsock driver, in so far as tests need one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use husk_vmm_control::{HOST_PORT_MIN, monotonic_us};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::packet::{HEADER_BYTES, Header, Op, TYPE_STREAM};
use super::super::*;
use crate::device::{Activation, Device, DeviceError};
use crate::devices::fake::FakeQueue;
use crate::devices::fd::borrow;
use crate::memory::GuestRam;
use crate::seccomp::{Filters, ThreadKind};

/// What the fake guest says of its receive buffers.
pub(super) const GUEST_BUF_ALLOC: u32 = 128 * 1024;

/// The port on which the fake guest listens.
pub(super) const LISTENING: u32 = 0x1_2345;

/// The port of ours that the connection of that name has.
pub(super) fn host_port(stream: u64) -> u32 {
    HOST_PORT_MIN + u32::try_from(stream).unwrap()
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// A test that waits for longer has failed.
const DEADLINE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// [`HEADER_BYTES`] as descriptors count.
pub(super) const HEADER_LENGTH: u32 = 44;

const RX_QUEUE: u64 = 0;
const TX_QUEUE: u64 = FakeQueue::BYTES;
const RX_BUFFERS: u64 = 0x10_0000;
pub(super) const RX_BUFFER_BYTES: u32 = 4096;
/// Where tests put packets to send: the last 8 MiB of 16.
pub(super) const TX_DATA: u64 = 0x80_0000;
const MEMORY_BYTES: usize = 0x100_0000;

/// A running device with its driver and its host.
pub(super) struct Guest {
    pub(super) handle: VsockHandle,
    pub(super) agent: UnixStream,
    pub(super) rx: FakeQueue,
    pub(super) tx: FakeQueue,
    events: VecDeque<VsockEvent>,
    memory: Arc<GuestRam>,
    stop: EventFd,
    thread: Option<JoinHandle<(VsockDevice, Result<(), DeviceError>)>>,
}

/// A connection as the fake guest sees it.
#[derive(Clone, Copy)]
pub(super) struct Socket {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

impl Guest {
    /// A device whose driver has filled the rx queue.
    pub(super) fn new() -> Self {
        Self::with_rx_buffers(128)
    }

    pub(super) fn with_rx_buffers(count: u32) -> Self {
        let (agent, device_end) = UnixStream::pair().unwrap();
        let (device, handle) = VsockDevice::new(device_end.into()).unwrap();
        Self::start(device, handle, agent, count, 0)
    }

    /// A device that shares an event index with its driver.
    pub(super) fn with_event_idx() -> Self {
        let (agent, device_end) = UnixStream::pair().unwrap();
        let (device, handle) = VsockDevice::new(device_end.into()).unwrap();
        let features = 1 << VIRTIO_RING_F_EVENT_IDX;
        Self::start(device, handle, agent, 128, features)
    }

    pub(super) fn start(
        mut device: VsockDevice,
        handle: VsockHandle,
        agent: UnixStream,
        rx_buffers: u32,
        features: u64,
    ) -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let memory = Arc::new(memory);
        let mut rx = FakeQueue::new(&memory, RX_QUEUE);
        let mut tx = FakeQueue::new(&memory, TX_QUEUE);
        rx.has_event_idx = features != 0;
        tx.has_event_idx = features != 0;
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            handle,
            agent,
            rx,
            tx,
            events: VecDeque::new(),
            memory,
            stop,
            thread: None,
        };
        guest.add_rx_buffers(rx_buffers);
        let activation = Activation {
            memory: Arc::clone(&guest.memory),
            queues: vec![Some(guest.rx.ready()), Some(guest.tx.ready()), None],
            features,
            stop: guest.stop.try_clone().unwrap(),
        };
        guest.thread = Some(std::thread::spawn(move || {
            // Every test of the device is one of its filter too: a call that is not on the list
            // ends the process.
            let filters = FILTERS.get_or_init(|| Filters::compile().unwrap());
            filters.install(ThreadKind::Vsock).unwrap();
            let result = device.run(activation);
            (device, result)
        }));
        guest
    }

    /// Offers more buffers, as Linux does: one descriptor each.
    pub(super) fn add_rx_buffers(&mut self, count: u32) {
        for index in 0..count {
            let at = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER_BYTES);
            self.rx.add(&[(at, RX_BUFFER_BYTES, true)]);
        }
        self.rx.kick();
    }

    /// Stops the device as a reset does. Returns it with what it said.
    pub(super) fn stop(&mut self) -> (VsockDevice, Result<(), DeviceError>) {
        self.stop.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }

    /// Waits until the device has given up by itself.
    pub(super) fn join(&mut self) -> Result<(), DeviceError> {
        self.thread.take().unwrap().join().unwrap().1
    }

    /// Sends a packet and waits until the device has taken it.
    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        self.write(TX_DATA, &header.encode());
        self.write(TX_DATA + HEADER_BYTES as u64, payload);
        let bytes = u32::try_from(HEADER_BYTES + payload.len()).unwrap();
        self.send_chain(&[(TX_DATA, bytes, false)]);
    }

    /// Sends any chain and waits until the device has taken it.
    pub(super) fn send_chain(&mut self, pieces: &[(u64, u32, bool)]) {
        self.tx.add(pieces);
        self.tx.kick();
        loop {
            if let Some((_, bytes)) = self.tx.used() {
                assert_eq!(bytes, 0);
                return;
            }
            wait_for(borrow(&self.tx.irq));
            self.tx.irq.read().unwrap();
        }
    }

    /// The next packet from the host.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            wait_for(borrow(&self.rx.irq));
            self.rx.irq.read().unwrap();
        }
    }

    /// The next packet from the host, if it is there.
    pub(super) fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, bytes) = self.rx.used()?;
        // Heads and buffers are used in the same turn.
        let at = RX_BUFFERS + u64::from(head) % 128 * u64::from(RX_BUFFER_BYTES);
        let mut header = [0; HEADER_BYTES];
        self.memory
            .read_slice(&mut header, GuestAddress(at))
            .unwrap();
        let header = Header::parse(&header);
        let mut payload = vec![0; bytes as usize - HEADER_BYTES];
        assert_eq!(payload.len(), header.payload_bytes as usize);
        let start = GuestAddress(at + HEADER_BYTES as u64);
        self.memory.read_slice(&mut payload, start).unwrap();
        self.rx.add(&[(at, RX_BUFFER_BYTES, true)]);
        self.rx.kick();
        Some((header, payload))
    }

    /// The next packet from the host, which has to be this operation.
    pub(super) fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op);
        header
    }

    /// The RST that comes after any number of credit updates.
    pub(super) fn expect_reset(&mut self) {
        let mut op = Op::CreditUpdate;
        while op == Op::CreditUpdate {
            op = self.receive().0.op;
        }
        assert_eq!(op, Op::Reset);
    }

    /// Asserts that the device has nothing to say. Answers for unknown connections come before
    /// what connections have to say, and so the second probe comes after all of that.
    pub(super) fn expect_nothing(&mut self) {
        for probe in [0xdead, 0xbeef] {
            self.send(&packet(Op::CreditRequest, probe, probe), &[]);
            let (header, _) = self.receive();
            assert_eq!((header.op, header.dst_port), (Op::Reset, probe));
        }
    }

    /// A connection from the host, accepted.
    pub(super) fn connect(&mut self, stream: u64, descriptors: Descriptors) -> Socket {
        let socket = self.request(stream, descriptors);
        self.send(&socket.packet(Op::Response), &[]);
        assert_eq!(self.event(), VsockEvent::Connected { stream });
        socket
    }

    /// A connection from the host, not yet answered.
    pub(super) fn request(&mut self, stream: u64, descriptors: Descriptors) -> Socket {
        let connect = Connect {
            port: LISTENING,
            host_port: host_port(stream),
            stream,
            descriptors,
        };
        self.handle.connect(connect).unwrap();
        let header = self.expect(Op::Request);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        assert_eq!(header.buf_alloc, RECEIVE_BUFFER_BYTES);
        assert_eq!(header.dst_port, LISTENING);
        assert_eq!(header.src_port, host_port(stream));
        Socket {
            guest_port: LISTENING,
            host_port: header.src_port,
        }
    }

    /// A duplex connection and its other end.
    pub(super) fn connect_duplex(&mut self, stream: u64) -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let socket = self.connect(stream, Descriptors::Duplex(theirs.into()));
        (socket, ours)
    }

    /// The next event of the handle. Its time is compared with the clock and left out: zero.
    pub(super) fn event(&mut self) -> VsockEvent {
        if self.events.is_empty() {
            wait_for(self.handle.events_fd());
            self.events.extend(self.handle.take_events());
        }
        let mut event = self.events.pop_front().unwrap();
        if let VsockEvent::Closed {
            received, first_us, ..
        } = &mut event
        {
            assert_eq!(*received > 0, *first_us > 0);
            assert!(*first_us <= monotonic_us());
            *first_us = 0;
        }
        event
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().unwrap().1.unwrap();
        }
    }
}

impl Socket {
    pub(super) fn packet(self, op: Op) -> Header {
        packet(op, self.guest_port, self.host_port)
    }

    pub(super) fn data(self, payload: &[u8]) -> Header {
        Header {
            payload_bytes: u32::try_from(payload.len()).unwrap(),
            ..self.packet(Op::ReadWrite)
        }
    }

    pub(super) fn shutdown(self, flags: u32) -> Header {
        Header {
            flags,
            ..self.packet(Op::Shutdown)
        }
    }
}

/// A packet of the guest that is right in every field.
pub(super) fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        payload_bytes: 0,
        socket_type: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: GUEST_BUF_ALLOC,
        fwd_cnt: 0,
    }
}

/// Only one descriptor.
pub(super) fn source(fd: impl Into<OwnedFd>) -> Descriptors {
    Descriptors::Split {
        source: Some(fd.into()),
        sink: None,
    }
}

/// See [`source`].
pub(super) fn sink(fd: impl Into<OwnedFd>) -> Descriptors {
    Descriptors::Split {
        source: None,
        sink: Some(fd.into()),
    }
}

/// Waits until a descriptor is readable.
pub(super) fn wait_for(fd: impl AsFd) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&DEADLINE)).unwrap(), 1, "timed out");
}

/// Bytes whose order shows: the period has nothing in common with any buffer's size.
pub(super) fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250).cycle().take(bytes).collect()
}
