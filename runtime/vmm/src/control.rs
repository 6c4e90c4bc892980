//! The control loop: what the parent asks for, and what it is told.
//!
//! Runs on the main thread from the moment the machine is built. Everything it waits for is a
//! descriptor: the control socket, the vsock device's events, the machine's end.
//!
//! The parent is trusted but may be wrong. A call that does not fit the state, or comes with other
//! descriptors than it names, is answered with a failure and changes nothing. A datagram that is no
//! request at all can't be answered, for it has no id: it ends the virtual machine. When the parent
//! hangs up, the process ends at once, whatever else is to be read.
//!
//! The control socket blocks: a parent that reads no messages holds up this loop, not the guest.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_vmm_control::{
    Answer, Call, Channel, ChannelError, Connect, DiskConfig, Event, ExitReason, Failure, Message,
    Metrics, PlugDisk, PlugNet, Request, ResizeMemory,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::devices::vsock::{Connect as VsockConnect, Descriptors, VsockEvent, VsockHandle};

/// What the control loop needs of a machine.
pub trait Guest {
    /// Why an operation failed.
    type Error: Error;

    /// Runs the first instruction. Called once.
    ///
    /// # Errors
    /// The machine is of no further use.
    fn start(&mut self) -> Result<(), Self::Error>;

    /// Stops all vCPUs; returns when they stand still.
    ///
    /// # Errors
    /// Some vCPU may still run.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// They do not.
    fn resume(&mut self) -> Result<(), Self::Error>;

    /// Plugs a tap into a network device, or pulls it out.
    ///
    /// # Errors
    /// There is no such device, or the descriptor is no tap.
    fn plug_net(&mut self, device: usize, tap: Option<OwnedFd>) -> Result<(), Self::Error>;

    /// Plugs a disk into a slot, or pulls it out.
    ///
    /// # Errors
    /// There is no such slot, it is not free, or the disk is none.
    fn plug_disk(
        &mut self,
        slot: usize,
        disk: Option<(DiskConfig, OwnedFd)>,
    ) -> Result<(), Self::Error>;

    /// Has the guest take more memory or give some back, up to that much in all. Answers whether it has
    /// at least as much already.
    ///
    /// # Errors
    /// It can't have as much.
    fn resize_memory(&mut self, memory_mib: u32) -> Result<bool, Self::Error>;

    /// Readable once the guest has the memory that it was to take; `None` if it never takes any.
    fn memory_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether that is so, once.
    fn has_memory(&mut self) -> bool;

    /// Ends vCPUs and devices. Returns when the devices have passed on what they hold, or after
    /// a limited time.
    fn shut_down(&mut self);

    /// Readable once the guest has ended.
    fn end_fd(&self) -> BorrowedFd<'_>;

    /// How the guest ended, if it has.
    fn end(&mut self) -> Option<ExitReason>;

    /// The counters, except those of vsock connections.
    fn metrics(&self) -> Metrics;
}

/// Why the loop is over.
#[derive(Debug)]
pub enum Outcome {
    /// The virtual machine has ended. The parent has been told.
    Exited(ExitReason),
    /// The parent has hung up. There is nobody to tell.
    HungUp,
}

/// The life of a machine, as its parent sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Built,
    Running,
    Paused,
}

impl State {
    /// The state after a call that changes it, or the failure that it can't be made.
    fn after(self, call: &Call) -> Result<Self, &'static str> {
        match (self, call) {
            (Self::Built, Call::Start) | (Self::Paused, Call::Resume) => Ok(Self::Running),
            (Self::Running, Call::Pause) => Ok(Self::Paused),
            (Self::Running, Call::Connect(_)) => Ok(Self::Running),
            // The guest answers when it runs again, or the connection times out.
            (Self::Paused, Call::Connect(_)) => Ok(Self::Paused),
            // As well.
            (state @ (Self::Running | Self::Paused), Call::ResizeMemory(_)) => Ok(state),
            (state, Call::Stop | Call::Metrics | Call::PlugNet(_) | Call::PlugDisk(_)) => Ok(state),
            (_, Call::Boot(_)) => Err("the machine is built already"),
            (Self::Built, _) => Err("the guest was not started"),
            (_, Call::Start) => Err("the guest was started already"),
            (_, Call::Pause) => Err("the guest is paused already"),
            (_, Call::Resume) => Err("the guest is not paused"),
        }
    }
}

