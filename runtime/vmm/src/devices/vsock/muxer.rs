//! All connections of the device: which packet and which readiness belongs to which.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use husk_vmm_control::{HOST_PORT_MAX, HOST_PORT_MIN};
use rustix::event::epoll::EventFlags;

use super::connection::{Connection, Ends, Owner, Phase, Pumped, Reaction};
use super::handle::{Connect, Descriptors, Refusal, Request, Shared, VsockEvent};
use super::io::{Endpoint, Slice};
use super::packet::{Header, Op, TYPE_STREAM};
use super::queues::{Incoming, Malformed, PacketQueue};
use super::{AGENT_PORT, CONNECTIONS_MAX, GUEST_CID, HOST_CID, RESETS_WAITING_MAX};

/// How long the guest may take to confirm the end of a connection. Linux gives its peers the same
/// (`VSOCK_CLOSE_TIMEOUT`).
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// See the module.
pub(super) struct Muxer {
    shared: Arc<Shared>,
    epoll: Rc<OwnedFd>,
    /// By our port, which no two connections have in common.
    connections: HashMap<u32, Connection>,
    /// Ports of connections that may have something to send.
    ready: VecDeque<u32>,
    /// Answers that belong to no connection.
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u32)>,
    /// The stream for the agent until it comes for it.
    agent: Option<OwnedFd>,
}

impl Muxer {
    pub(super) fn new(shared: Arc<Shared>, epoll: Rc<OwnedFd>, agent: Option<OwnedFd>) -> Self {
        Self {
            shared,
            epoll,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            agent,
        }
    }

    /// Starts a connection that the host asks for.
    pub(super) fn connect(&mut self, request: Request) {
        let Request { connect, overdue } = request;
        let Connect {
            port,
            host_port,
            stream,
            descriptors,
        } = connect;
        if self.connections.len() >= CONNECTIONS_MAX {
            let max = CONNECTIONS_MAX;
            return self.refuse(stream, Refusal::TooMany { max });
        }
        let is_for_connections = (HOST_PORT_MIN..=HOST_PORT_MAX).contains(&host_port);
        if !is_for_connections || self.connections.contains_key(&host_port) {
            return self.refuse(stream, Refusal::HostPort { port: host_port });
        }
        let ends = match self.adopt(descriptors, host_port) {
            Ok(ends) => ends,
            Err(why) => return self.refuse(stream, why),
        };
        let owner = Owner::Stream(stream);
        let mut connection = Connection::new(owner, Phase::Requested, port, host_port, ends);
        connection.deadline = Some(overdue);
        self.deadlines.insert((overdue, host_port));
        self.insert(connection);
    }

    /// Whether the answer to one more packet can be kept until there is an rx buffer for it.
    pub(super) fn may_receive(&self) -> bool {
        self.resets.len() < RESETS_WAITING_MAX
    }

    /// Takes a packet of the guest.
    pub(super) fn receive(&mut self, packet: Result<Incoming<'_>, Malformed>, now: Instant) {
        let (header, payload) = match packet {
            Ok(Incoming { header, payload }) => (header, Some(payload)),
            Err(Malformed::Payload(header)) => (header, None),
            Err(Malformed::Header) => {
                self.complain(format_args!("a packet has no header"));
                return;
            }
        };
        if header.src_cid != GUEST_CID {
            let cid = header.src_cid;
            self.complain(format_args!("a packet claims to come from CID {cid}"));
            return;
        }
        if header.dst_cid != HOST_CID || header.socket_type != TYPE_STREAM {
            return self.reset_unknown(&header);
        }
        let known = self.connections.get_mut(&header.dst_port);
        let known = known.filter(|connection| {
            connection.guest_port == header.src_port && connection.phase != Phase::Draining
        });
        match (known, payload) {
            (Some(connection), Some(payload)) => {
                let reaction = connection.receive(&header, payload);
                self.react(header.dst_port, reaction, now);
            }
            (Some(_), None) => self.react(header.dst_port, Reaction::Violation, now),
            (None, Some(payload)) => self.receive_unknown(&header, &payload, now),
            (None, None) => self.reset_unknown(&header),
        }
    }

    /// Takes an event of a descriptor.
    pub(super) fn ready(&mut self, token: u64, events: EventFlags, now: Instant) {
        let Some((host_port, side)) = Side::of(token) else {
            return;
        };
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        let has_error = events.contains(EventFlags::ERR);
        let is_hung_up = has_error || events.contains(EventFlags::HUP);
        if side != Side::Sink && (is_hung_up || events.contains(EventFlags::IN)) {
            connection.source_is_ready();
        }
        if side != Side::Source {
            if is_hung_up {
                connection.sink_hung_up(has_error);
            } else if events.contains(EventFlags::OUT) {
                connection.sink_is_ready();
            }
        }
        self.settle(host_port, now);
    }

