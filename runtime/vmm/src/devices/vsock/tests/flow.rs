//! Credit and volume.

use std::io::{Read, Write};

use super::super::packet::{Header, Op, SHUTDOWN_BOTH};
use super::super::*;
use super::driver::*;

#[test]
fn header_split_over_descriptors_is_understood() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    guest.write(TX_DATA, &socket.data(b"abcdef").encode());
    guest.write(TX_DATA + 44, b"abcdef");

    guest.send_chain(&[
        (TX_DATA, 1, false),
        (TX_DATA + 1, 30, false),
        (TX_DATA + 31, 0, false),
        (TX_DATA + 31, 15, false),
        (TX_DATA + 46, 4, false),
    ]);

    let mut text = [0; 6];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"abcdef");
}

#[test]
fn payload_over_many_descriptors_arrives_in_order() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    let payload = pattern(60_000);
    guest.write(TX_DATA, &socket.data(&payload).encode());
    guest.write(TX_DATA + 0x1000, &payload);
    let mut chain = vec![(TX_DATA, HEADER_LENGTH, false)];
    chain.extend((0..60).map(|at| (TX_DATA + 0x1000 + at * 1000, 1000, false)));

    guest.send_chain(&chain);

    let mut data = vec![0; payload.len()];
    host.read_exact(&mut data).unwrap();
    assert!(data == payload);
}

#[test]
fn bytes_behind_the_payload_are_ignored() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    guest.send(&socket.data(b"four"), b"four and more");
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);

    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();

    assert_eq!(text, "four");
}

#[test]
fn host_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut host = ours;
    let socket = guest.request(5, Descriptors::Duplex(theirs.into()));
    let room = |bytes, passed_on| Header {
        buf_alloc: bytes,
        fwd_cnt: passed_on,
        ..socket.packet(Op::CreditUpdate)
    };
    let response = Header {
        op: Op::Response,
        ..room(10, 0)
    };
    guest.send(&response, &[]);
    host.write_all(b"0123456789abcdefghij!").unwrap();

    assert_eq!(guest.receive().1, b"0123456789");
    guest.expect(Op::CreditRequest);
    guest.expect_nothing();

    guest.send(&room(10, 10), &[]);
    assert_eq!(guest.receive().1, b"abcdefghij");
    guest.expect(Op::CreditRequest);

    guest.send(&room(11, 10), &[]);
    assert_eq!(guest.receive().1, b"!");
}

#[test]
fn guest_that_claims_more_than_was_sent_gets_nothing() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    let lie = Header {
        fwd_cnt: 1_000_000,
        ..socket.packet(Op::CreditUpdate)
    };
    guest.send(&lie, &[]);

    host.write_all(b"secret").unwrap();

    guest.expect(Op::CreditRequest);
    guest.expect_nothing();
}

#[test]
fn credit_request_is_answered_with_what_was_passed_on() {
    let mut guest = Guest::new();
    let (socket, _host) = guest.connect_duplex(5);
    guest.send(&socket.data(&[1; 1000]), &[1; 1000]);

    guest.send(&socket.packet(Op::CreditRequest), &[]);

    let update = guest.expect(Op::CreditUpdate);
    assert_eq!(update.fwd_cnt, 1000);
    assert_eq!(update.buf_alloc, RECEIVE_BUFFER_BYTES);
}

#[test]
fn full_sink_earns_no_credit_until_it_is_read() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    let payload = pattern(65536);
    let mut sent = 0_u32;
    // Beyond what the socket takes the device holds bytes without passing them on.
    let passed_on = loop {
        guest.send(&socket.data(&payload), &payload);
        sent += 65536;
        guest.send(&socket.packet(Op::CreditRequest), &[]);
        let passed_on = guest.expect(Op::CreditUpdate).fwd_cnt;
        if passed_on < sent {
            break passed_on;
        }
    };
    guest.send(&socket.data(&payload), &payload);
    sent += 65536;
    guest.send(&socket.packet(Op::CreditRequest), &[]);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, passed_on);

    let mut data = vec![0; sent as usize];
    host.read_exact(&mut data).unwrap();

    guest.send(&socket.packet(Op::CreditRequest), &[]);
    let mut update = guest.expect(Op::CreditUpdate);
    while update.fwd_cnt != sent {
        update = guest.expect(Op::CreditUpdate);
    }
    assert!(data == payload.repeat(sent as usize / 65536));
}