/// Serves the parent until the virtual machine or the parent has ended.
pub fn serve(channel: &Channel, guest: &mut impl Guest, vsock: &VsockHandle) -> Outcome {
    let mut control = Control {
        channel,
        guest,
        vsock,
        state: State::Built,
        resizing: None,
        streams: HashMap::new(),
    };
    let end = match control.serve() {
        Ok(reason) => control.finish(reason),
        Err(end) => Err(end),
    };
    match end {
        Ok(reason) => Outcome::Exited(reason),
        Err(HungUp) => Outcome::HungUp,
    }
}

/// Tells the parent, as the last message, how the virtual machine ended.
///
/// # Errors
/// The parent does not hear any more.
pub fn report_exit(channel: &Channel, reason: ExitReason) -> Result<(), ChannelError> {
    channel.send(&Message::Event(Event::Exited { reason }), &[])
}

/// The sentence for an error and all its causes.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The parent is gone.
#[derive(Debug)]
struct HungUp;

struct Control<'a, G> {
    channel: &'a Channel,
    guest: &'a mut G,
    vsock: &'a VsockHandle,
    state: State,
    /// The request whose guest takes memory.
    resizing: Option<u64>,
    /// Connections by the parent's name for them; those that the guest has not answered have the
    /// id of the request to answer.
    streams: HashMap<u64, Option<u64>>,
}

/// What has become ready.
struct Ready {
    is_hung_up: bool,
    has_request: bool,
    has_vsock_event: bool,
    has_ended: bool,
    has_memory: bool,
}

