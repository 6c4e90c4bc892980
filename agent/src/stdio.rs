//! A process's streams: from vsock to the pipes or the terminal of the process, and back.
//!
//! The host names each stream, whose connection is expected before the request is answered (see
//! [`Arrivals`]). Processes get pipes and not the sockets themselves, because they open /dev/stdout
//! anew, which a socket does not allow.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use husk_protocol::messages::Stdio as Request;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::arrivals::{Arrival, ArrivalError, Arrivals};

/// Bytes that are moved at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// Why streams can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A terminal has one stream.
    #[error("a terminal's one stream is named in stdin, stdout and stderr must be 0")]
    TerminalStreams,
    /// A stream can't be expected.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// Pipes can't be made.
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    /// /dev/null can't be opened.
    #[error("cannot open /dev/null")]
    OpenNull(#[source] io::Error),
}

/// The process's side of its streams, ready to be handed to a stage. Dropped, the host's side ends.
#[derive(Debug)]
pub struct Streams {
    /// Standard input, output, error.
    pub fds: [OwnedFd; 3],
    /// Takes the terminal's master side, if there is to be one.
    pub terminal: Option<oneshot::Sender<Arc<AsyncFd<OwnedFd>>>>,
    /// Those who move the bytes.
    pub movers: Movers,
}

/// Tasks that move a process's bytes. Dropped, they end: there will be no process.
#[derive(Debug, Default)]
pub struct Movers(Vec<AbortHandle>);

impl Movers {
    fn spawn(&mut self, mover: impl Future<Output = ()> + Send + 'static) {
        self.0.push(tokio::spawn(mover).abort_handle());
    }

    /// Leaves them to their streams, with whose ends they end.
    pub fn let_go(mut self) {
        self.0.clear();
    }
}

impl Drop for Movers {
    fn drop(&mut self) {
        for mover in &self.0 {
            mover.abort();
        }
    }
}

impl Streams {
    /// Of a process that has none.
    pub fn none() -> Result<Streams, StdioError> {
        Ok(Streams {
            fds: [null()?, null()?, null()?],
            terminal: None,
            movers: Movers::default(),
        })
    }

    /// Expects the streams that a request names, and moves bytes once they are there.
    pub fn open(
        arrivals: &Arc<Arrivals>,
        request: &Request,
        is_terminal: bool,
    ) -> Result<Streams, StdioError> {
        if is_terminal {
            return Self::open_terminal(arrivals, request);
        }
        let mut movers = Movers::default();
        let stdin = match expect(arrivals, request.stdin)? {
            None => null()?,
            Some(arrival) => {
                let (theirs, ours) = pipe()?;
                let interest = Interest::WRITABLE | Interest::ERROR;
                movers.spawn(feed(arrival, register(ours, interest)?));
                theirs
            }
        };
        let mut output = |source| match expect(arrivals, source)? {
            None => null(),
            Some(arrival) => {
                let (ours, theirs) = pipe()?;
                movers.spawn(drain(arrival, register(ours, Interest::READABLE)?));
                Ok(theirs)
            }
        };
        Ok(Streams {
            fds: [stdin, output(request.stdout)?, output(request.stderr)?],
            terminal: None,
            movers,
        })
    }

    fn open_terminal(arrivals: &Arc<Arrivals>, request: &Request) -> Result<Streams, StdioError> {
        if request.stdout != 0 || request.stderr != 0 {
            return Err(StdioError::TerminalStreams);
        }
        let (sender, master) = oneshot::channel();
        let mut movers = Movers::default();
        movers.spawn(serve_terminal(expect(arrivals, request.stdin)?, master));
        Ok(Streams {
            terminal: Some(sender),
            movers,
            ..Self::none()?
        })
    }
}

/// Expects one stream, unless it is to be /dev/null.
fn expect(arrivals: &Arc<Arrivals>, source: u32) -> Result<Option<Arrival>, ArrivalError> {
    match source {
        0 => Ok(None),
        source => arrivals.expect(source).map(Some),
    }
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

/// Standard input: stream to pipe.
async fn feed(arrival: Arrival, pipe: AsyncFd<OwnedFd>) {
    let Some(socket) = arrival.connection().await else {
        return;
    };
    tokio::select! {
        // A pipe that nobody reads any more ends the stream, whether bytes wait or not.
        _ = pipe.ready(Interest::ERROR) => {}
        _ = copy(&socket, &pipe) => {}
    }
}

/// Standard output or error: pipe to stream.
async fn drain(arrival: Arrival, pipe: AsyncFd<OwnedFd>) {
    let Some(socket) = arrival.connection().await else {
        return;
    };
    // An error of either side ends both: the process then sees a closed pipe, the host an end.
    let _ = copy(&pipe, &socket).await;
    let _ = rustix::net::shutdown(socket.get_ref(), Shutdown::Write);
}

/// A terminal: both ways on one stream.
async fn serve_terminal(
    arrival: Option<Arrival>,
    master: oneshot::Receiver<Arc<AsyncFd<OwnedFd>>>,
) {
    let socket = match arrival {
        Some(arrival) => arrival.connection().await,
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
