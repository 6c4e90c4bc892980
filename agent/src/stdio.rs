//! A process's streams: from vsock to the pipes or the terminal of the process, and back.
//!
//! The host names a port for each stream. The port is bound before the request is answered, takes
//! one connection and is closed. Processes get pipes and not the sockets themselves, because they
//! open /dev/stdout anew, which a socket does not allow.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::STREAM_PORT_MIN;
use husk_protocol::messages::Stdio as Request;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, VsockAddr, accept4, bind, getpeername,
    listen, socket,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// How long a port waits for its one connection. Generous, for a host with far too many guests.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(60);

/// Connections that may wait at a port, of which at most one is the host's.
const BACKLOG: i32 = 16;

/// Bytes that are moved at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// Why streams can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A port that is not one for streams.
    #[error("port {0} is not one for streams: those begin at {STREAM_PORT_MIN}")]
    PortTooLow(u32),
    /// A terminal has one stream.
    #[error("a terminal's one stream is named in stdin, stdout and stderr must be 0")]
    TerminalStreams,
    /// The port can't be listened on.
    #[error("cannot listen on port {port}")]
    Listen {
        /// The port.
        port: u32,
        /// Why.
        source: io::Error,
    },
    /// Pipes can't be made.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// /dev/null can't be opened.
    #[error("cannot open /dev/null")]
    OpenNull(#[source] io::Error),
}

/// Where the ports of streams are.
#[derive(Debug, Clone)]
pub enum Ports {
    /// In the guest: vsock.
    Vsock,
    /// Without a guest: sockets in a directory, named by their port's number.
    Directory(PathBuf),
}

/// The process's side of its streams, ready to be handed to a stage.
#[derive(Debug)]
pub struct Streams {
    /// Standard input, output, error.
    pub fds: [OwnedFd; 3],
    /// Takes the terminal's master side, if there is to be one.
    pub terminal: Option<oneshot::Sender<Arc<AsyncFd<OwnedFd>>>>,
}

impl Ports {
    /// Binds the ports that a request names and starts moving bytes.
    pub fn open(&self, request: &Request, is_terminal: bool) -> Result<Streams, StdioError> {
        if is_terminal {
            return self.open_terminal(request);
        }
        let stdin = self.listen(request.stdin)?;
        let stdout = self.listen(request.stdout)?;
        let stderr = self.listen(request.stderr)?;
        Ok(Streams {
            fds: [
                match stdin {
                    None => null()?,
                    Some(listener) => {
                        let (theirs, ours) = pipe()?;
                        tokio::spawn(feed(
                            listener,
                            register(ours, Interest::WRITABLE | Interest::ERROR)?,
                        ));
                        theirs
                    }
                },
                drained(stdout)?,
                drained(stderr)?,
            ],
            terminal: None,
        })
    }

    fn open_terminal(&self, request: &Request) -> Result<Streams, StdioError> {
        if request.stdout != 0 || request.stderr != 0 {
            return Err(StdioError::TerminalStreams);
        }
        let (sender, master) = oneshot::channel();
        let listener = self.listen(request.stdin)?;
        tokio::spawn(serve_terminal(listener, master));
        Ok(Streams {
            fds: [null()?, null()?, null()?],
            terminal: Some(sender),
        })
    }

    /// Binds the port of one stream, unless it is 0.
    pub(crate) fn listen(&self, port: u32) -> Result<Option<AsyncFd<OwnedFd>>, StdioError> {
        if port == 0 {
            return Ok(None);
        }
        if port < STREAM_PORT_MIN {
            return Err(StdioError::PortTooLow(port));
        }
        self.bind(port)
            .map(Some)
            .map_err(|source| StdioError::Listen { port, source })
    }

    fn bind(&self, port: u32) -> io::Result<AsyncFd<OwnedFd>> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let family = match self {
            Ports::Vsock => AddressFamily::Vsock,
            Ports::Directory(_) => AddressFamily::Unix,
        };
        let listener = socket(family, SockType::Stream, flags, None)?;
        match self {
            Ports::Vsock => {
                bind(
                    listener.as_raw_fd(),
                    &VsockAddr::new(libc::VMADDR_CID_ANY, port),
                )?;
            }
            Ports::Directory(directory) => {
                let path = directory.join(port.to_string());
                bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
            }
        }
        listen(&listener, Backlog::new(BACKLOG)?)?;
        crate::sys::register(listener, Interest::READABLE)
    }
}

