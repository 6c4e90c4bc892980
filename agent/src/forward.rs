//! Port forwarding: from a stream of the host's to a TCP port of the pod's loopback address.
//!
//! Whoever listens there has been dialled, and has answered, before the request is.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::messages::ForwardPortRequest;
use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

use crate::arrivals::{ArrivalError, Arrivals};
use crate::stdio::{copy, nonblocking};

/// For a listener of this machine to take a connection: one whose queue is full does not.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);

/// Why a port is not forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Not a TCP port.
    #[error("{0} is not a TCP port")]
    NoPort(u32),
    /// Nobody takes the connection.
    #[error("nobody answers at port {port} of the pod's localhost")]
    Dial {
        /// The port.
        port: u16,
        /// What came of 127.0.0.1.
        source: io::Error,
    },
    /// The connection can't be watched.
    #[error("cannot watch a connection")]
    Watch(#[source] io::Error),
    /// The stream can't be expected.
    #[error(transparent)]
    Stream(#[from] ArrivalError),
}

/// Dials, and moves bytes from then on until both sides have ended.
pub async fn forward(
    arrivals: &Arc<Arrivals>,
    request: &ForwardPortRequest,
) -> Result<(), ForwardError> {
    let port = u16::try_from(request.tcp_port)
        .ok()
        .filter(|port| *port > 0);
    let port = port.ok_or(ForwardError::NoPort(request.tcp_port))?;
    let arrival = arrivals.expect(request.stream)?;
    let server = dial(port).await?;
    let server = server.into_std().map_err(ForwardError::Watch)?;
    let both = Interest::READABLE | Interest::WRITABLE;
    let server = nonblocking(server.into(), both).map_err(ForwardError::Watch)?;
    tokio::spawn(async move {
        if let Some(client) = arrival.connection().await {
            // An error of either side ends both.
            let _ = tokio::try_join!(pass(&client, &server), pass(&server, &client));
        }
    });
    Ok(())
}

/// A server may listen at either family's address.
async fn dial(port: u16) -> Result<TcpStream, ForwardError> {
    match dial_at(Ipv4Addr::LOCALHOST.into(), port).await {
        Ok(stream) => Ok(stream),
        Err(source) => match dial_at(Ipv6Addr::LOCALHOST.into(), port).await {
            Ok(stream) => Ok(stream),
            Err(_) => Err(ForwardError::Dial { port, source }),
        },
    }
}

async fn dial_at(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    let connect = TcpStream::connect(SocketAddr::new(address, port));
    let connected = tokio::time::timeout(DIAL_DEADLINE, connect).await;
    connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Moves bytes one way, and their end.
async fn pass(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    copy(from, to).await?;
    Ok(rustix::net::shutdown(to.get_ref(), Shutdown::Write)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use husk_protocol::STREAM_SOURCE_MIN;

    use super::*;
    use crate::arrivals::Port;
    use crate::arrivals::tests::connect;

    fn request(tcp_port: u16) -> ForwardPortRequest {
        ForwardPortRequest {
            tcp_port: tcp_port.into(),
            stream: STREAM_SOURCE_MIN,
            ..ForwardPortRequest::default()
        }
    }

    #[tokio::test]
    async fn ports_that_are_none_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::listen(&Port::Directory(directory.path().to_owned())).unwrap();
        for tcp_port in [0, 65536, u32::MAX] {
            let request = ForwardPortRequest {
                tcp_port,
                ..request(1)
            };
            let refused = forward(&arrivals, &request).await.unwrap_err();
            assert!(matches!(refused, ForwardError::NoPort(_)), "{refused}");
        }
        let (_listener, port) = listener(Ipv4Addr::LOCALHOST.into());
        for stream in [0, STREAM_SOURCE_MIN - 1] {
            let request = ForwardPortRequest {
                stream,
                ..request(port)
            };
            let refused = forward(&arrivals, &request).await.unwrap_err();
            assert!(matches!(refused, ForwardError::Stream(_)), "{refused}");
        }
    }

    fn listener(address: IpAddr) -> (TcpListener, u16) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    #[tokio::test]
    async fn nobody_at_the_port_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::listen(&Port::Directory(directory.path().to_owned())).unwrap();
        let (gone, port) = listener(Ipv4Addr::LOCALHOST.into());
        drop(gone);
        let refused = forward(&arrivals, &request(port)).await.unwrap_err();
        assert!(refused.to_string().contains(&port.to_string()), "{refused}");
    }

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways() {
        for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let directory = tempfile::tempdir().unwrap();
            let arrivals = Arrivals::listen(&Port::Directory(directory.path().to_owned())).unwrap();
            let (listener, port) = listener(address);
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                stream.write_all(b"heard ").unwrap();
                stream.write_all(text.as_bytes()).unwrap();
            });
            forward(&arrivals, &request(port)).await.unwrap();
            let mut client = connect(directory.path(), STREAM_SOURCE_MIN);
            let client = tokio::task::spawn_blocking(move || {
                client.write_all(b"words").unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                let mut text = String::new();
                client.read_to_string(&mut text).unwrap();
                text
            });
            assert_eq!(client.await.unwrap(), "heard words", "{address}");
            server.join().unwrap();
        }
    }
}
