//! The loop with a machine that only counts, and a vsock device whose driver never comes.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use husk_vmm_control::HOST_PORT_MIN;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::vsock::VsockDevice;

#[derive(Debug, thiserror::Error)]
#[error("no")]
struct Refused(#[source] std::io::Error);

/// A machine that does nothing and writes down what it was asked.
struct FakeGuest {
    asked: Arc<Mutex<Vec<&'static str>>>,
    end: Arc<OwnedFd>,
    reason: Arc<Mutex<Option<ExitReason>>>,
    refuses: bool,
    memory: Arc<EventFd>,
}

/// What the machine has already.
const ENOUGH_MIB: u32 = 256;

impl FakeGuest {
    fn note(&self, what: &'static str) -> Result<(), Refused> {
        self.asked.lock().unwrap().push(what);
        if self.refuses {
            return Err(Refused(std::io::Error::other("broken")));
        }
        Ok(())
    }
}

impl Guest for FakeGuest {
    type Error = Refused;

    fn start(&mut self) -> Result<(), Refused> {
        self.note("start")
    }

    fn pause(&mut self) -> Result<(), Refused> {
        self.note("pause")
    }

    fn resume(&mut self) -> Result<(), Refused> {
        self.note("resume")
    }

    fn plug_net(&mut self, _: usize, tap: Option<OwnedFd>) -> Result<(), Refused> {
        self.note(if tap.is_some() { "plug" } else { "pull" })
    }

    fn plug_disk(&mut self, _: usize, disk: Option<(DiskConfig, OwnedFd)>) -> Result<(), Refused> {
        self.note(if disk.is_some() {
            "plug disk"
        } else {
            "pull disk"
        })
    }

    fn resize_memory(&mut self, memory_mib: u32) -> Result<bool, Refused> {
        self.note("resize")?;
        Ok(memory_mib < ENOUGH_MIB)
    }

    fn memory_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(crate::devices::fd::borrow(&self.memory))
    }

    fn has_memory(&mut self) -> bool {
        self.memory.read().is_ok()
    }

    fn shut_down(&mut self) {
        self.asked.lock().unwrap().push("shut down");
    }

    fn end_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    fn end(&mut self) -> Option<ExitReason> {
        self.reason.lock().unwrap().take()
    }

    fn metrics(&self) -> Metrics {
        Metrics {
            exits_io: 7,
            ..Metrics::default()
        }
    }
}

/// A parent, and the loop it talks to.
struct Parent {
    channel: Channel,
    asked: Arc<Mutex<Vec<&'static str>>>,
    end: Arc<OwnedFd>,
    reason: Arc<Mutex<Option<ExitReason>>>,
    memory: Arc<EventFd>,
    served: JoinHandle<Outcome>,
    next_id: u64,
}

impl Parent {
    fn new() -> Self {
        Self::of(false)
    }

    fn of(refuses: bool) -> Self {
        let (channel, other) = Channel::pair().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let end = Arc::new(
            crate::devices::fd::borrow(&event)
                .try_clone_to_owned()
                .unwrap(),
        );
        let reason = Arc::new(Mutex::new(None));
        let memory = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut guest = FakeGuest {
            asked: Arc::clone(&asked),
            end: Arc::clone(&end),
            reason: Arc::clone(&reason),
            refuses,
            memory: Arc::clone(&memory),
        };
        let served = thread::spawn(move || {
            let (agent, _keep) = UnixStream::pair().unwrap();
            let (_device, vsock) = VsockDevice::new(agent.into()).unwrap();
            serve(&other, &mut guest, &vsock)
        });
        Self {
            channel,
            asked,
            end,
            reason,
            memory,
            served,
            next_id: 0,
        }
    }

    fn ask(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, String> {
        self.next_id += 1;
        let id = self.next_id;
        self.channel
            .send(&Request { id, call }, descriptors)
            .unwrap();
        match self.next() {
            Message::Reply { id: of, result } if of == id => result.map_err(|failure| failure.text),
            other => panic!("no reply to {id} but {other:?}"),
        }
    }

    fn next(&self) -> Message {
        self.channel.receive().unwrap().0
    }

    fn exit(&self) -> ExitReason {
        match self.next() {
            Message::Event(Event::Exited { reason }) => reason,
            other => panic!("no exit but {other:?}"),
        }
    }

    fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().unwrap().clone()
    }
}

fn connect(stream: u64) -> Connect {
    Connect {
        port: 0x10000,
        host_port: HOST_PORT_MIN,
        stream,
        source: false,
        sink: false,
        duplex: false,
    }
}

