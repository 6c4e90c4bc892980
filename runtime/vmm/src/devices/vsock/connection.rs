//! One connection: its life, its credit, and its two descriptors.
//!
//! A connection reacts to packets and to readiness by changing what it wants; the muxer then lets
//! it send ([`Connection::pump`]) and draws the consequences of where it has got to.

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Instant;

use husk_vmm_control::monotonic_us;
use rustix::net::Shutdown;

use super::credit::Credit;
use super::io::{Endpoint, Slice};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::queues::{Filled, PacketQueue, split, total};
use super::{GUEST_CID, HOST_CID, RECEIVE_BUFFER_BYTES};

/// Who asked for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The host, under this name.
    Stream(u64),
    /// The agent.
    Agent,
}

/// Where in its life a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// We have asked, or are about to, and the guest has not answered.
    Requested,
    /// Bytes flow.
    Open,
    /// Both directions are over, and the guest has to confirm with RST.
    Closing,
    /// For the guest it no longer exists; the sink has not taken all bytes yet.
    Draining,
}

/// What a packet did to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaction {
    /// It goes on.
    None,
    /// The guest has accepted.
    Accepted,
    /// The guest has sent RST.
    Reset,
    /// The packet breaks the rules.
    Violation,
}

/// How far a connection got with sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// It has nothing more to send now.
    Idle,
    /// It has had its turn and has more.
    More,
    /// The driver has no rx buffers.
    NoBuffers,
}

/// Both descriptors of a connection, before it exists.
pub(super) struct Ends {
    pub(super) source: Option<Rc<Endpoint>>,
    pub(super) sink: Option<Rc<Endpoint>>,
}

/// See the module.
pub(super) struct Connection {
    pub(super) owner: Owner,
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    pub(super) phase: Phase,
    /// When the guest's answer is overdue.
    pub(super) deadline: Option<Instant>,
    /// Whether it is in the muxer's queue of those that may have something to send.
    pub(super) is_queued: bool,
    pub(super) is_reported: bool,
    /// Whether the guest knows of it.
    pub(super) is_announced: bool,
    source: Option<End>,
    sink: Option<End>,
    is_duplex: bool,
    /// What the guest has sent and the sink has not taken.
    tail: VecDeque<u8>,
    /// SHUTDOWN bits of the guest.
    guest_shut: u32,
    /// SHUTDOWN bits that we have told the guest.
    shut_told: u32,
    credit: Credit,
    owes_credit_update: bool,
    wants_credit: bool,
    has_asked_for_credit: bool,
    sent: u64,
    received: u64,
    /// Why the sink takes no more, until it is reported.
    pub(super) failure: Option<io::Error>,
    first_us: u64,
}

struct End {
    endpoint: Rc<Endpoint>,
    is_ready: bool,
}

impl Connection {
    /// A connection of which the guest has not heard. `phase` is [`Phase::Requested`] for one
    /// that the host asks for and [`Phase::Open`] for one that the guest has asked for.
    pub(super) fn new(
        owner: Owner,
        phase: Phase,
        guest_port: u32,
        host_port: u32,
        ends: Ends,
    ) -> Self {
        let is_duplex = match (&ends.source, &ends.sink) {
            (Some(source), Some(sink)) => Rc::ptr_eq(source, sink),
            _ => false,
        };
        let source = ends.source.map(|endpoint| End {
            // What epoll watches says itself when it has something: a FIFO without a writer yet
            // would otherwise read as ended.
            is_ready: endpoint.is_always_ready(),
            endpoint,
        });
        let sink = ends.sink.map(|endpoint| End {
            is_ready: true,
            endpoint,
        });
        Self {
            owner,
            guest_port,
            host_port,
            phase,
            deadline: None,
            is_queued: false,
            is_reported: false,
            is_announced: false,
            source,
            sink,
            is_duplex,
            tail: VecDeque::new(),
            guest_shut: 0,
            shut_told: 0,
            credit: Credit::default(),
            owes_credit_update: false,
            wants_credit: false,
            has_asked_for_credit: false,
            sent: 0,
            received: 0,
            failure: None,
            first_us: 0,
        }
    }

    /// When the sink took its first byte, as `monotonic_us` counts; 0: never.
    pub(super) fn first_us(&self) -> u64 {
        self.first_us
    }