    /// When [`Self::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends the connections that the guest has kept waiting for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((_, host_port)) =
            self.deadlines.first().copied().filter(|(at, _)| *at <= now)
        {
            self.deadlines.pop_first();
            let Some(connection) = self.connections.get_mut(&host_port) else {
                continue;
            };
            connection.deadline = None;
            if connection.is_announced {
                let reset = connection.header(Op::Reset, 0);
                self.resets.push_back(reset);
            }
            let port = connection.guest_port;
            self.end(host_port, Refusal::TimedOut { port }, now);
        }
    }

    /// Sends what can be sent, each connection in its turn.
    pub(super) fn pump(
        &mut self,
        rx: &mut PacketQueue<'_>,
        now: Instant,
    ) -> Result<Pumped, virtio_queue::Error> {
        while let Some(reset) = self.resets.front() {
            if !rx.send(reset)? {
                return Ok(Pumped::NoBuffers);
            }
            self.resets.pop_front();
        }
        for _ in 0..self.ready.len() {
            let Some(host_port) = self.ready.pop_front() else {
                break;
            };
            let Some(connection) = self.connections.get_mut(&host_port) else {
                continue;
            };
            connection.is_queued = false;
            let pumped = connection.pump(rx)?;
            match pumped {
                Pumped::Idle => {}
                Pumped::More => {
                    connection.is_queued = true;
                    self.ready.push_back(host_port);
                }
                Pumped::NoBuffers => {
                    connection.is_queued = true;
                    self.ready.push_front(host_port);
                }
            }
            self.conclude(host_port, now);
            if pumped == Pumped::NoBuffers {
                return Ok(Pumped::NoBuffers);
            }
        }
        let is_idle = self.ready.is_empty() && self.resets.is_empty();
        Ok(if is_idle { Pumped::Idle } else { Pumped::More })
    }

    /// Cuts all connections off from the guest. What it has sent may still go to the sinks.
    pub(super) fn cut_off(&mut self, now: Instant) {
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for host_port in ports {
            self.end(host_port, Refusal::DeviceStopped, now);
        }
        self.resets.clear();
        self.ready.clear();
    }

    /// Whether no connection is left.
    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Gives up what the sinks have not taken. Returns the agent's stream if it was never used.
    pub(super) fn finish(mut self, now: Instant) -> Option<OwnedFd> {
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for host_port in ports {
            if let Some(connection) = self.connections.get_mut(&host_port) {
                connection.abandon();
            }
            self.conclude(host_port, now);
        }
        self.agent.take()
    }

    /// Takes a packet for a connection that does not exist.
    fn receive_unknown(&mut self, header: &Header, payload: &[Slice<'_>], now: Instant) {
        let is_for_agent = header.op == Op::Request
            && header.dst_port == AGENT_PORT
            && payload.is_empty()
            && !self.connections.contains_key(&AGENT_PORT);
        let stream = if is_for_agent {
            self.agent.take()
        } else {
            None
        };
        let Some(stream) = stream else {
            return self.reset_unknown(header);
        };
        let ends = match self.adopt(Descriptors::Duplex(stream), AGENT_PORT) {
            Ok(ends) => ends,
            Err(why) => {
                self.complain(format_args!("the agent's stream: {why}"));
                return self.reset_unknown(header);
            }
        };
        let port = header.src_port;
        let mut agent = Connection::new(Owner::Agent, Phase::Open, port, AGENT_PORT, ends);
        agent.learn_credit(header);
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        self.insert(agent);
        self.settle(AGENT_PORT, now);
    }

    /// Answers a packet that belongs to no connection.
    fn reset_unknown(&mut self, header: &Header) {
        // virtio 1.2, 5.10.6.4 and Linux: a RST is never answered, or two ends that know nothing
        // of each other would go on for ever.
        if header.op != Op::Reset {
            self.resets.push_back(header.reset_reply());
        }
    }

    /// Draws the consequence of a packet for its connection.
    fn react(&mut self, host_port: u32, reaction: Reaction, now: Instant) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        let port = connection.guest_port;
        match reaction {
            Reaction::None => self.settle(host_port, now),
            Reaction::Accepted => {
                if let Some(deadline) = connection.deadline.take() {
                    self.deadlines.remove(&(deadline, host_port));
                }
                if let Owner::Stream(stream) = connection.owner {
                    self.shared.connections.fetch_add(1, Ordering::Relaxed);
                    self.shared.report(VsockEvent::Connected { stream });
                }
                self.settle(host_port, now);
            }
            Reaction::Reset => self.end(host_port, Refusal::NotListening { port }, now),
            Reaction::Violation => {
                let reset = connection.header(Op::Reset, 0);
                self.resets.push_back(reset);
                self.complain(format_args!(
                    "port {port} broke the protocol of a connection"
                ));
                self.end(host_port, Refusal::Protocol { port }, now);
            }
        }
    }

    /// Ends a connection for the guest: refused if it was never accepted, else drained.
    fn end(&mut self, host_port: u32, why: Refusal, now: Instant) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        match (connection.phase, connection.owner) {
            (Phase::Requested, Owner::Stream(stream)) => {
                self.remove(host_port);
                self.refuse(stream, why);
            }
            _ => {
                connection.drain();
                self.conclude(host_port, now);
            }
        }
    }

    /// Looks at a connection that has changed: it may have something to send, or be over.
    fn settle(&mut self, host_port: u32, now: Instant) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        if connection.is_shut_by_guest() && connection.phase != Phase::Draining {
            // Nothing of us is on its way any more, so RST can confirm at once (5.10.6.6). It
            // goes out with what waits already, so that the guest learns our last RESPONSE first.
            let reset = connection.header(Op::Reset, 0);
            if connection.is_announced {
                self.resets.push_back(reset);
            }
            connection.drain();
        }
        if !connection.is_queued && connection.phase != Phase::Draining {
            connection.is_queued = true;
            self.ready.push_back(host_port);
        }
        self.conclude(host_port, now);
    }

    /// Reports a connection that is over, and forgets it when the guest has too.
    fn conclude(&mut self, host_port: u32, now: Instant) {
        let Some(connection) = self.connections.get_mut(&host_port) else {
            return;
        };
        if let (Some(why), Owner::Stream(stream)) = (connection.failure.take(), connection.owner) {
            let why = why.to_string();
            self.shared.report(VsockEvent::SinkFailed { stream, why });
        }
        if !connection.is_over() || connection.phase == Phase::Requested {
            return;
        }
        let (sent, received) = connection.bytes();
        if !std::mem::replace(&mut connection.is_reported, true) {
            self.shared.report(match connection.owner {
                Owner::Stream(stream) => VsockEvent::Closed {
                    stream,
                    sent,
                    received,
                    first_us: connection.first_us(),
                },
                Owner::Agent => VsockEvent::AgentClosed { sent, received },
            });
        }
        match connection.phase {
            Phase::Draining => self.remove(host_port),
            Phase::Open => {
                let deadline = now + CLOSE_TIMEOUT;
                connection.phase = Phase::Closing;
                connection.deadline = Some(deadline);
                self.deadlines.insert((deadline, host_port));
                if !connection.is_queued {
                    connection.is_queued = true;
                    self.ready.push_back(host_port);
                }
            }
            Phase::Requested | Phase::Closing => {}
        }
    }

    /// Takes the descriptors of a connection and watches them.
    fn adopt(&self, descriptors: Descriptors, host_port: u32) -> Result<Ends, Refusal> {
        let adopt = |fd, side: Side| {
            let endpoint = Endpoint::new(fd, &self.epoll, side.token(host_port), side.interest());
            endpoint.map(Rc::new).map_err(|error| Refusal::Descriptor {
                which: side.name(),
                why: chain_of(&error),
            })
        };
        match descriptors {
            Descriptors::Duplex(fd) => {
                let both = adopt(fd, Side::Both)?;
                if !both.is_socket() {
                    return Err(Refusal::Descriptor {
                        which: Side::Both.name(),
                        why: "it is not a socket".to_owned(),
                    });
                }
                Ok(Ends {
                    source: Some(Rc::clone(&both)),
                    sink: Some(both),
                })
            }
            Descriptors::Split { source, sink } => Ok(Ends {
                source: source.map(|fd| adopt(fd, Side::Source)).transpose()?,
                sink: sink.map(|fd| adopt(fd, Side::Sink)).transpose()?,
            }),
        }
    }

    fn insert(&mut self, mut connection: Connection) {
        let host_port = connection.host_port;
        connection.is_queued = true;
        self.ready.push_back(host_port);
        self.connections.insert(host_port, connection);
        self.count();
    }

    fn remove(&mut self, host_port: u32) {
        if let Some(connection) = self.connections.remove(&host_port)
            && let Some(deadline) = connection.deadline
        {
            self.deadlines.remove(&(deadline, host_port));
        }
        self.count();
    }

    fn count(&self) {
        let open = self.connections.len() as u64;
        self.shared.open.store(open, Ordering::Relaxed);
    }

    fn complain(&self, what: fmt::Arguments<'_>) {
        self.shared.complaints.note(what);
    }

    fn refuse(&self, stream: u64, why: Refusal) {
        self.shared.report(VsockEvent::Refused { stream, why });
    }
}

/// Which of a connection's descriptors an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Sink,
    Both,
}

impl Side {
    const BITS: u32 = 2;

    /// The epoll token: far below those that the device keeps for itself.
    fn token(self, host_port: u32) -> u64 {
        (u64::from(host_port) << Self::BITS) | self as u64
    }

    fn of(token: u64) -> Option<(u32, Self)> {
        let host_port = u32::try_from(token >> Self::BITS).ok()?;
        let sides = [Self::Source, Self::Sink, Self::Both];
        let side = sides
            .into_iter()
            .find(|side| side.token(host_port) == token)?;
        Some((host_port, side))
    }

    fn interest(self) -> EventFlags {
        match self {
            Self::Source => EventFlags::IN,
            Self::Sink => EventFlags::OUT,
            Self::Both => EventFlags::IN | EventFlags::OUT,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Sink => "sink",
            Self::Both => "duplex",
        }
    }
}

/// An error and its causes in one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