#[test]
fn a_disk_comes_with_its_file_only() {
    let mut parent = Parent::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    let plug = |has_disk: bool| {
        let disk = DiskConfig {
            bytes: 512,
            block_bytes: 512,
            is_read_only: true,
            can_zero: false,
            serial: "a".to_owned(),
        };
        let disk = has_disk.then_some(disk);
        Call::PlugDisk(PlugDisk { slot: 0, disk })
    };

    assert!(
        parent
            .ask(plug(true), &[])
            .unwrap_err()
            .contains("one file")
    );
    assert!(
        parent
            .ask(plug(false), &[file.as_fd()])
            .unwrap_err()
            .contains("one file")
    );
    parent.ask(plug(true), &[file.as_fd()]).unwrap();
    parent.ask(plug(false), &[]).unwrap();

    assert_eq!(*parent.asked.lock().unwrap(), ["plug disk", "pull disk"]);
}

#[test]
fn every_pair_of_state_and_call_is_decided() {
    use State::{Built, Paused, Running};
    let connect = || Call::Connect(connect(1));
    let resize = || Call::ResizeMemory(ResizeMemory { memory_mib: 1 });
    let table: [(State, Call, Option<State>); 21] = [
        (Built, resize(), None),
        (Running, resize(), Some(Running)),
        (Paused, resize(), Some(Paused)),
        (Built, Call::Start, Some(Running)),
        (Built, connect(), None),
        (Built, Call::Pause, None),
        (Built, Call::Resume, None),
        (Built, Call::Stop, Some(Built)),
        (Built, Call::Metrics, Some(Built)),
        (Running, Call::Start, None),
        (Running, connect(), Some(Running)),
        (Running, Call::Pause, Some(Paused)),
        (Running, Call::Resume, None),
        (Running, Call::Stop, Some(Running)),
        (Running, Call::Metrics, Some(Running)),
        (Paused, Call::Start, None),
        (Paused, connect(), Some(Paused)),
        (Paused, Call::Pause, None),
        (Paused, Call::Resume, Some(Running)),
        (Paused, Call::Stop, Some(Paused)),
        (Paused, Call::Metrics, Some(Paused)),
    ];
    for (state, call, after) in table {
        assert_eq!(state.after(&call).ok(), after, "{state:?} {call:?}");
    }
}

/// Sends a request to resize the memory, and waits for no answer.
fn resize(parent: &Parent, id: u64, memory_mib: u32) {
    let call = Call::ResizeMemory(ResizeMemory { memory_mib });
    parent.channel.send(&Request { id, call }, &[]).unwrap();
}

fn reply(parent: &Parent) -> (u64, Result<Answer, String>) {
    match parent.next() {
        Message::Reply { id, result } => (id, result.map_err(|failure| failure.text)),
        other => panic!("no reply but {other:?}"),
    }
}

#[test]
fn memory_is_answered_for_once_the_guest_has_it() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();

    resize(&parent, 70, ENOUGH_MIB);
    // An answer in between shows that the first is not there yet.
    parent.ask(Call::Metrics, &[]).unwrap();
    parent.memory.write(1).unwrap();
    assert_eq!(reply(&parent), (70, Ok(Answer::Done)));

    resize(&parent, 71, ENOUGH_MIB - 1);
    assert_eq!(reply(&parent), (71, Ok(Answer::Done)));
    // Nobody waits for it any more.
    parent.memory.write(1).unwrap();
    parent.ask(Call::Metrics, &[]).unwrap();
}

#[test]
fn memory_that_is_awaited_gives_way_to_a_further_call_and_to_the_end() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();

    resize(&parent, 70, ENOUGH_MIB);
    resize(&parent, 71, ENOUGH_MIB);
    let (id, result) = reply(&parent);
    assert!(id == 70 && result.unwrap_err().contains("another size"));
    *parent.reason.lock().unwrap() = Some(ExitReason::Reset);
    rustix::io::write(&parent.end, &1_u64.to_ne_bytes()).unwrap();
    let (id, result) = reply(&parent);
    assert!(id == 71 && result.unwrap_err().contains("has ended"));
    assert_eq!(parent.exit(), ExitReason::Reset);
}

#[test]
fn memory_that_can_not_be_had_is_refused() {
    let mut parent = Parent::of(true);
    // The machine does not start either, which leaves it as it was.
    let call = Call::ResizeMemory(ResizeMemory { memory_mib: 1 });
    let refused = parent.ask(call, &[]).unwrap_err();
    assert!(refused.contains("not started"), "{refused}");
}