    /// Bytes to the guest, and bytes from it that the sink took.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.sent, self.received)
    }

    /// Whether both descriptors are closed.
    pub(super) fn is_over(&self) -> bool {
        self.source.is_none() && self.sink.is_none()
    }

    /// Whether the guest has shut both directions, and so waits for RST.
    pub(super) fn is_shut_by_guest(&self) -> bool {
        self.guest_shut == SHUTDOWN_BOTH
    }

    /// Takes a packet that is addressed to this connection.
    pub(super) fn receive(&mut self, header: &Header, payload: Vec<Slice<'_>>) -> Reaction {
        self.learn_credit(header);
        match (self.phase, header.op) {
            (_, Op::Reset) => Reaction::Reset,
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Open;
                Reaction::Accepted
            }
            (Phase::Open | Phase::Closing, Op::ReadWrite) => self.receive_data(payload),
            (Phase::Open | Phase::Closing, Op::CreditUpdate) => Reaction::None,
            (Phase::Open | Phase::Closing, Op::CreditRequest) => {
                self.owes_credit_update = true;
                Reaction::None
            }
            (Phase::Open | Phase::Closing, Op::Shutdown) => {
                self.receive_shutdown(header.flags);
                Reaction::None
            }
            _ => Reaction::Violation,
        }
    }

    /// Learns from the header of a guest's REQUEST or any later packet how much it can take.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.credit.peer_buf_alloc = header.buf_alloc;
        self.credit.peer_fwd_cnt = header.fwd_cnt;
        if self.credit.free() > 0 {
            self.wants_credit = false;
            self.has_asked_for_credit = false;
        }
    }

    /// The source has something to read: bytes, its end, or an error.
    pub(super) fn source_is_ready(&mut self) {
        if let Some(source) = &mut self.source {
            source.is_ready = true;
        }
    }

    /// The sink takes bytes again.
    pub(super) fn sink_is_ready(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink.is_ready = true;
        }
        self.write_tail();
    }

    /// The sink reports a hang-up or an error. Only of a socket does a hang-up alone mean that
    /// nobody reads any more.
    pub(super) fn sink_hung_up(&mut self, has_error: bool) {
        match &self.sink {
            Some(sink) if has_error || sink.endpoint.is_socket() => self.break_sink(),
            _ => self.sink_is_ready(),
        }
    }

    /// The guest is gone: nothing more goes there, what it sent still goes to the sink.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.guest_shut = SHUTDOWN_BOTH;
        self.close_source();
        self.write_tail();
        self.close_finished_sink();
    }

    /// Gives up what the sink has not taken.
    pub(super) fn abandon(&mut self) {
        self.close_source();
        self.break_sink();
    }

    /// Sends what there is to send, as far as the driver's buffers and a fair turn allow.
    pub(super) fn pump(&mut self, rx: &mut PacketQueue<'_>) -> Result<Pumped, virtio_queue::Error> {
        for _ in 0..READS_PER_TURN {
            while let Some(header) = self.control_packet() {
                if !rx.send(&header)? {
                    return Ok(Pumped::NoBuffers);
                }
                self.control_packet_sent(&header);
            }
            if !self.may_read_source() {
                return Ok(Pumped::Idle);
            }
            if !self.fill_from_source(rx)? {
                return Ok(Pumped::NoBuffers);
            }
        }
        Ok(Pumped::More)
    }

    /// A packet about the connection as it stands now, without payload.
    pub(super) fn header(&self, op: Op, flags: u32) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            payload_bytes: 0,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: RECEIVE_BUFFER_BYTES,
            fwd_cnt: self.credit.fwd_cnt,
        }
    }

    fn receive_data(&mut self, payload: Vec<Slice<'_>>) -> Reaction {
        let bytes = total(&payload);
        if self.guest_shut & SHUTDOWN_SEND != 0
            || self.tail.len() + bytes > RECEIVE_BUFFER_BYTES as usize
        {
            return Reaction::Violation;
        }
        let rest = self.write_directly(payload);
        if self.sink.is_none() {
            // Nobody reads. The guest knows or is about to, but this was on its way.
            self.credit.forwarded(total(&rest));
            return Reaction::None;
        }
        for piece in rest {
            append(&mut self.tail, &piece);
        }
        Reaction::None
    }

    /// Writes to the sink straight from guest memory. Returns what it did not take.
    fn write_directly<'m>(&mut self, mut payload: Vec<Slice<'m>>) -> Vec<Slice<'m>> {
        if !self.tail.is_empty() {
            return payload;
        }
        while let Some(sink) = self.sink.as_mut().filter(|sink| sink.is_ready) {
            if payload.is_empty() {
                break;
            }
            let result = sink.endpoint.write_guest(&payload);
            let bytes = self.wrote(result);
            payload = split(payload, bytes).1;
        }
        payload
    }

    fn write_tail(&mut self) {
        while let Some(sink) = self.sink.as_mut().filter(|sink| sink.is_ready) {
            if self.tail.is_empty() {
                break;
            }
            let (front, back) = self.tail.as_slices();
            let result = sink.endpoint.write_bytes([front, back]);
            let bytes = self.wrote(result);
            self.tail.drain(..bytes.min(self.tail.len()));
        }
        self.close_finished_sink();
    }

    /// Accounts for a write to the sink. Returns the bytes it took.
    fn wrote(&mut self, result: io::Result<usize>) -> usize {
        match result {
            Ok(bytes) if bytes > 0 => {
                if self.received == 0 {
                    self.first_us = monotonic_us();
                }
                self.received += bytes as u64;
                self.credit.forwarded(bytes);
                bytes
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(sink) = &mut self.sink {
                    sink.is_ready = false;
                }
                0
            }
            // A sink that takes nothing and does not say why would be asked for ever.
            Ok(_) => self.fail_sink(io::ErrorKind::WriteZero.into()),
            Err(error) => self.fail_sink(error),
        }
    }

    /// Breaks the sink for a reason, while there are bytes for it. Takes none of them.
    fn fail_sink(&mut self, why: io::Error) -> usize {
        self.failure = Some(why);
        self.break_sink();
        0
    }

    fn receive_shutdown(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            self.close_source();
        }
        self.close_finished_sink();
    }

    fn close_source(&mut self) {
        if let Some(source) = self.source.take()
            && self.is_duplex
        {
            source.endpoint.shut(Shutdown::Read);
        }
    }

    /// Closes the sink when the guest has sent its last byte and the sink has taken it.
    fn close_finished_sink(&mut self) {
        if self.guest_shut & SHUTDOWN_SEND != 0
            && self.tail.is_empty()
            && let Some(sink) = self.sink.take()
            && self.is_duplex
        {
            sink.endpoint.shut(Shutdown::Write);
        }
    }

    /// Nobody reads any more: what is held is worth nothing, and the guest shall know.
    fn break_sink(&mut self) {
        self.sink = None;
        self.credit.forwarded(self.tail.len());
        self.tail = VecDeque::new();
    }

    fn may_read_source(&mut self) -> bool {
        let has_data = self.source.as_ref().is_some_and(|source| source.is_ready);
        if self.phase != Phase::Open || !has_data {
            return false;
        }
        let has_credit = self.credit.free() > 0;
        self.wants_credit = !has_credit;
        // A credit request still has to go out.
        has_credit || !self.has_asked_for_credit
    }

    /// Sends one read's worth of the source. False if the driver has no buffers.
    fn fill_from_source(&mut self, rx: &mut PacketQueue<'_>) -> Result<bool, virtio_queue::Error> {
        let header = self.header(Op::ReadWrite, 0);
        let bytes_max = self.credit.free().min(READ_BYTES_MAX) as usize;
        let Some(source) = self.source.as_mut().filter(|_| bytes_max > 0) else {
            return Ok(true);
        };
        let endpoint = Rc::clone(&source.endpoint);
        match rx.fill(&header, bytes_max, |slices| endpoint.read(slices))? {
            Filled::NoBuffers => return Ok(false),
            Filled::Failed(error) if error.kind() == io::ErrorKind::WouldBlock => {
                source.is_ready = false;
            }
            // An error is the end too: a pty reports its end as EIO, a socket as ECONNRESET.
            Filled::Bytes(0) | Filled::Failed(_) => self.source = None,
            Filled::Bytes(bytes) => {
                self.sent += bytes as u64;
                self.credit.sent(bytes);
            }
        }
        Ok(true)
    }

    /// The next packet without payload that the guest needs.
    fn control_packet(&self) -> Option<Header> {
        if self.phase == Phase::Draining {
            return None;
        }
        if !self.is_announced {
            let op = match self.phase {
                Phase::Requested => Op::Request,
                _ => Op::Response,
            };
            return Some(self.header(op, 0));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        let shut = self.shut_wanted() | self.shut_told;
        if shut != self.shut_told {
            return Some(self.header(Op::Shutdown, shut));
        }
        if self.owes_credit_update || self.credit.is_news() {
            return Some(self.header(Op::CreditUpdate, 0));
        }
        if self.wants_credit && !self.has_asked_for_credit {
            return Some(self.header(Op::CreditRequest, 0));
        }
        None
    }

    fn control_packet_sent(&mut self, header: &Header) {
        self.credit.fwd_told = header.fwd_cnt;
        match header.op {
            Op::Request | Op::Response => self.is_announced = true,
            Op::Shutdown => self.shut_told = header.flags,
            Op::CreditUpdate => self.owes_credit_update = false,
            Op::CreditRequest => self.has_asked_for_credit = true,
            _ => {}
        }
    }

    /// The SHUTDOWN bits that the guest should know of.
    fn shut_wanted(&self) -> u32 {
        if self.is_over() {
            return SHUTDOWN_BOTH;
        }
        let mut shut = 0;
        if self.source.is_none() && self.guest_shut & SHUTDOWN_RECEIVE == 0 {
            shut |= SHUTDOWN_SEND;
        }
        if self.sink.is_none() && self.guest_shut & SHUTDOWN_SEND == 0 {
            shut |= SHUTDOWN_RECEIVE;
        }
        shut
    }
}

/// Most reads of a source before other connections have their turn.
const READS_PER_TURN: usize = 4;
/// Most bytes of one read.
const READ_BYTES_MAX: u32 = 64 * 1024;

/// Copies guest memory to the end of a buffer.
fn append(tail: &mut VecDeque<u8>, piece: &Slice<'_>) {
    let old = tail.len();
    tail.resize(old + piece.len(), 0);
    let (front, back) = tail.as_mut_slices();
    let start_in_back = old.saturating_sub(front.len());
    let copied = match front.get_mut(old..) {
        Some(place) => piece.copy_to(place),
        None => 0,
    };
    if let Ok(rest) = piece.offset(copied) {
        rest.copy_to(&mut back[start_in_back..]);
    }
}
