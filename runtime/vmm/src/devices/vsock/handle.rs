//! The control thread's side of the vsock device: requests in, events out.
//!
//! A request waits in a mailbox until the device's thread takes it. While the driver is not up
//! nobody takes it, so the handle itself refuses what waits too long.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::complaints::Complaints;

/// How long a connection may take from the request to the guest's answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(25);

/// Most requests that wait for the device's thread.
pub const CONNECTS_WAITING_MAX: usize = 256;

/// A connection to make from the host to the guest.
#[derive(Debug)]
pub struct Connect {
    /// The port on which the guest listens.
    pub port: u32,
    /// Our port of the connection, by which the guest may tell it from others.
    pub host_port: u32,
    /// The caller's name for the connection; every event about it carries the name.
    pub stream: u64,
    /// What to tie to the guest's socket.
    pub descriptors: Descriptors,
}

/// The host's ends of a connection. They belong to the device from now on.
///
/// A pipe, FIFO or terminal should be non-blocking already: the flag lives in the open file
/// description, which others may share, so the device never sets it. A blocking pipe works, with
/// more system calls; a blocking terminal is refused, because nothing bounds how long it takes to
/// write to it. Sockets and regular files may be either.
#[derive(Debug)]
pub enum Descriptors {
    /// One socket that carries both directions.
    Duplex(OwnedFd),
    /// One descriptor per direction; a direction without one is shut down from the start.
    Split {
        /// Its bytes go to the guest, its end closes the guest's input.
        source: Option<OwnedFd>,
        /// The guest's bytes go here.
        sink: Option<OwnedFd>,
    },
}

/// What happened to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VsockEvent {
    /// The guest has accepted.
    Connected {
        /// See [`Connect::stream`].
        stream: u64,
    },
    /// There is no connection, and its descriptors are closed. No other event follows.
    Refused {
        /// See [`Connect::stream`].
        stream: u64,
        /// Why.
        why: Refusal,
    },
    /// The sink of an accepted connection has refused bytes that the guest sent. They are lost, and
    /// the guest is told that nobody reads any more. Comes once at most.
    SinkFailed {
        /// See [`Connect::stream`].
        stream: u64,
        /// The error of the host.
        why: String,
    },
    /// An accepted connection is over: every byte the guest sent is written, and the descriptors
    /// are closed. No other event follows.
    Closed {
        /// See [`Connect::stream`].
        stream: u64,
        /// Bytes that went to the guest.
        sent: u64,
        /// Bytes that the guest sent and the sink took.
        received: u64,
        /// When the sink took the first of them, as `monotonic_us` counts; 0: never.
        first_us: u64,
    },
    /// The agent's own connection is over.
    AgentClosed {
        /// Bytes that went to the guest.
        sent: u64,
        /// Bytes that the guest sent and the stream took.
        received: u64,
    },
}

/// Why a connection was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The guest sent RST.
    #[error("nothing in the guest listens on vsock port {port}")]
    NotListening {
        /// See [`Connect::port`].
        port: u32,
    },
    /// No answer within [`CONNECT_TIMEOUT`].
    #[error("the guest did not answer on vsock port {port} within {CONNECT_TIMEOUT:?}")]
    TimedOut {
        /// See [`Connect::port`].
        port: u32,
    },
    /// The guest answered with something else than a RESPONSE or a RST.
    #[error("the guest broke the vsock protocol on port {port}")]
    Protocol {
        /// See [`Connect::port`].
        port: u32,
    },
    /// The driver reset the device, or the machine has stopped.
    #[error("the guest's vsock driver went away")]
    DeviceStopped,
    /// Too many connections are open.
    #[error("{max} vsock connections are open, the most there may be")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// Our port is not one for connections, or another connection has it.
    #[error("the host's vsock port {port} is in use, or none for connections")]
    HostPort {
        /// See [`Connect::host_port`].
        port: u32,
    },
    /// The descriptor can't be served.
    #[error("cannot use the {which} descriptor: {why}")]
    Descriptor {
        /// Source, sink or duplex.
        which: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// [`CONNECTS_WAITING_MAX`].
    #[error("{CONNECTS_WAITING_MAX} vsock connections wait for the guest's driver")]
    TooManyWaiting,
}

/// Counters of the device since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VsockCounters {
    /// Connections ever accepted, by either side.
    pub connections: u64,
    /// Connections the device holds now.
    pub open: u64,
}

/// Asks the device for connections and hears of them. Any thread may use it.
#[derive(Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