#[test]
fn datagram_that_is_no_request_ends_the_machine() {
    let parent = Parent::new();

    parent.channel.send(&"nonsense", &[]).unwrap();

    assert!(matches!(parent.exit(), ExitReason::Error { text } if text.contains("malformed")));
    assert!(matches!(
        parent.served.join().unwrap(),
        Outcome::Exited(ExitReason::Error { .. })
    ));
}

#[test]
fn calls_in_a_wrong_state_are_refused_and_change_nothing() {
    let mut parent = Parent::new();

    assert!(parent.ask(Call::Pause, &[]).is_err());
    assert!(parent.ask(Call::Resume, &[]).is_err());
    assert_eq!(parent.ask(Call::Start, &[]), Ok(Answer::Done));
    assert!(parent.ask(Call::Start, &[]).is_err());
    assert!(parent.ask(Call::Resume, &[]).is_err());
    assert_eq!(parent.ask(Call::Pause, &[]), Ok(Answer::Done));
    assert_eq!(parent.ask(Call::Resume, &[]), Ok(Answer::Done));

    assert_eq!(parent.asked(), ["start", "pause", "resume"]);
}

#[test]
fn unexpected_descriptors_are_refused() {
    let mut parent = Parent::new();
    let (socket, _other) = UnixStream::pair().unwrap();

    assert!(parent.ask(Call::Start, &[socket.as_fd()]).is_err());

    assert!(parent.asked().is_empty());
}

#[test]
fn failure_of_the_machine_names_its_causes() {
    let mut parent = Parent::of(true);

    let text = parent.ask(Call::Start, &[]).unwrap_err();

    assert_eq!(text, "no: broken");
    // It was not started, so it may be asked again.
    assert_eq!(parent.ask(Call::Start, &[]).unwrap_err(), "no: broken");
}

#[test]
fn connection_needs_the_descriptors_it_names() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let fd = socket.as_fd();
    let with = |source, sink, duplex| {
        Call::Connect(Connect {
            source,
            sink,
            duplex,
            ..connect(1)
        })
    };

    assert!(parent.ask(with(false, false, false), &[]).is_err());
    assert!(parent.ask(with(false, false, false), &[fd]).is_err());
    assert!(parent.ask(with(true, false, false), &[]).is_err());
    assert!(parent.ask(with(true, true, false), &[fd]).is_err());
    assert!(parent.ask(with(true, false, true), &[fd, fd]).is_err());
    assert!(parent.ask(with(false, false, true), &[fd, fd]).is_err());
}

#[test]
fn stream_name_is_taken_once() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let call = || {
        Call::Connect(Connect {
            duplex: true,
            ..connect(9)
        })
    };
    parent
        .channel
        .send(
            &Request {
                id: 99,
                call: call(),
            },
            &[socket.as_fd()],
        )
        .unwrap();

    let text = parent.ask(call(), &[socket.as_fd()]).unwrap_err();

    assert!(text.contains("stream 9"), "{text}");
}

#[test]
fn metrics_are_those_of_machine_and_devices() {
    let mut parent = Parent::new();

    let answer = parent.ask(Call::Metrics, &[]).unwrap();

    assert!(matches!(
        answer,
        Answer::Metrics(Metrics { exits_io: 7, .. })
    ));
}

#[test]
fn stop_is_answered_before_the_exit() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();

    assert_eq!(parent.ask(Call::Stop, &[]), Ok(Answer::Done));

    assert_eq!(parent.exit(), ExitReason::Stopped);
    assert!(parent.asked().contains(&"shut down"));
}

#[test]
fn end_of_the_guest_is_reported_with_its_reason_and_answers_what_waits() {
    let mut parent = Parent::new();
    parent.ask(Call::Start, &[]).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let call = Call::Connect(Connect {
        duplex: true,
        ..connect(3)
    });
    parent
        .channel
        .send(&Request { id: 50, call }, &[socket.as_fd()])
        .unwrap();
    // The connection was taken if the next call is answered.
    parent.ask(Call::Metrics, &[]).unwrap();

    *parent.reason.lock().unwrap() = Some(ExitReason::TripleFault);
    rustix::io::write(&*parent.end, &1_u64.to_ne_bytes()).unwrap();

    assert!(matches!(
        parent.next(),
        Message::Reply {
            id: 50,
            result: Err(_)
        }
    ));
    assert_eq!(parent.exit(), ExitReason::TripleFault);
}

#[test]
fn hang_up_ends_the_loop_even_with_requests_left() {
    let parent = Parent::new();
    let request = Request {
        id: 1,
        call: Call::Metrics,
    };
    parent.channel.send(&request, &[]).unwrap();

    drop(parent.channel);

    assert!(matches!(parent.served.join().unwrap(), Outcome::HungUp));
}
