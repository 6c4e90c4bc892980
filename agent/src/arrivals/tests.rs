//! The port without a guest: peers are sockets in a directory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::socket::connect as connect_socket;

use super::*;

/// For anything here that does not come.
const DEADLINE: Duration = Duration::from_secs(20);

/// A connection as from that port of the host.
pub(crate) fn connect(directory: &Path, source: u32) -> UnixStream {
    from(directory, &source.to_string())
}

fn from(directory: &Path, name: &str) -> UnixStream {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let own = UnixAddr::new(&directory.join(name)).unwrap();
    bind(socket.as_raw_fd(), &own).unwrap();
    to_port(directory, socket)
}

fn to_port(directory: &Path, socket: OwnedFd) -> UnixStream {
    let port = UnixAddr::new(&directory.join(STREAM_PORT.to_string())).unwrap();
    connect_socket(socket.as_raw_fd(), &port).unwrap();
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// What the other side reads.
async fn said(connection: Option<AsyncFd<OwnedFd>>) -> Vec<u8> {
    let connection = connection.unwrap();
    let mut buffer = vec![0; 64];
    let read = connection.async_io(Interest::READABLE, |socket| {
        Ok(rustix::io::read(socket, &mut buffer)?)
    });
    let length = read.await.unwrap();
    buffer.truncate(length);
    buffer
}

/// Whether the other side has closed a connection, once it has.
async fn is_closed(mut stream: UnixStream) -> bool {
    let read = tokio::task::spawn_blocking(move || stream.read(&mut [0]));
    matches!(read.await.unwrap(), Ok(0))
}

fn listen_in(directory: &Path) -> Arc<Arrivals> {
    Arrivals::listen(&Port::Directory(directory.to_owned())).unwrap()
}

const FIRST: u32 = STREAM_SOURCE_MIN;

#[tokio::test]
async fn streams_find_those_who_expect_them_in_any_order() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let expected: Vec<_> = (FIRST..FIRST + 200)
        .map(|source| (source, arrivals.expect(source).unwrap()))
        .collect();
    let mut streams = Vec::new();
    for (source, _) in expected.iter().rev() {
        let mut stream = connect(directory.path(), *source);
        stream.write_all(source.to_string().as_bytes()).unwrap();
        streams.push(stream);
    }

    for (source, arrival) in expected {
        assert_eq!(
            said(arrival.connection().await).await,
            source.to_string().as_bytes()
        );
    }
    assert!(lock(&arrivals.expected).is_empty());
}

#[tokio::test]
async fn stream_that_nobody_expects_is_closed_and_keeps_nobody_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST + 1).unwrap();
    let strange = connect(directory.path(), FIRST);
    let mut wanted = connect(directory.path(), FIRST + 1);
    wanted.write_all(b"wanted").unwrap();

    assert_eq!(said(arrival.connection().await).await, b"wanted");
    assert!(is_closed(strange).await);
}

#[tokio::test]
async fn peer_without_a_port_of_the_host_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST).unwrap();
    let flags = SockFlag::SOCK_CLOEXEC;
    let nameless = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let nameless = to_port(directory.path(), nameless);
    let misnamed = from(directory.path(), "container");

    assert!(is_closed(nameless).await);
    assert!(is_closed(misnamed).await);
    let mut wanted = connect(directory.path(), FIRST);
    wanted.write_all(b"wanted").unwrap();
    assert_eq!(said(arrival.connection().await).await, b"wanted");
}

#[tokio::test]
async fn flood_of_strangers_does_not_keep_the_host_out() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST).unwrap();
    let place = directory.path().to_owned();
    let flood = tokio::task::spawn_blocking(move || {
        for _ in 0..5000 {
            UnixStream::connect(place.join(STREAM_PORT.to_string())).unwrap();
        }
    });
    flood.await.unwrap();

    let mut wanted = connect(directory.path(), FIRST);
    wanted.write_all(b"wanted").unwrap();
    assert_eq!(said(arrival.connection().await).await, b"wanted");
}

#[tokio::test]
async fn stream_is_expected_once_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST).unwrap();
    assert!(matches!(
        arrivals.expect(FIRST),
        Err(ArrivalError::Taken(FIRST))
    ));
    drop(arrival);

    assert!(lock(&arrivals.expected).is_empty());
    assert!(is_closed(connect(directory.path(), FIRST)).await);
}

#[tokio::test]
async fn second_connection_of_a_stream_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST).unwrap();
    let mut wanted = connect(directory.path(), FIRST);
    wanted.write_all(b"wanted").unwrap();
    let connection = arrival.connection().await;
    std::fs::remove_file(directory.path().join(FIRST.to_string())).unwrap();

    assert!(is_closed(connect(directory.path(), FIRST)).await);
    assert_eq!(said(connection).await, b"wanted");
}

#[tokio::test]
async fn ports_below_those_of_streams_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    for source in [0, STREAM_PORT, STREAM_SOURCE_MIN - 1] {
        assert!(matches!(
            arrivals.expect(source),
            Err(ArrivalError::PortTooLow(port)) if port == source
        ));
    }
}

#[tokio::test]
async fn stream_that_does_not_come_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let arrivals = listen_in(directory.path());
    let arrival = arrivals.expect(FIRST).unwrap();

    assert!(arrival.within(Duration::ZERO).await.is_none());
    assert!(lock(&arrivals.expected).is_empty());
}