impl VsockHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks for a connection. [`VsockEvent::Connected`] or [`VsockEvent::Refused`] follows, at
    /// the latest [`CONNECT_TIMEOUT`] from now.
    ///
    /// # Errors
    /// The request was not taken, no event follows, and the descriptors are closed.
    pub fn connect(&self, connect: Connect) -> Result<(), ConnectError> {
        let overdue = Instant::now() + CONNECT_TIMEOUT;
        let mut mailbox = self.shared.mailbox();
        if mailbox.requests.len() >= CONNECTS_WAITING_MAX {
            return Err(ConnectError::TooManyWaiting);
        }
        if !mailbox.is_driver_up && mailbox.requests.is_empty() {
            self.shared.arm(CONNECT_TIMEOUT);
        }
        mailbox.requests.push_back(Request { connect, overdue });
        drop(mailbox);
        raise(&self.shared.wake);
        Ok(())
    }

    /// A descriptor that is readable while [`Self::take_events`] has something to return. It is
    /// only for polling, level-triggered.
    #[must_use]
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.shared.poll.as_fd()
    }

    /// All events since the last call, in order. Never blocks. Their number is bounded by that
    /// of the requests: a guest can cause none of its own.
    #[must_use]
    pub fn take_events(&self) -> Vec<VsockEvent> {
        drain(&self.shared.event);
        drain(&self.shared.timer);
        let mut mailbox = self.shared.mailbox();
        if !mailbox.is_driver_up {
            self.shared.refuse_overdue(&mut mailbox, Instant::now());
        }
        mailbox.events.drain(..).collect()
    }

    /// The counters as of now.
    #[must_use]
    pub fn counters(&self) -> VsockCounters {
        VsockCounters {
            connections: self.shared.connections.load(Ordering::Relaxed),
            open: self.shared.open.load(Ordering::Relaxed),
        }
    }
}

/// A request and the time by which it must be answered.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) connect: Connect,
    pub(super) overdue: Instant,
}

/// What handle and device share.
pub(super) struct Shared {
    /// Readable when requests wait.
    pub(super) wake: OwnedFd,
    /// Readable when events wait.
    event: OwnedFd,
    /// Readable when a request is overdue and no driver is up.
    timer: OwnedFd,
    /// An epoll set of `event` and `timer`.
    poll: OwnedFd,
    pub(super) connections: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) complaints: Complaints,
    mailbox: Mutex<Mailbox>,
}

#[derive(Default)]
struct Mailbox {
    requests: VecDeque<Request>,
    events: VecDeque<VsockEvent>,
    is_driver_up: bool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = eventfd(0, flags)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&poll, &event, data, epoll::EventFlags::IN)?;
        epoll::add(&poll, &timer, data, epoll::EventFlags::IN)?;
        Ok(Self {
            wake: eventfd(0, flags)?,
            event,
            timer,
            poll,
            connections: AtomicU64::new(0),
            open: AtomicU64::new(0),
            complaints: Complaints::default(),
            mailbox: Mutex::default(),
        })
    }

    /// Says whether the device's thread takes requests from now on.
    pub(super) fn set_driver_up(&self, is_driver_up: bool) {
        let mut mailbox = self.mailbox();
        mailbox.is_driver_up = is_driver_up;
        if is_driver_up {
            self.arm(Duration::ZERO);
        } else {
            self.refuse_overdue(&mut mailbox, Instant::now());
        }
    }

    /// The requests that wait, oldest first.
    pub(super) fn take_requests(&self) -> VecDeque<Request> {
        drain(&self.wake);
        std::mem::take(&mut self.mailbox().requests)
    }

    /// Puts an event into the mailbox and wakes whoever polls the handle.
    pub(super) fn report(&self, event: VsockEvent) {
        self.mailbox().events.push_back(event);
        raise(&self.event);
    }

    /// Refuses what is overdue and sets the timer for what comes next.
    fn refuse_overdue(&self, mailbox: &mut Mailbox, now: Instant) {
        while let Some(request) = mailbox.requests.front().filter(|r| r.overdue <= now) {
            let Connect { port, stream, .. } = request.connect;
            let why = Refusal::TimedOut { port };
            mailbox.requests.pop_front();
            mailbox
                .events
                .push_back(VsockEvent::Refused { stream, why });
        }
        let next = mailbox.requests.front();
        self.arm(next.map_or(Duration::ZERO, |request| request.overdue - now));
    }

    /// Sets the timer; zero stops it.
    fn arm(&self, after: Duration) {
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: after.as_secs().cast_signed(),
                tv_nsec: i64::from(after.subsec_nanos()),
            },
        };
        // Both numbers are in range, and that is all that timerfd_settime checks.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer);
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        // No code that holds the lock leaves the mailbox half changed, so a panic elsewhere does
        // not make it unusable.
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes an eventfd readable.
pub(super) fn raise(event: &OwnedFd) {
    // An eventfd refuses a write only at its maximum, when it is readable anyway.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Makes an eventfd or timerfd unreadable.
fn drain(fd: &OwnedFd) {
    // It fails only when there is nothing to read.
    let _ = rustix::io::read(fd, &mut [0_u8; size_of::<u64>()]);
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use husk_vmm_control::HOST_PORT_MIN;

    use super::*;

    #[test]
    fn request_that_no_driver_takes_is_refused_when_it_is_overdue() {
        let handle = VsockHandle::new(Arc::new(Shared::new().unwrap()));
        let null = File::open("/dev/null").unwrap();
        let descriptors = Descriptors::Split {
            source: Some(null.into()),
            sink: None,
        };
        let connect = Connect {
            port: 9,
            host_port: HOST_PORT_MIN,
            stream: 5,
            descriptors,
        };
        handle.connect(connect).unwrap();
        assert_eq!(handle.take_events(), []);
        let shared = &handle.shared;

        shared.refuse_overdue(&mut shared.mailbox(), Instant::now() + CONNECT_TIMEOUT);

        let why = Refusal::TimedOut { port: 9 };
        assert_eq!(
            handle.take_events(),
            [VsockEvent::Refused { stream: 5, why }]
        );
        assert!(shared.take_requests().is_empty());
    }
}
