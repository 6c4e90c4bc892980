//! The device with a fake driver, and a socket that keeps frames apart in place of the tap.

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::devices::fake::FakeQueue;
use crate::memory::GuestRam;
use crate::seccomp::{Filters, ThreadKind};

/// Where buffers are.
const DATA: u64 = 0x8_0000;
/// No memory is here.
const OUTSIDE: u64 = 0x1000_0000;
const MEMORY_BYTES: usize = 0x80_0000;

struct Bench {
    memory: Arc<GuestRam>,
    receive: FakeQueue,
    transmit: FakeQueue,
    device: NetDevice,
    socket: Socket,
    cable: OwnedFd,
    features: u64,
}

impl Bench {
    fn new() -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let memory = Arc::new(memory);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (tap, cable) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        let mac = [2, 0, 0, 0, 0, 9];
        let (device, socket) = NetDevice::with(Some((mac, Tap::of_socket(tap)))).unwrap();
        Self {
            receive: FakeQueue::new(&memory, 0),
            transmit: FakeQueue::new(&memory, FakeQueue::BYTES),
            memory,
            device,
            socket,
            cable,
            features: 1 << VIRTIO_NET_F_MRG_RXBUF,
        }
    }

    fn without_merging(mut self) -> Self {
        self.features = 0;
        self
    }

    /// Runs the device until it has nothing more to do. The stop is seen only after both queues
    /// were looked at, so nothing has to be waited for.
    fn run(&mut self) -> Traffic {
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        stop.write(1).unwrap();
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues: vec![Some(self.receive.ready()), Some(self.transmit.ready())],
            features: self.features,
            stop,
        };
        let filters = Filters::compile().unwrap();
        let device = &mut self.device;
        std::thread::scope(|scope| {
            let run = || {
                // A system call that is not on the list of its threads ends the process.
                filters.install(ThreadKind::Net).unwrap();
                device.run(activation)
            };
            scope.spawn(run).join().unwrap().unwrap();
        });
        self.socket.traffic()
    }

    fn plug_in(&self, frame: &[u8]) {
        rustix::net::send(&self.cable, frame, SendFlags::empty()).unwrap();
    }

    fn taken(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        let (bytes, _) = rustix::net::recv(&self.cable, &mut frame[..], RecvFlags::empty()).ok()?;
        frame.truncate(bytes);
        Some(frame)
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }
}

/// A frame with a header of zeros.
fn frame(bytes: usize) -> Vec<u8> {
    let packet = (0..=250_u8).cycle().take(bytes - HEADER_BYTES);
    std::iter::repeat_n(0, HEADER_BYTES).chain(packet).collect()
}

#[test]
fn what_is_no_frame_is_not_sent_and_comes_back() {
    let mut bench = Bench::new();
    let header = u32::try_from(HEADER_BYTES).unwrap();
    bench.transmit.add(&[(OUTSIDE, 100, false)]);
    bench.transmit.add(&[(DATA, header, false)]);
    bench.transmit.add(&[(DATA, 100, true)]);
    bench.transmit.add(&[(DATA, 0x10_0000, false)]);
    bench.transmit.add(&[(DATA, u32::MAX, false)]);
    bench.transmit.add_head(9999);

    let traffic = bench.run();

    assert_eq!(bench.taken(), None);
    assert_eq!(traffic.dropped_frames, 6);
    let used: Vec<_> = std::iter::from_fn(|| bench.transmit.used()).collect();
    assert_eq!(used, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]);
}

#[test]
fn what_is_no_buffer_comes_back_empty() {
    let mut bench = Bench::new();
    bench.receive.add(&[(OUTSIDE, 2000, true)]);
    bench.receive.add(&[(DATA, 2000, false)]);
    bench.receive.add(&[(DATA, 12, true)]);
    bench.receive.add_head(9999);
    bench.receive.add(&[(DATA, 2000, true)]);
    bench.plug_in(&frame(100));

    let traffic = bench.run();

    let used: Vec<_> = std::iter::from_fn(|| bench.receive.used()).collect();
    assert_eq!(used, [(0, 0), (1, 0), (2, 0), (3, 100)]);
    assert_eq!(traffic.received_frames, 1);
}

#[test]
fn available_index_out_of_range_fails_the_device() {
    let mut bench = Bench::new();
    bench.transmit.set_avail(1000);
    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let activation = Activation {
        memory: Arc::clone(&bench.memory),
        queues: vec![None, Some(bench.transmit.ready())],
        features: 0,
        stop,
    };

    let failure = bench.device.run(activation).unwrap_err();

    assert!(matches!(failure, DeviceError::Queue { index: 1, .. }));
}

#[test]
fn frames_are_sent_in_order_and_whole() {
    let mut bench = Bench::new();
    let (first, second) = (frame(1514), frame(60_000));
    bench.write(DATA, &first);
    bench.write(DATA + 0x1000, &second);
    bench
        .transmit
        .add(&[(DATA, 12, false), (DATA + 12, 1502, false)]);
    bench.transmit.add(&[
        (DATA + 0x1000, 30_000, false),
        (DATA + 0x1000 + 30_000, 30_000, false),
    ]);

    let traffic = bench.run();

    assert_eq!(bench.taken(), Some(first));
    assert_eq!(bench.taken(), Some(second));
    assert_eq!(bench.taken(), None);
    assert_eq!((traffic.sent_frames, traffic.sent_bytes), (2, 61_514));
    assert_eq!(bench.transmit.used(), Some((0, 0)));
    assert_eq!(bench.transmit.used(), Some((2, 0)));
}

