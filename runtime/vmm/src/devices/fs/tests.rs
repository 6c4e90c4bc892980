//! The device with a real server on a temporary directory, and a driver that writes FUSE by hand.
//! Workers run under their filter: a call that is not on the list ends the test process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::Duration;

use husk_virtiofs::{CachePolicy, Options};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::fake::FakeQueue;
use crate::devices::fd::borrow;
use crate::memory::GuestRam;

/// How long a reply may take, on a machine that is very busy.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

const MEMORY_BYTES: usize = 1 << 20;
/// Where tests put requests and where replies go.
const REQUEST: u64 = 0x8_0000;
const REPLY: u64 = 0x9_0000;
const REPLY_BYTES: u32 = 0x1_0000;
/// No memory is here.
const OUTSIDE: u64 = 0x1000_0000;

const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;

const FUSE_LOOKUP: u32 = 1;
const FUSE_FORGET: u32 = 2;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_WRITE: u32 = 16;
const FUSE_FLUSH: u32 = 25;
const FUSE_INIT: u32 = 26;
const FUSE_CREATE: u32 = 35;
const ROOT: u64 = 1;

/// A device at work, and its driver.
struct Mounted {
    memory: Arc<GuestRam>,
    urgent: FakeQueue,
    requests: Vec<FakeQueue>,
    stop: EventFd,
    running: Option<JoinHandle<(FsDevice, Result<(), DeviceError>)>>,
    server: Arc<Server>,
    share: TempDir,
}

/// Whether this process may take on other identities; without root there is nothing to test.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: serving files in others' names needs root");
    }
    is_root
}

fn device(queues: usize) -> (FsDevice, Arc<Server>, TempDir) {
    let share = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| -> OwnedFd {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, path, flags, Mode::empty()).unwrap()
    };
    let options = Options::single(open("/proc/self/fd".as_ref()), CachePolicy::SHARED);
    let server = Arc::new(Server::new(open(share.path()), options).unwrap());
    let device = FsDevice::new(&server, queues, &Filters::compile().unwrap()).unwrap();
    (device, server, share)
}

impl Mounted {
    fn new(queues: usize) -> Self {
        let (device, server, share) = device(queues);
        let mut mounted = Self::run(device, server, share, queues);
        let reply = mounted.call(FUSE_INIT, 0, &init_arguments());
        assert_eq!(u32_at(&reply, 0), 7);
        mounted
    }

    fn run(mut device: FsDevice, server: Arc<Server>, share: TempDir, queues: usize) -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
        let memory = Arc::new(memory);
        let urgent = FakeQueue::new(&memory, 0);
        let requests: Vec<_> = (1..=queues)
            .map(|at| FakeQueue::new(&memory, at as u64 * FakeQueue::BYTES))
            .collect();
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let activation = Activation {
            memory: Arc::clone(&memory),
            queues: std::iter::once(&urgent)
                .chain(&requests)
                .map(|queue| Some(queue.ready()))
                .collect(),
            features: 0,
            stop: stop.try_clone().unwrap(),
        };
        let running = std::thread::spawn(move || {
            let result = device.run(activation);
            (device, result)
        });
        Self {
            memory,
            urgent,
            requests,
            stop,
            running: Some(running),
            server,
            share,
        }
    }

    fn stop(&mut self) -> (FsDevice, Result<(), DeviceError>) {
        self.stop.write(1).unwrap();
        self.running.take().unwrap().join().unwrap()
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Sends a chain on the first request queue. Returns the bytes used.
    fn send(&mut self, pieces: &[(u64, u32, bool)]) -> u32 {
        let queue = &mut self.requests[0];
        queue.add(pieces);
        used(queue)
    }

    /// Makes a request that succeeds. Returns the body of its reply.
    fn call(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
        let request = request(opcode, node, arguments);
        self.write(REQUEST, &request);
        let request_bytes = u32::try_from(request.len()).unwrap();
        let used = self.send(&[(REQUEST, request_bytes, false), (REPLY, REPLY_BYTES, true)]);
        let reply = self.read(REPLY, used as usize);
        assert_eq!(
            u32_at(&reply, 0),
            used,
            "the length in the header is what was used"
        );
        assert_eq!(u32_at(&reply, 4).cast_signed(), 0, "opcode {opcode} failed");
        reply[OUT_HEADER_BYTES..].to_vec()
    }
}

