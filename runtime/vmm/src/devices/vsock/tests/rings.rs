//! Buffers of the driver: each is used once, in order, or kept for later.

use std::io;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use vm_memory::GuestAddress;

use super::super::io::{Endpoint, Slice};
use super::super::packet::Op;
use super::super::queues::{Filled, PacketQueue, total};
use super::driver::packet;
use crate::devices::fake::FakeQueue;
use crate::memory::GuestRam;

/// Where buffers are put: no test fills more than one page of each.
const BUFFERS: u64 = 0x1_0000;

struct Bench {
    memory: Arc<GuestRam>,
    driver: FakeQueue,
}

fn bench(buffers: &[u32]) -> Bench {
    let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]);
    let memory = Arc::new(memory);
    let mut driver = FakeQueue::new(&memory, 0);
    for (bytes, at) in buffers.iter().zip(0..) {
        driver.add(&[(BUFFERS + at * 4096, *bytes, true)]);
    }
    Bench { memory, driver }
}

fn fill(rx: &mut PacketQueue<'_>, read: impl FnOnce(&[Slice<'_>]) -> io::Result<usize>) -> Filled {
    let header = packet(Op::ReadWrite, 1, 2);
    rx.fill(&header, 8000, read).unwrap()
}

fn used(driver: &mut FakeQueue) -> Vec<(u16, u32)> {
    std::iter::from_fn(|| driver.used()).collect()
}

#[test]
fn buffer_without_room_between_others_is_given_back_in_its_turn() {
    let mut bench = bench(&[4096, 44, 4096]);
    let mut rx = PacketQueue::new(bench.driver.ready(), &bench.memory, false);

    for _ in 0..2 {
        let filled = fill(&mut rx, |slices| Ok(total(slices)));
        assert!(matches!(filled, Filled::Bytes(4052)));
    }

    assert_eq!(used(&mut bench.driver), [(0, 4096), (1, 0), (2, 4096)]);
}

#[test]
fn buffers_that_a_short_read_left_empty_serve_the_next_packet() {
    let mut bench = bench(&[4096, 4096]);
    let mut rx = PacketQueue::new(bench.driver.ready(), &bench.memory, false);

    fill(&mut rx, |_| Ok(10));
    assert!(rx.send(&packet(Op::Reset, 1, 2)).unwrap());

    assert_eq!(used(&mut bench.driver), [(0, 54), (1, 44)]);
}

#[test]
fn failed_read_costs_no_buffer() {
    let mut bench = bench(&[4096, 4096]);
    let mut rx = PacketQueue::new(bench.driver.ready(), &bench.memory, false);

    let filled = fill(&mut rx, |_| Err(io::ErrorKind::WouldBlock.into()));
    assert!(matches!(filled, Filled::Failed(_)));
    assert_eq!(used(&mut bench.driver), []);

    let filled = fill(&mut rx, |slices| Ok(total(slices)));
    assert!(matches!(filled, Filled::Bytes(8000)));
    assert_eq!(used(&mut bench.driver), [(0, 4096), (1, 3992)]);
}

#[test]
fn descriptor_that_others_share_is_no_longer_watched_when_it_is_closed() {
    let (mut host, ours) = UnixStream::pair().unwrap();
    let shared = ours.try_clone().unwrap();
    let epoll = Rc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
    let endpoint = Endpoint::new(ours.into(), &epoll, 1, epoll::EventFlags::IN).unwrap();

    drop(endpoint);

    io::Write::write_all(&mut host, b"for the others").unwrap();
    let mut events = Vec::with_capacity(1);
    let at_once = Some(&Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    });
    epoll::wait(&epoll, spare_capacity(&mut events), at_once).unwrap();
    assert!(events.is_empty());
    drop(shared);
}
