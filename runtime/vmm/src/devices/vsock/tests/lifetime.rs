//! From REQUEST to RST, in every order.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use husk_vmm_control::HOST_PORT_MIN;

use super::super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::*;
use super::driver::*;

fn closed(stream: u64, sent: u64, received: u64) -> VsockEvent {
    VsockEvent::Closed {
        stream,
        sent,
        received,
        first_us: 0,
    }
}

#[test]
fn guest_reaches_the_agent_port_once() {
    let mut guest = Guest::new();
    let request = packet(Op::Request, 700, AGENT_PORT);
    guest.send(&request, &[]);
    guest.expect(Op::Response);

    let second = packet(Op::Request, 701, AGENT_PORT);
    guest.send(&second, &[]);

    assert_eq!(guest.receive().0, second.reset_reply());
    let socket = Socket {
        guest_port: 700,
        host_port: AGENT_PORT,
    };
    guest.send(&socket.data(b"ping"), b"ping");
    let mut word = [0; 4];
    guest.agent.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    guest.agent.write_all(b"pong!").unwrap();
    assert_eq!(guest.receive().1, b"pong!");
    guest.send(&socket.packet(Op::Reset), &[]);
    let over = VsockEvent::AgentClosed {
        sent: 5,
        received: 4,
    };
    assert_eq!(guest.event(), over);
    guest.send(&request, &[]);
    guest.expect(Op::Reset);
}

#[test]
fn nothing_listening_is_a_refusal() {
    let mut guest = Guest::new();
    let (mut host, end) = UnixStream::pair().unwrap();
    let socket = guest.request(5, Descriptors::Duplex(end.into()));

    guest.send(&socket.packet(Op::Reset), &[]);

    let why = Refusal::NotListening { port: LISTENING };
    assert_eq!(guest.event(), VsockEvent::Refused { stream: 5, why });
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    guest.expect_nothing();
}

#[test]
fn bytes_flow_both_ways() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);

    host.write_all(b"to the guest").unwrap();
    guest.send(&socket.data(b"to the host"), b"to the host");

    let (header, payload) = guest.receive();
    assert_eq!(
        (header.op, payload.as_slice()),
        (Op::ReadWrite, b"to the guest".as_slice())
    );
    let mut text = [0; 11];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");
}

#[test]
fn host_ends_first() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    host.write_all(b"last words").unwrap();

    host.shutdown(Shutdown::Write).unwrap();

    assert_eq!(guest.receive().1, b"last words");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send(&socket.data(b"reply"), b"reply");
    guest.send(&socket.shutdown(SHUTDOWN_SEND), &[]);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "reply");
    assert_eq!(guest.event(), closed(5, 10, 5));
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    guest.send(&socket.packet(Op::Reset), &[]);
    guest.expect_nothing();
    assert_eq!(guest.handle.counters().open, 0);
}

#[test]
fn guest_ends_first() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);

    guest.send(&socket.data(b"question"), b"question");
    guest.send(&socket.shutdown(SHUTDOWN_SEND), &[]);

    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    host.write_all(b"answer").unwrap();
    drop(host);
    assert_eq!(guest.receive().1, b"answer");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    assert_eq!(guest.event(), closed(5, 6, 8));
    guest.send(&socket.packet(Op::Reset), &[]);
    guest.expect_nothing();
}

#[test]
fn close_of_the_guest_is_confirmed_with_reset_and_its_bytes_arrive() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);

    guest.send(&socket.data(b"bye"), b"bye");
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);

    guest.expect(Op::Reset);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    assert!(host.write_all(b"nobody reads").is_err());
    assert_eq!(guest.event(), closed(5, 0, 3));
    assert_eq!(guest.handle.counters().open, 0);
}

#[test]
fn guest_that_receives_no_more_ends_only_that_direction() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);

    guest.send(&socket.shutdown(SHUTDOWN_RECEIVE), &[]);
    guest.send(&socket.data(b"still here"), b"still here");

    let mut text = [0; 10];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still here");
    assert!(host.write_all(b"nobody reads").is_err());
    guest.send(&socket.shutdown(SHUTDOWN_SEND), &[]);
    guest.expect(Op::Reset);
    assert_eq!(guest.event(), closed(5, 0, 10));
}

#[test]
fn host_that_goes_away_ends_both_directions() {
    let mut guest = Guest::new();
    let (socket, host) = guest.connect_duplex(5);

    drop(host);

    assert_eq!(guest.event(), closed(5, 0, 0));
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        flags |= guest.expect(Op::Shutdown).flags;
    }
    // What was on its way is swallowed.
    guest.send(&socket.data(b"late"), b"late");
    guest.expect_nothing();
    guest.send(&socket.packet(Op::Reset), &[]);
    guest.expect_nothing();
    assert_eq!(guest.handle.counters().open, 0);
}

#[test]
fn both_sides_that_close_at_once_agree() {
    let mut guest = Guest::new();
    let (socket, host) = guest.connect_duplex(5);
    drop(host);
    assert_eq!(guest.event(), closed(5, 0, 0));

    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);

    let mut header = guest.receive().0;
    while header.op == Op::Shutdown {
        header = guest.receive().0;
    }
    assert_eq!(header.op, Op::Reset);
    guest.expect_nothing();
}

#[test]
fn reset_of_the_guest_ends_everything_but_loses_nothing() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    guest.send(&socket.data(b"all of it"), b"all of it");

    guest.send(&socket.packet(Op::Reset), &[]);

    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "all of it");
    assert_eq!(guest.event(), closed(5, 0, 9));
}

