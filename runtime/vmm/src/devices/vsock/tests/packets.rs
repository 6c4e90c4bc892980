//! What the device does with packets that are wrong.

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::proptest;

use super::super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::super::*;
use super::driver::*;
use crate::devices::fd::borrow;

#[test]
fn packets_that_nobody_can_answer_are_dropped() {
    let mut guest = Guest::new();
    let right = packet(Op::Request, 1, 2);
    guest.write(TX_DATA, &right.encode());

    guest.send_chain(&[(TX_DATA, HEADER_LENGTH - 1, false)]);
    guest.send_chain(&[(TX_DATA, 0, false)]);
    guest.send_chain(&[(TX_DATA, HEADER_LENGTH, true)]);
    guest.send_chain(&[(0x5000_0000, HEADER_LENGTH, false)]);
    guest.send_chain(&[(u64::MAX - 8, HEADER_LENGTH, false)]);
    guest.send(
        &Header {
            src_cid: 4,
            ..right
        },
        &[],
    );
    guest.send(&packet(Op::Reset, 1, 2), &[]);
    guest.send(
        &Header {
            dst_cid: 9,
            ..packet(Op::Reset, 1, 2)
        },
        &[],
    );

    guest.expect_nothing();
}

#[test]
fn packets_without_a_connection_are_answered_with_reset() {
    let mut guest = Guest::new();
    let right = packet(Op::Request, 7, AGENT_PORT);
    let table = [
        packet(Op::Request, 7, 1025),
        packet(Op::Request, 7, u32::MAX),
        packet(Op::Response, 7, AGENT_PORT),
        packet(Op::Shutdown, 7, AGENT_PORT),
        packet(Op::ReadWrite, 7, AGENT_PORT),
        packet(Op::CreditUpdate, 7, AGENT_PORT),
        packet(Op::CreditRequest, 7, AGENT_PORT),
        packet(Op::Unknown(0), 7, AGENT_PORT),
        packet(Op::Unknown(8), 7, AGENT_PORT),
        packet(Op::Unknown(u16::MAX), 7, AGENT_PORT),
        Header {
            dst_cid: 0,
            ..right
        },
        Header {
            dst_cid: 1,
            ..right
        },
        Header {
            dst_cid: GUEST_CID,
            ..right
        },
        Header {
            dst_cid: u64::MAX,
            ..right
        },
        Header {
            socket_type: 0,
            ..right
        },
        Header {
            socket_type: 2,
            ..right
        },
        Header {
            socket_type: u16::MAX,
            ..right
        },
    ];
    for wrong in table {
        guest.send(&wrong, &[]);

        let (reply, _) = guest.receive();

        assert_eq!(reply, wrong.reset_reply(), "{wrong:?}");
    }
    guest.expect_nothing();
}

#[test]
fn request_with_a_payload_is_refused() {
    let mut guest = Guest::new();
    let request = Header {
        payload_bytes: 4,
        ..packet(Op::Request, 7, AGENT_PORT)
    };

    guest.send(&request, b"four");

    guest.expect(Op::Reset);
}

#[test]
fn operation_that_an_open_connection_forbids_ends_it_with_reset() {
    for op in [Op::Request, Op::Response, Op::Unknown(0), Op::Unknown(99)] {
        let mut guest = Guest::new();
        let (socket, _host) = guest.connect_duplex(5);

        guest.send(&socket.packet(op), &[]);

        guest.expect(Op::Reset);
        let closed = VsockEvent::Closed {
            stream: 5,
            sent: 0,
            received: 0,
            first_us: 0,
        };
        assert_eq!(guest.event(), closed);
        assert_eq!(guest.handle.counters().open, 0);
    }
}

#[test]
fn answer_that_is_no_answer_refuses_the_connection() {
    let ops = [Op::Request, Op::ReadWrite, Op::CreditUpdate, Op::Shutdown];
    for op in ops {
        let mut guest = Guest::new();
        let (_host, end) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = guest.request(5, Descriptors::Duplex(end.into()));

        guest.send(&socket.packet(op), &[]);

        guest.expect(Op::Reset);
        let why = Refusal::Protocol { port: LISTENING };
        assert_eq!(guest.event(), VsockEvent::Refused { stream: 5, why });
    }
}

#[test]
fn payload_shorter_than_announced_ends_the_connection() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    let header = Header {
        payload_bytes: 100,
        ..socket.packet(Op::ReadWrite)
    };

    guest.send(&header, &[1; 99]);

    guest.expect(Op::Reset);
}

#[test]
fn payload_outside_of_memory_ends_the_connection() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    let header = Header {
        payload_bytes: 4096,
        ..socket.packet(Op::ReadWrite)
    };
    guest.write(TX_DATA, &header.encode());

    guest.send_chain(&[(TX_DATA, 44, false), (0xff_f800, 4096, false)]);

    guest.expect(Op::Reset);
}

#[test]
fn payload_in_too_many_descriptors_ends_the_connection() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    guest.write(TX_DATA, &socket.data(&[0; 200]).encode());
    let mut chain = vec![(TX_DATA, 44, false)];
    chain.extend((0..200).map(|at| (TX_DATA + 44 + at, 1, false)));

    guest.send_chain(&chain);

    guest.expect(Op::Reset);
}

