//! Where the host's streams arrive: one port, and who expects which connection.
//!
//! The port is bound before there is a container, so that none can have it. A request names each
//! stream by the host's port that its connection will come from, which the host uses once. Whoever
//! serves the stream expects it before the request is answered, and the host connects after that: a
//! connection that nobody expects is nobody's, and is closed at once. That a peer is the host says
//! its CID, which the kernel gives and nobody can choose; containers can reach the port, at most.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protocol::{LAUNCH_DEADLINE, STREAM_PORT, STREAM_SOURCE_MIN};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, accept4, bind, getpeername,
    listen, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::container::lock;

/// How long a stream is expected. It begins before a launch, whose end the host awaits before it
/// connects, and it may connect three.
const ARRIVAL_DEADLINE: Duration = LAUNCH_DEADLINE.saturating_add(Duration::from_secs(90));

/// Until the next try where the kernel has no memory or descriptors for a connection: nothing tells
/// when it has some again, and the connection waits.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Why a stream can't be expected.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// A port that no stream comes from.
    #[error("no stream comes from port {0}: their ports begin at {STREAM_SOURCE_MIN}")]
    PortTooLow(u32),
    /// Two streams can't be told apart.
    #[error("a stream from port {0} is expected already")]
    Taken(u32),
}

/// Where the port is.
#[derive(Debug, Clone)]
pub enum Port {
    /// In the guest: vsock.
    Vsock,
    /// Without a guest: a socket in a directory, named by the port's number. A peer's number is the
    /// name of its own socket there.
    Directory(PathBuf),
}

/// The port and who expects what from it.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// By the port of the peer.
    expected: Mutex<HashMap<u32, oneshot::Sender<AsyncFd<OwnedFd>>>>,
}

/// A stream that is expected. Dropped, it is not any more.
#[derive(Debug)]
pub struct Arrival {
    source: u32,
    arrivals: Arc<Arrivals>,
    connection: oneshot::Receiver<AsyncFd<OwnedFd>>,
}

impl Arrivals {
    /// Binds the port and takes what arrives from then on. Needs a runtime.
    ///
    /// # Errors
    /// The port can't be had.
    pub fn listen(port: &Port) -> io::Result<Arc<Arrivals>> {
        let listener = port.bind()?;
        let arrivals = Arc::new(Arrivals::default());
        tokio::spawn(Arc::clone(&arrivals).serve(port.clone(), listener));
        Ok(arrivals)
    }

    /// Expects a stream from a port of the host.
    ///
    /// # Errors
    /// [`ArrivalError`]
    pub fn expect(self: &Arc<Self>, source: u32) -> Result<Arrival, ArrivalError> {
        if source < STREAM_SOURCE_MIN {
            return Err(ArrivalError::PortTooLow(source));
        }
        let mut expected = lock(&self.expected);
        if expected.contains_key(&source) {
            return Err(ArrivalError::Taken(source));
        }
        let (sender, connection) = oneshot::channel();
        expected.insert(source, sender);
        Ok(Arrival {
            source,
            arrivals: Arc::clone(self),
            connection,
        })
    }

    /// Takes connections for ever. Nothing that one of them does or lacks keeps others waiting.
    async fn serve(self: Arc<Self>, port: Port, listener: AsyncFd<OwnedFd>) {
        let mut refused = Refused::default();
        loop {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let accept = |listener: &OwnedFd| Ok(accept4(listener.as_raw_fd(), flags)?);
            let socket = match listener.async_io(Interest::READABLE, accept).await {
                Ok(fd) => crate::sys::own_fd(fd),
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    eprintln!("husk-agent: cannot take a stream, trying again: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            match port.source_of(&socket) {
                Ok(source) => self.hand_over(source, socket),
                Err(why) => refused.note(&why),
            }
        }
    }

    fn hand_over(&self, source: u32, socket: OwnedFd) {
        let Some(expecting) = lock(&self.expected).remove(&source) else {
            eprintln!("husk-agent: nobody expects a stream from port {source} of the host");
            return;
        };
        match crate::sys::register(socket, Interest::READABLE | Interest::WRITABLE) {
            // It fails if nobody waits any more, and the connection is closed.
            Ok(socket) => drop(expecting.send(socket)),
            Err(error) => {
                eprintln!("husk-agent: cannot watch the stream from port {source}: {error}");
            }
        }
    }
}

impl Arrival {
    /// The connection, once it is there; none if it does not come in time.
    pub async fn connection(self) -> Option<AsyncFd<OwnedFd>> {
        self.within(ARRIVAL_DEADLINE).await
    }

    async fn within(mut self, deadline: Duration) -> Option<AsyncFd<OwnedFd>> {
        let arrived = tokio::time::timeout(deadline, &mut self.connection).await;
        match arrived {
            Ok(connection) => connection.ok(),
            Err(_) => {
                let source = self.source;
                eprintln!("husk-agent: no stream has come from port {source} of the host");
                None
            }
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        // The host uses a port once, so that this is nobody else's.
        lock(&self.arrivals.expected).remove(&self.source);
    }
}

impl Port {
    fn bind(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = match self {
            Port::Vsock => {
                let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                // With every CID, as otherwise others could have the port with the rest of them.
                let address = VsockAddr::new(libc::VMADDR_CID_ANY, STREAM_PORT);
                bind(listener.as_raw_fd(), &address)?;
                listener
            }
            Port::Directory(directory) => {
                let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
                let path = directory.join(STREAM_PORT.to_string());
                bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
                listener
            }
        };
        // More than a host can have on their way, so that none is refused for want of room.
        listen(&listener, Backlog::MAXCONN)?;
        crate::sys::register(listener, Interest::READABLE)
    }

    /// The host's port that a connection comes from; if it is not the host's, who it is.
    fn source_of(&self, socket: &OwnedFd) -> Result<u32, String> {
        let unknown = |error: Errno| format!("of nobody: {error}");
        match self {
            Port::Vsock => {
                let peer = getpeername::<VsockAddr>(socket.as_raw_fd()).map_err(unknown)?;
                match peer.cid() {
                    libc::VMADDR_CID_HOST => Ok(peer.port()),
                    cid => Err(format!("of CID {cid}")),
                }
            }
            Port::Directory(_) => {
                let peer = getpeername::<UnixAddr>(socket.as_raw_fd()).map_err(unknown)?;
                let name = peer.path().and_then(Path::file_name);
                let number = name.and_then(|name| name.to_str()?.parse().ok());
                number.ok_or_else(|| format!("of {name:?}"))
            }
        }
    }
}

/// Whether accepting failed for a connection that was gone before it was taken.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Counts connections that are not the host's. A container can make any number of them, and the log
/// is not to grow with it.
#[derive(Debug, Default)]
struct Refused(u64);

impl Refused {
    /// Tells of the first one, and whenever there are twice as many.
    fn note(&mut self, who: &str) {
        self.0 = self.0.saturating_add(1);
        if self.0.is_power_of_two() {
            let count = self.0;
            eprintln!(
                "husk-agent: refused a connection {who} to the streams' port, {count} so far"
            );
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
