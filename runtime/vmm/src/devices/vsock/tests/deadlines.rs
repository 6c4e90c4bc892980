//! What happens to those who wait, without waiting: the muxer is told the time.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use vm_memory::GuestAddress;

use super::super::connection::Pumped;
use super::super::handle::{Request, Shared};
use super::super::muxer::{CLOSE_TIMEOUT, Muxer};
use super::super::packet::Op;
use super::super::queues::{Incoming, PacketQueue};
use super::super::*;
use super::driver::{LISTENING, packet};
use crate::devices::fake::FakeQueue;

/// The first port that a muxer gives to a connection.
const HOST_PORT: u32 = 0x1_0000;

struct Bench {
    shared: Arc<Shared>,
    muxer: Muxer,
    host: UnixStream,
    start: Instant,
}

/// A muxer with one connection asked for.
fn bench() -> Bench {
    let shared = Arc::new(Shared::new().unwrap());
    let epoll: OwnedFd = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let mut muxer = Muxer::new(Arc::clone(&shared), Rc::new(epoll), None);
    let (host, end) = UnixStream::pair().unwrap();
    let start = Instant::now();
    let connect = Connect {
        port: LISTENING,
        host_port: HOST_PORT,
        stream: 5,
        descriptors: Descriptors::Duplex(end.into()),
    };
    muxer.connect(Request {
        connect,
        overdue: start + CONNECT_TIMEOUT,
    });
    Bench {
        shared,
        muxer,
        host,
        start,
    }
}

/// Lets the muxer send into `buffers` rx buffers. Returns how many packets it has sent.
fn pump(bench: &mut Bench, buffers: u32) -> usize {
    let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]);
    let memory = Arc::new(memory);
    let mut queue = FakeQueue::new(&memory, 0);
    for index in 0..buffers {
        queue.add(&[(0x1_0000 + u64::from(index) * 4096, 4096, true)]);
    }
    let mut rx = PacketQueue::new(queue.ready(), &memory, false);
    while bench.muxer.pump(&mut rx, bench.start).unwrap() == Pumped::More {}
    std::iter::from_fn(|| queue.used()).count()
}

fn receive(bench: &mut Bench, op: Op) {
    let header = packet(op, LISTENING, HOST_PORT);
    let payload = Vec::new();
    let packet = Ok(Incoming { header, payload });
    bench.muxer.receive(packet, bench.start);
}

fn take_events(bench: &Bench) -> Vec<VsockEvent> {
    VsockHandle::new(Arc::clone(&bench.shared)).take_events()
}

#[test]
fn guest_that_does_not_answer_a_request_in_time_is_given_up_and_told() {
    let mut bench = bench();
    assert_eq!(pump(&mut bench, 8), 1);

    bench.muxer.expire(bench.start + CONNECT_TIMEOUT);

    let why = Refusal::TimedOut { port: LISTENING };
    let refused = VsockEvent::Refused { stream: 5, why };
    assert_eq!(take_events(&bench), [refused]);
    assert_eq!(pump(&mut bench, 8), 1);
    assert!(bench.muxer.is_empty());
    assert_eq!(bench.muxer.next_deadline(), None);
}

#[test]
fn guest_that_never_heard_of_a_request_is_told_nothing() {
    let mut bench = bench();
    assert_eq!(pump(&mut bench, 0), 0);

    bench.muxer.expire(bench.start + CONNECT_TIMEOUT);

    assert!(bench.muxer.is_empty());
    assert_eq!(pump(&mut bench, 8), 0);
}

#[test]
fn deadline_that_has_not_come_ends_nothing() {
    let mut bench = bench();

    bench
        .muxer
        .expire(bench.start + CONNECT_TIMEOUT - Duration::from_millis(1));

    assert!(!bench.muxer.is_empty());
    assert_eq!(take_events(&bench), []);
}

#[test]
fn accepted_connection_has_no_deadline() {
    let mut bench = bench();
    pump(&mut bench, 8);

    receive(&mut bench, Op::Response);

    assert_eq!(bench.muxer.next_deadline(), None);
    assert!(!bench.muxer.is_empty());
}

#[test]
fn guest_that_never_confirms_the_end_is_reset() {
    let mut bench = bench();
    pump(&mut bench, 8);
    receive(&mut bench, Op::Response);
    bench.host = UnixStream::pair().unwrap().0;
    // The hang-up, as epoll would tell it.
    let token = u64::from(HOST_PORT) << 2 | 2;
    let events = epoll::EventFlags::HUP | epoll::EventFlags::IN;
    bench.muxer.ready(token, events, bench.start);
    assert!(pump(&mut bench, 8) >= 1);
    assert_eq!(
        bench.muxer.next_deadline(),
        Some(bench.start + CLOSE_TIMEOUT)
    );

    bench.muxer.expire(bench.start + CLOSE_TIMEOUT);

    assert!(bench.muxer.is_empty());
    assert_eq!(pump(&mut bench, 8), 1);
    let closed = VsockEvent::Closed {
        stream: 5,
        sent: 0,
        received: 0,
        first_us: 0,
    };
    let connected = VsockEvent::Connected { stream: 5 };
    assert_eq!(take_events(&bench), [connected, closed]);
}
