//! The client's side of a VMM's control socket.
//!
//! [`Control::calls`](Control) may be made by many tasks at once; one task runs [`Reader::run`],
//! which routes replies by request id and closed streams by stream id. As it ends, every pending call
//! fails and every stream counts as closed.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_vmm_control::{
    Answer, Call, Channel, ChannelError, Connect, Event, ExitReason, Failure, Message, Request,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use crate::error::cap_text;
use crate::readiness;

/// Makes calls to one VMM. Clones share the socket.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    inner: Arc<Inner>,
}

/// Receives what the VMM says.
#[derive(Debug)]
pub(crate) struct Reader {
    inner: Arc<Inner>,
    launched: Option<oneshot::Sender<Launched>>,
}

/// The jailed process.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Why there is nothing more to read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LastWord {
    /// The VMM said how the machine ended.
    Exited(ExitReason),
    /// It closed the socket without a word.
    HungUp,
    /// It said what no VMM says. It is not to be trusted any further.
    Nonsense(String),
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The VMM said no.
    #[error(transparent)]
    Refused(Failure),
    /// The call could not be sent.
    #[error("cannot send a call to the VMM")]
    Send(#[source] ChannelError),
    /// The VMM hung up before it answered.
    #[error("the VMM hung up")]
    HungUp,
}

/// What there is to know of a stream, for any number of waiters. The sender is dropped as the stream
/// closes.
pub(crate) type StreamEnd = watch::Receiver<StreamState>;

/// See [`StreamEnd`].
#[derive(Debug, Default)]
pub(crate) struct StreamState {
    /// The error that its sink has met.
    pub(crate) failure: Option<String>,
    /// When the guest's first byte was written to its sink; 0 before the stream's end, and where
    /// there was none.
    pub(crate) first_us: u64,
}

#[derive(Debug)]
struct Inner {
    socket: AsyncFd<Socket>,
    next_request: AtomicU64,
    next_stream: AtomicU64,
    routes: Mutex<Routes>,
}

#[derive(Debug, Default)]
struct Routes {
    /// The reader has ended: no call can be answered any more.
    is_over: bool,
    replies: HashMap<u64, oneshot::Sender<Result<Answer, Failure>>>,
    streams: HashMap<u64, watch::Sender<StreamState>>,
}

/// A [`Channel`] as `AsyncFd` wants it.
#[derive(Debug)]
struct Socket(Channel);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Control {
    /// Takes over the parent's end of a control socket. The receiver gets the jailed process once
    /// it exists.
    pub(crate) fn new(
        channel: Channel,
    ) -> std::io::Result<(Self, Reader, oneshot::Receiver<Launched>)> {
        rustix::io::ioctl_fionbio(&channel, true)?;
        let inner = Arc::new(Inner {
            socket: readiness::watch(Socket(channel), Interest::READABLE | Interest::WRITABLE)?,
            next_request: AtomicU64::new(1),
            next_stream: AtomicU64::new(1),
            routes: Mutex::default(),
        });
        let (launched, is_launched) = oneshot::channel();
        let reader = Reader {
            inner: Arc::clone(&inner),
            launched: Some(launched),
        };
        Ok((Self { inner }, reader, is_launched))
    }

    /// Makes a call and waits for its answer.
    pub(crate) async fn call(
        &self,
        call: Call,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, CallError> {
        let id = self.inner.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answered) = oneshot::channel();
        {
            let mut routes = self.inner.routes();
            if routes.is_over {
                return Err(CallError::HungUp);
            }
            routes.replies.insert(id, reply);
        }
        let _forget = ForgetReply {
            inner: &self.inner,
            id,
        };
        self.inner.send(&Request { id, call }, descriptors).await?;
        match answered.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => Err(CallError::Refused(failure)),
            Err(_) => Err(CallError::HungUp),
        }
    }

    /// Connects a port of the guest to descriptors, from a port of the host that no other connection
    /// has. Answers once the guest has accepted.
    pub(crate) async fn connect(
        &self,
        port: u32,
        host_port: u32,
        source: Option<&OwnedFd>,
        sink: Option<&OwnedFd>,
    ) -> Result<StreamEnd, CallError> {
        let connect = Connect {
            port,
            host_port,
            stream: 0,
            source: source.is_some(),
            sink: sink.is_some(),
            duplex: false,
        };
        let descriptors: Vec<_> = source.into_iter().chain(sink).map(AsFd::as_fd).collect();
        self.connect_as(connect, &descriptors).await
    }

    /// The same with a socket, both ways.
    pub(crate) async fn connect_socket(
        &self,
        port: u32,
        host_port: u32,
        socket: &OwnedFd,
    ) -> Result<StreamEnd, CallError> {
        let connect = Connect {
            port,
            host_port,
            stream: 0,
            source: false,
            sink: false,
            duplex: true,
        };
        self.connect_as(connect, &[socket.as_fd()]).await
    }

    async fn connect_as(
        &self,
        mut connect: Connect,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<StreamEnd, CallError> {
        let stream = self.inner.next_stream.fetch_add(1, Ordering::Relaxed);
        connect.stream = stream;
        let (open, end) = watch::channel(StreamState::default());
        self.inner.routes().streams.insert(stream, open);
        let connected = self.call(Call::Connect(connect), descriptors).await;
        if let Err(error) = connected {
            self.inner.routes().streams.remove(&stream);
            return Err(error);
        }
        Ok(end)
    }
}