#[test]
fn closed_comes_after_the_last_byte_is_written() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    let payload = pattern(65536);
    for _ in 0..6 {
        guest.send(&socket.data(&payload), &payload);
    }
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
    guest.expect_reset();
    assert_eq!(guest.handle.take_events(), []);

    let mut data = Vec::new();
    host.read_to_end(&mut data).unwrap();

    assert_eq!(data, payload.repeat(6));
    assert_eq!(guest.event(), closed(5, 0, 6 * 65536));
}

#[test]
fn packet_for_another_port_of_the_guest_does_not_reach_the_connection() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    let stranger = Header {
        src_port: 1,
        ..socket.packet(Op::Shutdown)
    };

    guest.send(&stranger, &[]);

    assert_eq!(guest.receive().0, stranger.reset_reply());
    assert_eq!(guest.handle.counters().open, 1);
}

#[test]
fn port_of_ours_that_is_in_use_or_none_is_refused() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    for host_port in [socket.host_port, 0, AGENT_PORT, HOST_PORT_MIN - 1, u32::MAX] {
        let null = std::fs::File::open("/dev/null").unwrap();
        let connect = Connect {
            port: LISTENING,
            host_port,
            stream: 6,
            descriptors: sink(null),
        };
        guest.handle.connect(connect).unwrap();

        let why = Refusal::HostPort { port: host_port };
        assert_eq!(guest.event(), VsockEvent::Refused { stream: 6, why });
    }

    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
    guest.expect(Op::Reset);
    assert_eq!(guest.event(), closed(5, 0, 0));
    // Of a connection that is over it may be had again, though nobody should.
    guest.connect_duplex(5);
}

#[test]
fn request_waits_for_rx_buffers() {
    let mut guest = Guest::with_rx_buffers(0);
    let (_host, end) = UnixStream::pair().unwrap();
    let connect = Connect {
        port: LISTENING,
        host_port: host_port(5),
        stream: 5,
        descriptors: Descriptors::Duplex(end.into()),
    };
    guest.handle.connect(connect).unwrap();

    guest.add_rx_buffers(128);

    guest.expect(Op::Request);
}

#[test]
fn request_made_before_the_driver_is_up_is_sent_when_it_is() {
    let (agent, device_end) = UnixStream::pair().unwrap();
    let (device, handle) = VsockDevice::new(device_end.into()).unwrap();
    let (_host, end) = UnixStream::pair().unwrap();
    let connect = Connect {
        port: LISTENING,
        host_port: host_port(5),
        stream: 5,
        descriptors: Descriptors::Duplex(end.into()),
    };
    handle.connect(connect).unwrap();

    let mut guest = Guest::start(device, handle, agent, 128, 0);

    guest.expect(Op::Request);
}

#[test]
fn too_many_requests_before_the_driver_is_up_are_not_taken() {
    let (_agent, device_end) = UnixStream::pair().unwrap();
    let (_device, handle) = VsockDevice::new(device_end.into()).unwrap();
    let connect = |stream| {
        let null = std::fs::File::open("/dev/null").unwrap();
        let descriptors = source(null);
        handle.connect(Connect {
            port: LISTENING,
            host_port: host_port(stream),
            stream,
            descriptors,
        })
    };
    for stream in 0..CONNECTS_WAITING_MAX as u64 {
        connect(stream).unwrap();
    }

    assert!(connect(999_999).is_err());
}

#[test]
fn reset_of_the_device_closes_everything_and_it_can_start_again() {
    let mut guest = Guest::new();
    let (_socket, mut host) = guest.connect_duplex(5);
    let (mut asking, end) = UnixStream::pair().unwrap();
    guest.request(6, Descriptors::Duplex(end.into()));

    let (device, result) = guest.stop();

    result.unwrap();
    let mut events = guest.handle.take_events();
    events.sort_by_key(|event| format!("{event:?}"));
    let why = Refusal::DeviceStopped;
    let refused = VsockEvent::Refused { stream: 6, why };
    assert_eq!(events, [closed(5, 0, 0), refused]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(asking.read(&mut [0]).unwrap(), 0);

    let agent = guest.agent.try_clone().unwrap();
    let mut again = Guest::start(device, guest.handle.clone(), agent, 128, 0);
    again.send(&packet(Op::Request, 700, AGENT_PORT), &[]);
    again.expect(Op::Response);
}

#[test]
fn ten_thousand_connections_one_after_the_other_leave_nothing() {
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut guest = Guest::new();
    let before = descriptors();

    for stream in 0..10_000 {
        let (socket, mut host) = guest.connect_duplex(stream);
        guest.send(&socket.data(b"x"), b"x");
        guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
        guest.expect(Op::Reset);
        let mut text = String::new();
        host.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
        assert_eq!(guest.event(), closed(stream, 0, 1));
    }

    assert_eq!(guest.handle.counters().open, 0);
    assert_eq!(guest.handle.counters().connections, 10_000);
    // Other tests of this process have descriptors of their own, but not thousands.
    assert!(descriptors() < before + 2000);
}

#[test]
fn connection_beyond_the_limit_is_refused() {
    let mut guest = Guest::new();
    for stream in 0..CONNECTIONS_MAX as u64 {
        let null = std::fs::File::open("/dev/null").unwrap();
        guest.request(stream, sink(null));
    }

    let null = std::fs::File::open("/dev/null").unwrap();
    let connect = Connect {
        port: LISTENING,
        host_port: host_port(7777),
        stream: 7777,
        descriptors: sink(null),
    };
    guest.handle.connect(connect).unwrap();

    let why = Refusal::TooMany {
        max: CONNECTIONS_MAX,
    };
    assert_eq!(guest.event(), VsockEvent::Refused { stream: 7777, why });
}