#[test]
fn data_after_shutdown_ends_the_connection() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    guest.send(&socket.shutdown(SHUTDOWN_SEND), &[]);

    guest.send(&socket.data(b"late"), b"late");

    guest.expect(Op::Reset);
}

#[test]
fn data_beyond_the_advertised_buffer_ends_the_connection() {
    let mut guest = Guest::new();
    let (socket, host) = guest.connect_duplex(5);
    let payload = [7; 65536];
    // The socket takes some, the buffer of the device exactly its size, and then no more.
    let mut packets = 0;
    let mut op = Op::CreditUpdate;
    while op == Op::CreditUpdate {
        assert!(packets < 100);
        guest.send(&socket.data(&payload), &payload);
        packets += 1;
        op = guest.try_receive().map_or(op, |(header, _)| header.op);
    }

    assert_eq!(op, Op::Reset);
    assert!(packets > RECEIVE_BUFFER_BYTES / 65536);
    drop(host);
}

#[test]
fn reset_is_never_answered_by_a_connection_either() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);

    guest.send(&socket.packet(Op::Reset), &[]);

    guest.expect_nothing();
}

#[test]
fn unknown_shutdown_bits_are_ignored() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);

    guest.send(&socket.shutdown(!SHUTDOWN_BOTH), &[]);

    guest.expect_nothing();
    assert_eq!(guest.handle.counters().open, 1);
}

#[test]
fn head_outside_of_the_table_is_dropped() {
    let mut guest = Guest::new();
    guest.tx.add_head(9999);
    guest.tx.kick();

    guest.expect_nothing();
}

#[test]
fn available_index_beyond_the_queue_ends_the_device() {
    let mut guest = Guest::new();
    guest.tx.set_avail(1000);
    guest.tx.kick();

    assert!(guest.join().is_err());
}

#[test]
fn rx_buffers_without_room_are_given_back_empty() {
    let mut guest = Guest::with_rx_buffers(0);
    guest.rx.add(&[(TX_DATA, 43, true)]);
    guest.rx.add(&[(TX_DATA, 44, true)]);
    guest.rx.add(&[(TX_DATA, 4096, false)]);
    guest.rx.add(&[(0x5000_0000, 4096, true)]);
    guest.send(&packet(Op::CreditRequest, 1, 2), &[]);
    guest.rx.add(&[
        (TX_DATA + 0x1_0000, 20, true),
        (TX_DATA + 0x2_0000, 30, true),
    ]);
    guest.rx.kick();

    let mut used = Vec::new();
    while used.len() < 5 {
        match guest.rx.used() {
            Some(chain) => used.push(chain),
            None => {
                wait_for(borrow(&guest.rx.irq));
                guest.rx.irq.read().unwrap();
            }
        }
    }

    assert_eq!(used, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 44)]);
}

#[test]
fn flood_of_bad_packets_stops_at_the_limit_and_goes_on_with_rx_buffers() {
    let mut guest = Guest::with_rx_buffers(0);
    let flood = RESETS_WAITING_MAX + 50;
    guest.write(TX_DATA, &packet(Op::ReadWrite, 1, 2).encode());
    for _ in 0..RESETS_WAITING_MAX {
        guest.send_chain(&[(TX_DATA, 44, false)]);
    }
    for _ in RESETS_WAITING_MAX..flood {
        guest.tx.add(&[(TX_DATA, 44, false)]);
    }
    guest.tx.kick();
    // A request that fails at once shows that the kick before it was seen, the second one that
    // the queue was looked at after it.
    for stream in 0..2 {
        let directory = std::fs::File::open("/").unwrap();
        let connect = Connect {
            port: LISTENING,
            host_port: host_port(stream),
            stream,
            descriptors: source(directory),
        };
        guest.handle.connect(connect).unwrap();
        guest.event();
    }
    assert_eq!(guest.tx.used(), None);

    guest.add_rx_buffers(128);

    for _ in 0..flood {
        guest.expect(Op::Reset);
    }
}

proptest! {
    #[test]
    fn random_packets_never_panic(
        packets in vec((any::<[u8; 20]>(), 0_u16..10, 0_u32..5000, any::<bool>()), 1..60)
    ) {
        let mut guest = Guest::new();
        let (socket, host) = guest.connect_duplex(5);
        for (noise, op, bytes, is_known) in packets {
            let number = |at: usize| u32::from_le_bytes(noise[at..at + 4].try_into().unwrap());
            let header = Header {
                dst_port: if is_known { socket.host_port } else { number(0) },
                payload_bytes: if is_known { bytes } else { number(4) },
                flags: number(8),
                buf_alloc: number(12),
                fwd_cnt: number(16),
                ..socket.packet(op.into())
            };
            guest.write(TX_DATA, &header.encode());
            guest.send_chain(&[(TX_DATA, 44, false), (TX_DATA + 44, bytes, false)]);
            while guest.try_receive().is_some() {}
        }
        drop(host);
        guest.stop().1.unwrap();
        assert_eq!(guest.handle.counters().open, 0);
        // The thread is gone; there is nothing left to stop.
    }
}