/// Kicks and waits for the device to use a chain.
fn used(queue: &mut FakeQueue) -> u32 {
    queue.kick();
    loop {
        if let Some((_, bytes)) = queue.used() {
            return bytes;
        }
        let mut fds = [PollFd::from_borrowed_fd(borrow(&queue.irq), PollFlags::IN)];
        let timeout = Timespec::try_from(REPLY_TIMEOUT).unwrap();
        assert_ne!(poll(&mut fds, Some(&timeout)).unwrap(), 0, "no interrupt");
        queue.irq.read().unwrap();
    }
}

fn request(opcode: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
    let length = u32::try_from(IN_HEADER_BYTES + arguments.len()).unwrap();
    let mut bytes = Vec::new();
    bytes.extend(length.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // uid, gid, pid and padding.
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}

fn init_arguments() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [7_u32, 38, 65536, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn malformed_chains_are_given_back_unused_and_the_next_is_served() {
    if !is_root() {
        return;
    }
    let mut mounted = Mounted::new(1);
    std::fs::write(mounted.share.path().join("file"), "x").unwrap();
    let lookup = request(FUSE_LOOKUP, ROOT, b"file\0");
    mounted.write(REQUEST, &lookup);
    let whole = u32::try_from(lookup.len()).unwrap();

    let nothing_to_read = [(REPLY, REPLY_BYTES, true)];
    let outside = [(OUTSIDE, whole, false), (REPLY, REPLY_BYTES, true)];
    let reply_outside = [(REQUEST, whole, false), (OUTSIDE, REPLY_BYTES, true)];
    let wrong_order = [(REPLY, REPLY_BYTES, true), (REQUEST, whole, false)];
    let past_the_end = [
        (MEMORY_BYTES as u64 - 8, 16, false),
        (REPLY, REPLY_BYTES, true),
    ];
    let no_room = [(REQUEST, whole, false), (REPLY, 8, true)];
    let too_long = [(REQUEST, u32::MAX, false), (REPLY, REPLY_BYTES, true)];

    assert_eq!(mounted.send(&nothing_to_read), 0);
    assert_eq!(mounted.send(&outside), 0);
    assert_eq!(mounted.send(&reply_outside), 0);
    assert_eq!(mounted.send(&wrong_order), 0);
    assert_eq!(mounted.send(&past_the_end), 0);
    assert_eq!(mounted.send(&no_room), 0);
    assert_eq!(mounted.send(&too_long), 0);
    let entry = mounted.call(FUSE_LOOKUP, ROOT, b"file\0");
    assert_ne!(u64_at(&entry, 0), 0);
}

#[test]
fn queue_that_lies_about_its_length_fails_the_device_and_stops_all_workers() {
    if !is_root() {
        return;
    }
    let mut mounted = Mounted::new(2);

    mounted.requests[1].set_avail(5000);
    mounted.requests[1].kick.write(1).unwrap();

    let (_device, result) = mounted.running.take().unwrap().join().unwrap();
    assert!(matches!(result, Err(DeviceError::Queue { index: 2, .. })));
}

#[test]
fn file_is_read_in_pieces_of_the_reply_and_written_from_pieces_of_the_request() {
    if !is_root() {
        return;
    }
    let mut mounted = Mounted::new(1);
    let create = [
        u64::from((libc::O_RDWR | libc::O_CREAT).unsigned_abs()) | (0o644 << 32),
        0,
    ];
    let mut arguments = words(&create);
    arguments.extend(b"new\0");
    let created = mounted.call(FUSE_CREATE, ROOT, &arguments);
    let node = u64_at(&created, 0);
    let handle = u64_at(&created, 128);
    let content: Vec<u8> = (0..10_000_u32).map(|at| (at % 251) as u8).collect();
    let write = words(&[handle, 0, content.len() as u64, 0, 0]);
    let header = {
        let mut bytes = request(FUSE_WRITE, node, &write);
        let length = u32::try_from(bytes.len() + content.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes
    };
    mounted.write(REQUEST, &header);
    mounted.write(REQUEST + 0x1000, &content);
    let header_bytes = u32::try_from(header.len()).unwrap();

    let used = mounted.send(&[
        (REQUEST, header_bytes, false),
        (REQUEST + 0x1000, 3, false),
        (REQUEST + 0x1003, 9_997, false),
        (REPLY, REPLY_BYTES, true),
    ]);
    assert_eq!(used, 24);
    mounted.call(FUSE_FLUSH, node, &words(&[handle, 0, 0]));
    let path = mounted.share.path().join("new");
    assert_eq!(std::fs::read(&path).unwrap(), content);

    let read = request(FUSE_READ, node, &words(&[handle, 0, 16_384, 0, 0]));
    mounted.write(REQUEST, &read);
    let read_bytes = u32::try_from(read.len()).unwrap();
    let used = mounted.send(&[
        (REQUEST, read_bytes, false),
        (REPLY, 16, true),
        (REPLY + 0x1000, 100, true),
        (REPLY + 0x1064, 16_284, true),
    ]);
    assert_eq!(used as usize, OUT_HEADER_BYTES + content.len());
    assert_eq!(mounted.read(REPLY + 0x1000, content.len()), content);
}

#[test]
fn every_queue_is_served_and_urgent_requests_get_no_reply() {
    if !is_root() {
        return;
    }
    let mut mounted = Mounted::new(3);
    std::fs::write(mounted.share.path().join("file"), "x").unwrap();
    let lookup = request(FUSE_LOOKUP, ROOT, b"file\0");
    mounted.write(REQUEST, &lookup);
    let lookup_bytes = u32::try_from(lookup.len()).unwrap();
    for queue in &mut mounted.requests {
        queue.add(&[(REQUEST, lookup_bytes, false), (REPLY, REPLY_BYTES, true)]);
        assert!(used(queue) > 16);
    }
    let node = u64_at(&mounted.read(REPLY + 16, 8), 0);
    assert_eq!(mounted.server.counters().inodes, 2);

    let forget = request(FUSE_FORGET, node, &words(&[3]));
    mounted.write(REQUEST, &forget);
    let forget_bytes = u32::try_from(forget.len()).unwrap();
    mounted.urgent.add(&[(REQUEST, forget_bytes, false)]);

    assert_eq!(used(&mut mounted.urgent), 0);
    assert_eq!(mounted.server.counters().inodes, 1);
}

#[test]
fn device_that_was_stopped_serves_again() {
    if !is_root() {
        return;
    }
    let mut mounted = Mounted::new(2);
    let (device, result) = mounted.stop();
    assert!(result.is_ok());
    let server = Arc::clone(&mounted.server);
    let share = std::mem::replace(&mut mounted.share, tempfile::tempdir().unwrap());
    File::create(share.path().join("again")).unwrap();

    let mut mounted = Mounted::run(device, server, share, 2);

    mounted.call(FUSE_INIT, 0, &init_arguments());
    let entry = mounted.call(FUSE_LOOKUP, ROOT, b"again\0");
    let opened = mounted.call(FUSE_OPEN, u64_at(&entry, 0), &words(&[0]));
    assert_eq!(opened.len(), 16);
    assert!(mounted.stop().1.is_ok());
}

#[test]
fn config_space_has_the_tag_and_the_queues_and_ends() {
    if !is_root() {
        return;
    }
    let (device, _server, _share) = device(3);
    let mut whole = [0xff; 48];
    let mut past = [0xff; 4];

    device.read_config(0, &mut whole);
    device.read_config(u64::MAX, &mut past);

    assert_eq!(&whole[..5], b"husk\0");
    assert_eq!(
        whole[CONFIG_TAG_BYTES..],
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(past, [0; 4]);
    assert_eq!(device.profile().queue_sizes.len(), 4);
}

#[test]
fn number_of_queues_has_limits() {
    let share = tempfile::tempdir().unwrap();
    let open = |path: &std::path::Path| OwnedFd::from(File::open(path).unwrap());
    let options = Options::single(open("/proc/self/fd".as_ref()), CachePolicy::SHARED);
    let server = Arc::new(Server::new(open(share.path()), options).unwrap());
    let filters = Filters::compile().unwrap();

    for count in [0, REQUEST_QUEUES_MAX + 1] {
        let refused = FsDevice::new(&server, count, &filters);
        assert!(matches!(refused, Err(FsError::QueueCount { .. })));
    }
}