impl Reader {
    /// Routes what the VMM says until it says no more.
    pub(crate) async fn run(mut self) -> LastWord {
        let last_word = self.route_all().await;
        let mut routes = self.inner.routes();
        routes.is_over = true;
        routes.replies.clear();
        routes.streams.clear();
        last_word
    }

    async fn route_all(&mut self) -> LastWord {
        let mut exited = None;
        loop {
            let (message, descriptors) = match self.inner.receive().await {
                Ok(received) => received,
                Err(ChannelError::HungUp) => {
                    return exited.map_or(LastWord::HungUp, LastWord::Exited);
                }
                Err(error) => return LastWord::Nonsense(error.to_string()),
            };
            match message {
                Message::Launched { pid } => {
                    let (Some(launched), Some(pidfd)) =
                        (self.launched.take(), descriptors.into_iter().next())
                    else {
                        return LastWord::Nonsense("unexpected message `launched`".to_owned());
                    };
                    let _ = launched.send(Launched { pid, pidfd });
                }
                Message::Reply { id, result } => {
                    let waiting = self.inner.routes().replies.remove(&id);
                    // Nobody waits any more: the caller's deadline has passed.
                    let _ = waiting.map(|waiting| waiting.send(result));
                }
                Message::Event(Event::StreamFailed { stream, text }) => {
                    if let Some(end) = self.inner.routes().streams.get(&stream) {
                        end.send_modify(|state| state.failure = Some(cap_text(&text)));
                    }
                }
                Message::Event(Event::StreamClosed {
                    stream, first_us, ..
                }) => {
                    if let Some(end) = self.inner.routes().streams.remove(&stream) {
                        end.send_modify(|state| state.first_us = first_us);
                    }
                }
                Message::Event(Event::Exited { reason }) => exited = Some(reason),
            }
            // A VMM that never stops talking must not starve the other tasks of this thread.
            tokio::task::yield_now().await;
        }
    }
}

impl Inner {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), CallError> {
        loop {
            match self.socket.get_ref().0.send(request, descriptors) {
                Ok(()) => return Ok(()),
                Err(ChannelError::HungUp) => return Err(CallError::HungUp),
                Err(ChannelError::WouldBlock) => {}
                Err(error) => return Err(CallError::Send(error)),
            }
            let mut ready = self
                .socket
                .writable()
                .await
                .map_err(|_| CallError::HungUp)?;
            // Tried again before waiting: room may have come since the attempt above.
            match self.socket.get_ref().0.send(request, descriptors) {
                Ok(()) => return Ok(()),
                Err(ChannelError::WouldBlock) => ready.clear_ready(),
                Err(ChannelError::HungUp) => return Err(CallError::HungUp),
                Err(error) => return Err(CallError::Send(error)),
            }
        }
    }

    async fn receive(&self) -> Result<(Message, Vec<OwnedFd>), ChannelError> {
        loop {
            let mut ready = self.socket.readable().await.map_err(ChannelError::Io)?;
            match self.socket.get_ref().0.receive() {
                Err(ChannelError::WouldBlock) => ready.clear_ready(),
                received => return received,
            }
        }
    }
}

/// A call that is given up must not leave its place behind.
struct ForgetReply<'a> {
    inner: &'a Inner,
    id: u64,
}