/// The write end of a pipe whose bytes go to the port, or /dev/null.
fn drained(listener: Option<AsyncFd<OwnedFd>>) -> Result<OwnedFd, StdioError> {
    let Some(listener) = listener else {
        return null();
    };
    let (ours, theirs) = pipe()?;
    tokio::spawn(drain(listener, register(ours, Interest::READABLE)?));
    Ok(theirs)
}

fn null() -> Result<OwnedFd, StdioError> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| StdioError::OpenNull(error.into()))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), StdioError> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|error| StdioError::Pipe(error.into()))
}

fn register(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, StdioError> {
    nonblocking(fd, interest).map_err(StdioError::Pipe)
}

/// Makes a descriptor of ours one that never blocks.
pub fn nonblocking(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    crate::sys::register(fd, interest)
}

/// Takes the host's one connection; the listener is closed in any case. Connections of anybody else
/// are closed: a container may reach the guest's own ports.
pub(crate) async fn accept(listener: AsyncFd<OwnedFd>) -> Option<AsyncFd<OwnedFd>> {
    let accept = async {
        loop {
            let accepted = listener.async_io(Interest::READABLE, |listener| {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                Ok(accept4(listener.as_raw_fd(), flags)?)
            });
            let socket = crate::sys::own_fd(accepted.await.ok()?);
            if !is_of_another_guest(&socket) {
                return Some(socket);
            }
        }
    };
    let socket = tokio::time::timeout(ACCEPT_DEADLINE, accept).await.ok()??;
    crate::sys::register(socket, Interest::READABLE | Interest::WRITABLE).ok()
}

/// Whether a vsock connection comes from anywhere but the host.
fn is_of_another_guest(socket: &OwnedFd) -> bool {
    // A socket of another family has no such address: without a guest, whoever has the directory
    // is the host.
    getpeername::<VsockAddr>(socket.as_raw_fd())
        .is_ok_and(|peer| peer.cid() != libc::VMADDR_CID_HOST)
}

/// Standard input: port to pipe.
async fn feed(listener: AsyncFd<OwnedFd>, pipe: AsyncFd<OwnedFd>) {
    let Some(socket) = accept(listener).await else {
        return;
    };
    tokio::select! {
        // A pipe that nobody reads any more ends the stream, whether bytes wait or not.
        _ = pipe.ready(Interest::ERROR) => {}
        _ = copy(&socket, &pipe) => {}
    }
}

/// Standard output or error: pipe to port.
async fn drain(listener: AsyncFd<OwnedFd>, pipe: AsyncFd<OwnedFd>) {
    let Some(socket) = accept(listener).await else {
        return;
    };
    // An error of either side ends both: the process then sees a closed pipe, the host an end.
    let _ = copy(&pipe, &socket).await;
    let _ = rustix::net::shutdown(socket.get_ref(), Shutdown::Write);
}

/// A terminal: both ways on one port.
async fn serve_terminal(
    listener: Option<AsyncFd<OwnedFd>>,
    master: oneshot::Receiver<Arc<AsyncFd<OwnedFd>>>,
) {
    let socket = match listener {
        Some(listener) => accept(listener).await,
        None => None,
    };
    let Ok(master) = master.await else {
        return;
    };
    let Some(socket) = socket else {
        // Nobody looks at it; it must not fill up.
        discard(&master).await;
        return;
    };
    let input = copy(&socket, &master);
    let output = async {
        let result = copy(&master, &socket).await;
        let _ = rustix::net::shutdown(socket.get_ref(), Shutdown::Write);
        result
    };
    tokio::pin!(input, output);
    tokio::select! {
        // The terminal's end is the output's; what is typed later goes nowhere.
        _ = &mut output => {}
        _ = &mut input => {
            let _ = output.await;
        }
    }
}

async fn discard(from: &AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; BUFFER_BYTES / 16];
    while read(from, &mut buffer).await.is_ok_and(|length| length > 0) {}
}

/// Moves bytes until the source ends.
pub(crate) async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = read(from, &mut buffer).await?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        while !rest.is_empty() {
            let written = to
                .async_io(Interest::WRITABLE, |to| Ok(rustix::io::write(to, rest)?))
                .await?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

async fn read(from: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    from.async_io(Interest::READABLE, |from| {
        match rustix::io::read(from.as_fd(), &mut *buffer) {
            // A terminal whose other side is closed for good.
            Err(Errno::IO) => Ok(0),
            other => Ok(other?),
        }
    })
    .await
}