impl<G: Guest> Control<'_, G> {
    fn serve(&mut self) -> Result<ExitReason, HungUp> {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(errno) => {
                    return Ok(ExitReason::Error {
                        text: format!("cannot wait for events: {errno}"),
                    });
                }
            };
            if ready.is_hung_up {
                return Err(HungUp);
            }
            if ready.has_vsock_event {
                self.pass_on_vsock_events()?;
            }
            if ready.has_ended
                && let Some(reason) = self.guest.end()
            {
                return Ok(reason);
            }
            if ready.has_memory && self.guest.has_memory() {
                self.answer_resizing(Ok(Answer::Done))?;
            }
            if ready.has_request
                && let Some(reason) = self.take_request()?
            {
                return Ok(reason);
            }
        }
    }

    fn wait(&self) -> Result<Ready, Errno> {
        let end = self.guest.end_fd();
        let mut fds = [
            PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN | PollFlags::RDHUP),
            PollFd::from_borrowed_fd(self.vsock.events_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(end, PollFlags::IN),
            // A second look at the end, if there is nothing else to look at.
            PollFd::from_borrowed_fd(self.guest.memory_fd().unwrap_or(end), PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let [channel, vsock, guest, memory] = fds.map(|fd| fd.revents());
        let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR | PollFlags::NVAL;
        Ok(Ready {
            is_hung_up: channel.intersects(gone),
            has_request: channel.contains(PollFlags::IN),
            has_vsock_event: vsock.contains(PollFlags::IN),
            has_ended: guest.contains(PollFlags::IN),
            has_memory: memory.contains(PollFlags::IN),
        })
    }

    /// Takes one request. Returns how the virtual machine ended, if it does.
    fn take_request(&mut self) -> Result<Option<ExitReason>, HungUp> {
        let (request, descriptors) = match self.channel.receive::<Request>() {
            Ok(received) => received,
            Err(ChannelError::WouldBlock) => return Ok(None),
            Err(ChannelError::HungUp) => return Err(HungUp),
            Err(error) => {
                return Ok(Some(ExitReason::Error {
                    text: describe(&error),
                }));
            }
        };
        let Request { id, call } = request;
        let next = match self.state.after(&call) {
            Ok(next) => next,
            Err(why) => {
                self.reply(id, Err(failure(why)))?;
                return Ok(None);
            }
        };
        if let Some(why) = misfit(&call, descriptors.len()) {
            self.reply(id, Err(failure(why)))?;
            return Ok(None);
        }
        let mut descriptors = descriptors.into_iter();
        let done = match call {
            Call::Start => self.guest.start(),
            Call::Pause => self.guest.pause(),
            Call::Resume => self.guest.resume(),
            Call::Connect(connect) => {
                self.connect(id, &connect, descriptors.collect())?;
                return Ok(None);
            }
            Call::PlugNet(PlugNet { device, .. }) => {
                self.guest.plug_net(device, descriptors.next())
            }
            Call::PlugDisk(PlugDisk { slot, disk }) => {
                self.guest.plug_disk(slot, disk.zip(descriptors.next()))
            }
            Call::ResizeMemory(ResizeMemory { memory_mib }) => {
                self.resize_memory(id, memory_mib)?;
                return Ok(None);
            }
            Call::Metrics => {
                let metrics = self.metrics();
                self.reply(id, Ok(Answer::Metrics(metrics)))?;
                return Ok(None);
            }
            Call::Stop => {
                self.guest.shut_down();
                self.reply(id, Ok(Answer::Done))?;
                return Ok(Some(ExitReason::Stopped));
            }
            // Refused in every state.
            Call::Boot(_) => Ok(()),
        };
        if done.is_ok() {
            self.state = next;
        }
        let result = done.map(|()| Answer::Done);
        self.reply(id, result.map_err(|error| failure(&describe_short(&error))))?;
        Ok(None)
    }

    /// Has the guest's memory resized. The answer is sent when it has as much.
    fn resize_memory(&mut self, id: u64, memory_mib: u32) -> Result<(), HungUp> {
        match self.guest.resize_memory(memory_mib) {
            Ok(has_it) => {
                self.answer_resizing(Err(failure("another size was asked for meanwhile")))?;
                self.resizing = Some(id);
                match has_it {
                    true => self.answer_resizing(Ok(Answer::Done)),
                    false => Ok(()),
                }
            }
            // What was asked for before stands.
            Err(error) => self.reply(id, Err(failure(&describe_short(&error)))),
        }
    }

    fn answer_resizing(&mut self, result: Result<Answer, Failure>) -> Result<(), HungUp> {
        match self.resizing.take() {
            Some(id) => self.reply(id, result),
            None => Ok(()),
        }
    }

    /// Asks the vsock device for a connection. The answer is sent when the guest's is there.
    fn connect(
        &mut self,
        id: u64,
        connect: &Connect,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), HungUp> {
        let stream = connect.stream;
        if self.streams.contains_key(&stream) {
            let text = format!("stream {stream} exists already");
            return self.reply(id, Err(Failure { text }));
        }
        let Some(descriptors) = descriptors_of(connect, descriptors) else {
            let why = "a connection comes with a source, a sink, both, or one duplex socket, \
                       and with a descriptor for each";
            return self.reply(id, Err(failure(why)));
        };
        let asked = self.vsock.connect(VsockConnect {
            port: connect.port,
            host_port: connect.host_port,
            stream,
            descriptors,
        });
        match asked {
            Ok(()) => {
                self.streams.insert(stream, Some(id));
                Ok(())
            }
            Err(error) => self.reply(id, Err(failure(&describe(&error)))),
        }
    }

    fn pass_on_vsock_events(&mut self) -> Result<(), HungUp> {
        for event in self.vsock.take_events() {
            match event {
                VsockEvent::Connected { stream } => {
                    if let Some(id) = self.streams.get_mut(&stream).and_then(Option::take) {
                        self.reply(id, Ok(Answer::Done))?;
                    }
                }
                VsockEvent::Refused { stream, why } => {
                    if let Some(Some(id)) = self.streams.remove(&stream) {
                        self.reply(id, Err(failure(&why.to_string())))?;
                    }
                }
                VsockEvent::SinkFailed { stream, why } => {
                    self.send(&Message::Event(Event::StreamFailed { stream, text: why }))?;
                }
                VsockEvent::Closed {
                    stream,
                    sent,
                    received,
                    first_us,
                } => {
                    self.streams.remove(&stream);
                    self.send(&Message::Event(Event::StreamClosed {
                        stream,
                        sent,
                        received,
                        first_us,
                    }))?;
                }
                // The parent sees it at its own end of the stream.
                VsockEvent::AgentClosed { .. } => {}
            }
        }
        Ok(())
    }

    /// Ends the machine and sends what there is left to say.
    fn finish(&mut self, reason: ExitReason) -> Result<ExitReason, HungUp> {
        self.guest.shut_down();
        self.pass_on_vsock_events()?;
        let unanswered: Vec<_> = self.streams.drain().filter_map(|(_, id)| id).collect();
        for id in unanswered.into_iter().chain(self.resizing.take()) {
            self.reply(id, Err(failure("the virtual machine has ended")))?;
        }
        report_exit(self.channel, reason.clone()).map_err(|_| HungUp)?;
        Ok(reason)
    }

    fn metrics(&self) -> Metrics {
        let vsock = self.vsock.counters();
        Metrics {
            vsock_connections: vsock.connections,
            vsock_open: vsock.open,
            ..self.guest.metrics()
        }
    }

    fn reply(&self, id: u64, result: Result<Answer, Failure>) -> Result<(), HungUp> {
        self.send(&Message::Reply { id, result })
    }

    /// Sends a message. A socket that takes none is a parent that is not there.
    fn send(&self, message: &Message) -> Result<(), HungUp> {
        self.channel.send(message, &[]).map_err(|_| HungUp)
    }
}

/// Why a call can't have come with that many descriptors. A connection looks at its own.
fn misfit(call: &Call, descriptors: usize) -> Option<&'static str> {
    let (expected, why) = match call {
        Call::Connect(_) => return None,
        Call::PlugNet(plug) => (
            usize::from(plug.tap),
            "plugging a network device in takes one tap, pulling it out none",
        ),
        Call::PlugDisk(plug) => (
            usize::from(plug.disk.is_some()),
            "plugging a disk in takes one file, pulling it out none",
        ),
        _ => (0, "the call takes no descriptors"),
    };
    (descriptors != expected).then_some(why)
}

/// The descriptors of a connection, if they are those that it names.
fn descriptors_of(connect: &Connect, descriptors: Vec<OwnedFd>) -> Option<Descriptors> {
    let named = [connect.source, connect.sink, connect.duplex];
    if named.iter().filter(|is_named| **is_named).count() != descriptors.len() {
        return None;
    }
    let mut descriptors = descriptors.into_iter();
    match named {
        [false, false, true] => descriptors.next().map(Descriptors::Duplex),
        [false, false, false] | [_, _, true] => None,
        [has_source, has_sink, false] => {
            let source = has_source.then(|| descriptors.next()).flatten();
            let sink = has_sink.then(|| descriptors.next()).flatten();
            Some(Descriptors::Split { source, sink })
        }
    }
}

fn failure(text: &str) -> Failure {
    Failure {
        text: text.to_owned(),
    }
}

/// As [`describe`], for an error that may borrow.
fn describe_short(error: &impl Error) -> String {
    let causes = error.source().map(describe);
    causes.map_or_else(|| error.to_string(), |causes| format!("{error}: {causes}"))
}