#[test]
fn credit_comes_unasked_when_much_was_passed_on() {
    let mut guest = Guest::new();
    let (socket, mut host) = guest.connect_duplex(5);
    let payload = [3; 65536];
    let mut data = [0; 65536];
    for _ in 0..RECEIVE_BUFFER_BYTES / 2 / 65536 {
        guest.send(&socket.data(&payload), &payload);
        host.read_exact(&mut data).unwrap();
    }

    let update = guest.expect(Op::CreditUpdate);

    assert_eq!(update.fwd_cnt, RECEIVE_BUFFER_BYTES / 2);
}

#[test]
fn sixty_four_mebibytes_arrive_intact_both_ways() {
    flow_both_ways(Guest::new());
}

#[test]
fn sixty_four_mebibytes_arrive_intact_with_few_kicks_and_interrupts() {
    flow_both_ways(Guest::with_event_idx());
}

fn flow_both_ways(mut guest: Guest) {
    const BYTES: usize = 64 * 1024 * 1024;
    // A whole number of periods, so that each piece starts where the pattern says.
    let block = pattern(251 * 256);
    let (socket, host) = guest.connect_duplex(5);
    let mut to_guest = host.try_clone().unwrap();
    let data = block.clone();
    let writer = std::thread::spawn(move || {
        let mut left = BYTES;
        while left > 0 {
            let bytes = left.min(data.len());
            to_guest.write_all(&data[..bytes]).unwrap();
            left -= bytes;
        }
        to_guest.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let data = block.clone();
    let mut from_guest = host;
    let reader = std::thread::spawn(move || {
        // Small reads make it the slower side.
        let mut piece = [0; 1004];
        let mut done = 0;
        while done < BYTES {
            let bytes = (BYTES - done).min(piece.len());
            from_guest.read_exact(&mut piece[..bytes]).unwrap();
            let start = done % 251;
            assert!(piece[..bytes] == data[start..start + bytes]);
            done += bytes;
        }
        assert_eq!(from_guest.read(&mut piece).unwrap(), 0);
    });
    let mut sent = 0_usize;
    let mut passed_on = 0_u32;
    let mut received = 0_usize;
    let mut told = 0_usize;
    let mut is_ended = false;
    while sent < BYTES || received < BYTES || !is_ended {
        let on_the_way = u32::try_from(sent).unwrap() - passed_on;
        let room = (RECEIVE_BUFFER_BYTES - on_the_way) as usize;
        let bytes = room.min(BYTES - sent).min(50_000);
        let mut header = Header {
            fwd_cnt: u32::try_from(received).unwrap(),
            ..socket.packet(Op::CreditUpdate)
        };
        if bytes > 0 {
            header.op = Op::ReadWrite;
            header.payload_bytes = u32::try_from(bytes).unwrap();
            let start = sent % 251;
            guest.send(&header, &block[start..start + bytes]);
            sent += bytes;
            told = received;
        } else if received - told > 32 * 1024 {
            guest.send(&header, &[]);
            told = received;
        }
        let mut next = match bytes {
            0 => Some(guest.receive()),
            _ => guest.try_receive(),
        };
        while let Some((header, payload)) = next {
            passed_on = header.fwd_cnt;
            is_ended |= header.op == Op::Shutdown;
            let start = received % 251;
            assert!(payload == block[start..start + payload.len()]);
            received += payload.len();
            next = guest.try_receive();
        }
    }
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
    writer.join().unwrap();
    reader.join().unwrap();
    let over = VsockEvent::Closed {
        stream: 5,
        sent: BYTES as u64,
        received: BYTES as u64,
        first_us: 0,
    };
    assert_eq!(guest.event(), over);
}