impl Drop for ForgetReply<'_> {
    fn drop(&mut self) {
        self.inner.routes().replies.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use husk_vmm_control::HOST_PORT_MIN;

    use super::*;

    fn pair() -> (Control, Reader, oneshot::Receiver<Launched>, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        let (control, reader, launched) = Control::new(ours).unwrap();
        (control, reader, launched, theirs)
    }

    #[tokio::test]
    async fn replies_find_their_calls_in_any_order() {
        let (control, reader, _, vmm) = pair();
        tokio::spawn(reader.run());
        let fake = thread::spawn(move || {
            let first = vmm.receive::<Request>().unwrap().0;
            let second = vmm.receive::<Request>().unwrap().0;
            for request in [second, first] {
                let result = match request.call {
                    Call::Pause => Ok(Answer::Done),
                    _ => Err(Failure {
                        text: "no".to_owned(),
                    }),
                };
                let id = request.id;
                vmm.send(&Message::Reply { id, result }, &[]).unwrap();
            }
        });
        let (paused, resumed) = tokio::join!(
            control.call(Call::Pause, &[]),
            control.call(Call::Resume, &[])
        );
        assert!(matches!(paused, Ok(Answer::Done)));
        assert!(matches!(resumed, Err(CallError::Refused(_))));
        fake.join().unwrap();
    }

    #[tokio::test]
    async fn hang_up_ends_calls_and_streams() {
        let (control, reader, _, vmm) = pair();
        let reading = tokio::spawn(reader.run());
        let fake = thread::spawn(move || {
            let connect = vmm.receive::<Request>().unwrap().0;
            let reply = Message::Reply {
                id: connect.id,
                result: Ok(Answer::Done),
            };
            vmm.send(&reply, &[]).unwrap();
            vmm.receive::<Request>().unwrap();
        });
        let mut end = control.connect(1, HOST_PORT_MIN, None, None).await.unwrap();
        assert!(matches!(
            control.call(Call::Pause, &[]).await,
            Err(CallError::HungUp)
        ));
        assert!(end.changed().await.is_err());
        assert_eq!(reading.await.unwrap(), LastWord::HungUp);
        assert!(matches!(
            control.call(Call::Pause, &[]).await,
            Err(CallError::HungUp)
        ));
        fake.join().unwrap();
    }

    #[tokio::test]
    async fn stream_that_failed_ends_with_its_error() {
        let (control, reader, _, vmm) = pair();
        tokio::spawn(reader.run());
        let fake = thread::spawn(move || {
            let connect = vmm.receive::<Request>().unwrap().0;
            let Call::Connect(Connect { stream, .. }) = connect.call else {
                panic!("no connect");
            };
            let (id, result) = (connect.id, Ok(Answer::Done));
            let text = "full".to_owned();
            for message in [
                Message::Reply { id, result },
                Message::Event(Event::StreamFailed { stream, text }),
                Message::Event(Event::StreamClosed {
                    stream,
                    sent: 0,
                    received: 7,
                    first_us: 5,
                }),
            ] {
                vmm.send(&message, &[]).unwrap();
            }
            vmm
        });
        let mut end = control.connect(1, HOST_PORT_MIN, None, None).await.unwrap();
        while end.changed().await.is_ok() {}
        assert_eq!(end.borrow().failure.as_deref(), Some("full"));
        assert_eq!(end.borrow().first_us, 5);
        drop(fake.join().unwrap());
    }

    #[tokio::test]
    async fn nonsense_is_the_last_word() {
        let (_control, reader, _, vmm) = pair();
        vmm.send(&"hello", &[]).unwrap();
        assert!(matches!(reader.run().await, LastWord::Nonsense(_)));
    }

    #[tokio::test]
    async fn second_launch_is_nonsense() {
        let (_control, reader, launched, vmm) = pair();
        let (pidfd, _writer) = std::io::pipe().unwrap();
        for _ in 0..2 {
            vmm.send(&Message::Launched { pid: 5 }, &[pidfd.as_fd()])
                .unwrap();
        }
        assert!(matches!(reader.run().await, LastWord::Nonsense(_)));
        assert_eq!(launched.await.unwrap().pid, 5);
    }

    #[tokio::test]
    async fn exit_reason_is_kept_until_the_hang_up() {
        let (_control, reader, _, vmm) = pair();
        let reason = ExitReason::TripleFault;
        vmm.send(&Message::Event(Event::Exited { reason }), &[])
            .unwrap();
        drop(vmm);
        assert_eq!(
            reader.run().await,
            LastWord::Exited(ExitReason::TripleFault)
        );
    }
}
