//! Every kind of descriptor that a host may hand over.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, mknodat};
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::*;
use super::driver::*;

fn make_fifo(path: &Path) {
    mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
}

fn open_nonblocking(path: &Path, is_for_writing: bool) -> File {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
    File::options()
        .read(!is_for_writing)
        .write(is_for_writing)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

/// After [`Descriptors::Split`] with one descriptor, the guest is told which direction is dead.
fn connect_half(guest: &mut Guest, descriptors: Descriptors, dead: u32) -> Socket {
    let socket = guest.connect(5, descriptors);
    assert_eq!(guest.expect(Op::Shutdown).flags, dead);
    socket
}

#[test]
fn descriptors_that_carry_no_stream_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let terminal = File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .unwrap();
    let file = tempfile::tempfile().unwrap();
    let table = [
        source(File::open(directory.path()).unwrap()),
        source(terminal),
        Descriptors::Duplex(file.into()),
    ];
    for descriptors in table {
        let mut guest = Guest::new();
        let connect = Connect {
            port: LISTENING,
            host_port: host_port(5),
            stream: 5,
            descriptors,
        };
        guest.handle.connect(connect).unwrap();

        let event = guest.event();

        assert!(
            matches!(
                &event,
                VsockEvent::Refused {
                    why: Refusal::Descriptor { .. },
                    ..
                }
            ),
            "{event:?}"
        );
    }
}

#[test]
fn fifo_without_a_writer_yet_has_not_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stdin");
    make_fifo(&path);
    let reader = open_nonblocking(&path, false);
    let mut guest = Guest::new();
    connect_half(&mut guest, source(reader), SHUTDOWN_RECEIVE);

    guest.expect_nothing();
    let mut writer = File::options().write(true).open(&path).unwrap();
    writer.write_all(b"now").unwrap();
    assert_eq!(guest.receive().1, b"now");
    drop(writer);

    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn regular_file_is_sent_to_its_end() {
    let mut file = tempfile::tempfile().unwrap();
    let data = pattern(10_000);
    file.write_all(&data).unwrap();
    file.rewind().unwrap();
    let mut guest = Guest::new();
    let socket = connect_half(&mut guest, source(file), SHUTDOWN_RECEIVE);

    let mut got = Vec::new();
    let last = loop {
        let (header, payload) = guest.receive();
        if header.op != Op::ReadWrite {
            break header;
        }
        got.extend(payload);
    };

    assert!(got == data);
    assert_eq!((last.op, last.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(&socket.packet(Op::Reset), &[]);
    let over = VsockEvent::Closed {
        stream: 5,
        sent: 10_000,
        received: 0,
        first_us: 0,
    };
    assert_eq!(guest.event(), over);
}

#[test]
fn null_device_ends_at_once_as_a_source_and_swallows_as_a_sink() {
    let null = || {
        let mut options = File::options();
        options.read(true).write(true).open("/dev/null").unwrap()
    };
    let mut guest = Guest::new();
    let descriptors = Descriptors::Split {
        source: Some(null().into()),
        sink: Some(null().into()),
    };
    let socket = guest.connect(5, descriptors);

    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send(&socket.data(b"gone"), b"gone");
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);

    guest.expect(Op::Reset);
    let over = VsockEvent::Closed {
        stream: 5,
        sent: 0,
        received: 4,
        first_us: 0,
    };
    assert_eq!(guest.event(), over);
}

#[test]
fn regular_file_takes_what_the_guest_sends() {
    let mut file = tempfile::tempfile().unwrap();
    let mut guest = Guest::new();
    let copy = file.try_clone().unwrap();
    let socket = connect_half(&mut guest, sink(copy), SHUTDOWN_SEND);

    guest.send(&socket.data(b"kept"), b"kept");
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);

    guest.expect(Op::Reset);
    guest.event();
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kept");
}

#[test]
fn full_pipe_holds_the_rest_until_it_is_read() {
    for flags in [PipeFlags::NONBLOCK, PipeFlags::empty()] {
        let (reader, writer) = pipe_with(flags).unwrap();
        let mut guest = Guest::new();
        let socket = connect_half(&mut guest, sink(writer), SHUTDOWN_SEND);
        let data = pattern(200_000);
        for piece in data.chunks(50_000) {
            guest.send(&socket.data(piece), piece);
        }
        guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
        guest.expect_reset();

        let mut reader = File::from(reader);
        let mut got: Vec<u8> = Vec::new();
        while got.len() < data.len() {
            wait_for(&reader);
            let mut piece = [0; 4096];
            let bytes = reader.read(&mut piece).unwrap();
            got.extend(&piece[..bytes]);
        }

        assert!(got == data);
        let over = VsockEvent::Closed {
            stream: 5,
            sent: 0,
            received: 200_000,
            first_us: 0,
        };
        assert_eq!(guest.event(), over);
    }
}

#[test]
fn blocking_pipe_is_read_without_waiting() {
    let (reader, writer) = pipe_with(PipeFlags::empty()).unwrap();
    let mut guest = Guest::new();
    connect_half(&mut guest, source(reader), SHUTDOWN_RECEIVE);
    guest.expect_nothing();
    let mut writer = File::from(writer);

    writer.write_all(b"one").unwrap();
    assert_eq!(guest.receive().1, b"one");
    guest.expect_nothing();
    writer.write_all(b"two").unwrap();
    assert_eq!(guest.receive().1, b"two");
    drop(writer);

    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn pipe_that_nobody_reads_any_more_is_reported_to_the_guest() {
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    let mut guest = Guest::new();
    let socket = connect_half(&mut guest, sink(writer), SHUTDOWN_SEND);

    drop(reader);

    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    guest.send(&socket.data(b"lost"), b"lost");
    guest.send(&socket.shutdown(SHUTDOWN_BOTH), &[]);
    guest.expect(Op::Reset);
    let over = VsockEvent::Closed {
        stream: 5,
        sent: 0,
        received: 0,
        first_us: 0,
    };
    assert_eq!(guest.event(), over);
}

#[test]
fn pipe_that_breaks_while_bytes_wait_gives_their_credit_back() {
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    let (source, source_end) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut guest = Guest::new();
    let descriptors = Descriptors::Split {
        source: Some(source_end.into()),
        sink: Some(writer),
    };
    let socket = guest.connect(5, descriptors);
    let payload = [1; 100_000];
    guest.send(&socket.data(&payload), &payload);

    drop(reader);

    let shutdown = guest.expect(Op::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
    assert_eq!(shutdown.fwd_cnt, 100_000);
    drop(source);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn sink_that_is_full_for_good_is_reported_with_its_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut guest = Guest::new();
    let socket = connect_half(&mut guest, sink(full), SHUTDOWN_SEND);

    guest.send(&socket.data(b"lost"), b"lost");

    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    let VsockEvent::SinkFailed { stream, why } = guest.event() else {
        panic!("no report of the failure");
    };
    assert_eq!(stream, 5);
    assert!(why.contains("No space left on device"), "{why}");
}

#[test]
fn connection_with_neither_descriptor_only_touches_the_port() {
    let mut guest = Guest::new();
    let neither = Descriptors::Split {
        source: None,
        sink: None,
    };
    let socket = connect_half(&mut guest, neither, SHUTDOWN_BOTH);

    guest.send(&socket.packet(Op::Reset), &[]);

    let over = VsockEvent::Closed {
        stream: 5,
        sent: 0,
        received: 0,
        first_us: 0,
    };
    assert_eq!(guest.event(), over);
}