#[test]
fn long_frame_is_spread_over_buffers_that_appear_together() {
    let mut bench = Bench::new();
    for number in 0..64 {
        bench.receive.add(&[(DATA + number * 0x1000, 1536, true)]);
    }
    let long = frame(4000);
    bench.plug_in(&long);
    bench.plug_in(&frame(100));

    bench.run();

    assert_eq!(bench.receive.used(), Some((0, 1536)));
    assert_eq!(bench.receive.used(), Some((1, 1536)));
    assert_eq!(bench.receive.used(), Some((2, 928)));
    assert_eq!(bench.receive.used(), Some((3, 100)));
    let header = bench.read(DATA, HEADER_BYTES);
    assert_eq!(header[COUNT..], [3, 0]);
    let mut seen = bench.read(DATA, 1536);
    seen.extend(bench.read(DATA + 0x1000, 1536));
    seen.extend(bench.read(DATA + 0x2000, 928));
    assert_eq!(seen[HEADER_BYTES..], long[HEADER_BYTES..]);
    assert_eq!(bench.read(DATA + 0x3000, HEADER_BYTES)[COUNT..], [1, 0]);
}

/// Where `num_buffers` is.
const COUNT: usize = 10;

#[test]
fn frame_waits_for_buffers_and_is_not_cut() {
    let mut bench = Bench::new();
    bench.receive.add(&[(DATA, 1536, true)]);
    let long = frame(3000);
    bench.plug_in(&long);

    let stop = EventFd::new(EFD_NONBLOCK).unwrap();
    let activation = Activation {
        memory: Arc::clone(&bench.memory),
        queues: vec![Some(bench.receive.ready()), None],
        features: bench.features,
        stop: stop.try_clone().unwrap(),
    };
    let Bench {
        device, receive, ..
    } = &mut bench;
    let used = std::thread::scope(|scope| {
        let running = scope.spawn(move || device.run(activation));
        assert_eq!(receive.used(), None);
        receive.add(&[(DATA + 1536, 1536, true)]);
        receive.kick.write(1).unwrap();
        let fd = borrow(&receive.irq);
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).unwrap();
        stop.write(1).unwrap();
        running.join().unwrap().unwrap();
        [receive.used(), receive.used()]
    });

    assert_eq!(used, [Some((0, 1536)), Some((1, 1464))]);
    assert_eq!(bench.read(DATA, 3000)[HEADER_BYTES..], long[HEADER_BYTES..]);
    assert_eq!(bench.read(DATA, HEADER_BYTES)[COUNT..], [2, 0]);
}

#[test]
fn frame_longer_than_its_one_buffer_is_dropped() {
    let mut bench = Bench::new().without_merging();
    bench.receive.add(&[(DATA, 1000, true)]);
    bench.receive.add(&[(DATA + 0x1000, 1000, true)]);
    bench.plug_in(&frame(1500));
    bench.plug_in(&frame(900));

    let traffic = bench.run();

    assert_eq!((traffic.dropped_frames, traffic.received_frames), (1, 1));
    assert_eq!(bench.receive.used(), Some((0, 900)));
    assert_eq!(bench.read(DATA, HEADER_BYTES)[COUNT..], [1, 0]);
}

#[test]
fn header_in_pieces_is_written_across_them() {
    let mut bench = Bench::new();
    bench.receive.add(&[
        (DATA, 7, true),
        (DATA + 7, 4, true),
        (DATA + 11, 1600, true),
    ]);
    bench.plug_in(&frame(500));

    bench.run();

    assert_eq!(bench.receive.used(), Some((0, 500)));
    assert_eq!(bench.read(DATA, HEADER_BYTES)[COUNT..], [1, 0]);
}

#[test]
fn driver_without_buffers_leaves_frames_where_they_are() {
    let mut bench = Bench::new();
    bench.plug_in(&frame(100));

    assert_eq!(bench.run().received_frames, 0);

    bench.receive.add(&[(DATA, 2000, true)]);
    assert_eq!(bench.run().received_frames, 1);
}

#[test]
fn config_tells_the_address_and_that_the_link_is_up() {
    let bench = Bench::new();
    let mut config = [0xff; 10];

    bench.device.read_config(0, &mut config);

    assert_eq!(config, [2, 0, 0, 0, 0, 9, 1, 0, 0, 0]);
}

#[test]
fn anything_but_a_tap_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(NetDevice::new(Some(([2; 6], file.into()))).is_err());
}

#[test]
fn without_a_tap_frames_are_lost_and_none_come() {
    let mut bench = Bench::new();
    bench.write(DATA, &frame(100));
    bench.transmit.add(&[(DATA, 100, false)]);
    bench.receive.add(&[(DATA + 0x1000, 2000, true)]);
    bench.plug_in(&frame(100));
    bench.socket.plug(None).unwrap();

    let traffic = bench.run();

    assert_eq!((traffic.dropped_frames, traffic.received_frames), (1, 0));
    assert_eq!(bench.transmit.used(), Some((0, 0)));
    assert_eq!(bench.receive.used(), None);
}

#[test]
fn tap_that_is_pulled_out_while_there_is_no_driver_is_closed() {
    let mut bench = Bench::new();
    bench.run();
    assert_eq!(bench.taken(), None);

    bench.socket.plug(None).unwrap();

    let end_of_stream = Some(Vec::new());
    assert_eq!(bench.taken(), end_of_stream);
}

#[test]
fn device_without_an_address_leaves_it_to_the_driver() {
    let (device, _socket) = NetDevice::with(None).unwrap();
    assert_eq!(device.profile().features & (1 << VIRTIO_NET_F_MAC), 0);
}
