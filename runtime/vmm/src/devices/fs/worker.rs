//! A thread that answers FUSE requests.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use husk_virtiofs::{Server, Worker};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_queue::{QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Buffers;
use super::{FsError, NAME};
use crate::device::{DeviceError, ReadyQueue};
use crate::devices::fd::borrow;
use crate::memory::GuestRam;
use crate::seccomp::{Filters, ThreadKind};

/// Requests a worker answers before it looks whether it must stop.
const REQUESTS_PER_TURN_MAX: usize = 64;

/// Urgent requests and one request queue.
const QUEUES_PER_WORKER_MAX: usize = 2;

/// Queues to serve until told to stop.
pub(super) struct Assignment {
    pub(super) memory: Arc<GuestRam>,
    /// With their index in the device; at most [`QUEUES_PER_WORKER_MAX`].
    pub(super) queues: Vec<(usize, ReadyQueue)>,
    pub(super) has_event_idx: bool,
    pub(super) stop: Arc<EventFd>,
}

/// How the service of an assignment ended.
pub(super) type Outcome = Result<(), DeviceError>;

/// The life of a worker thread.
pub(super) fn work(
    server: &Server,
    filters: &Filters,
    ready: &Sender<Result<(), FsError>>,
    assignments: &Receiver<Assignment>,
    outcomes: &Sender<Outcome>,
) {
    // The server's part of a thread takes calls that the filter forbids.
    let prepared = Worker::new(server)
        .map_err(FsError::Prepare)
        .and_then(|worker| {
            filters
                .install(ThreadKind::FsWorker)
                .map_err(FsError::Confine)?;
            Ok(worker)
        });
    let mut worker = match prepared {
        Ok(worker) => worker,
        Err(error) => {
            // If nobody listens any more there is nothing left to say.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let mut buffers = Buffers::new();
    let _ = ready.send(Ok(()));
    while let Ok(mut assignment) = assignments.recv() {
        let outcome = assignment.serve(server, &mut worker, &mut buffers);
        if outcome.is_err() {
            // The device as a whole has failed: the other workers stop too. An eventfd refuses a
            // write only at its maximum, when it is readable anyway.
            let _ = assignment.stop.write(1);
        }
        // The queues are given back before the device says that it has stopped.
        drop(assignment);
        if outcomes.send(outcome).is_err() {
            return;
        }
    }
}

/// Whether a queue may hold more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It was empty, and the driver will kick.
    Done,
    /// The turn was over first.
    More,
}

impl Assignment {
    fn serve(
        &mut self,
        server: &Server,
        worker: &mut Worker,
        buffers: &mut Buffers,
    ) -> Result<(), DeviceError> {
        for (_, ready) in &mut self.queues {
            ready.queue.set_event_idx(self.has_event_idx);
        }
        // The driver may have kicked before this thread looked.
        let mut is_kicked = vec![true; self.queues.len()];
        loop {
            for ((index, ready), is_kicked) in self.queues.iter_mut().zip(&mut is_kicked) {
                if *is_kicked {
                    let turn = take_turn(*index, ready, &self.memory, server, worker, buffers)?;
                    *is_kicked = turn == Turn::More;
                }
            }
            if self.wait(&mut is_kicked)? {
                return Ok(());
            }
        }
    }

    /// Waits for a kick or the end, unless there is work left. Whether it is the end.
    fn wait(&self, is_kicked: &mut [bool]) -> Result<bool, DeviceError> {
        let is_idle = !is_kicked.contains(&true);
        let kick_of = |at: usize| {
            self.queues
                .get(at)
                .map_or(&*self.stop, |(_, ready)| &ready.kick)
        };
        let mut polled = [&*self.stop, kick_of(0), kick_of(QUEUES_PER_WORKER_MAX - 1)]
            .map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN));
        let no_wait = rustix::event::Timespec::default();
        match poll(&mut polled, (!is_idle).then_some(&no_wait)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(DeviceError::Host {
                    device: NAME,
                    what: "poll",
                    source: errno.into(),
                });
            }
        }
        let mut is_readable = polled.iter().map(|fd| fd.revents().contains(PollFlags::IN));
        if is_readable.next() == Some(true) {
            return Ok(true);
        }
        for (((_, ready), is_kicked), is_readable) in
            self.queues.iter().zip(is_kicked).zip(is_readable)
        {
            if is_readable {
                // It is readable, and nobody else reads it.
                let _ = rustix::io::read(borrow(&ready.kick), &mut [0_u8; size_of::<u64>()]);
                *is_kicked = true;
            }
        }
        Ok(false)
    }
}

/// Answers what a queue holds, up to [`REQUESTS_PER_TURN_MAX`].
fn take_turn(
    index: usize,
    ready: &mut ReadyQueue,
    memory: &GuestRam,
    server: &Server,
    worker: &mut Worker,
    buffers: &mut Buffers,
) -> Result<Turn, DeviceError> {
    let broken = |source| DeviceError::Queue {
        device: NAME,
        index,
        source,
    };
    let ReadyQueue {
        queue, interrupt, ..
    } = ready;
    queue.disable_notification(memory).map_err(broken)?;
    for _ in 0..REQUESTS_PER_TURN_MAX {
        let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
            if queue.enable_notification(memory).map_err(broken)? {
                // One came in between.
                queue.disable_notification(memory).map_err(broken)?;
                continue;
            }
            return Ok(Turn::Done);
        };
        let head = chain.head_index();
        // The kernel of the guest makes no malformed chain; another driver gets back what it gave.
        let used = buffers
            .of(chain, memory)
            .map_or(0, |(request, reply)| server.handle(worker, request, reply));
        let used = u32::try_from(used).unwrap_or(u32::MAX);
        match queue.add_used(memory, head, used) {
            // A head outside of the table can't be given back.
            Ok(()) | Err(virtio_queue::Error::InvalidDescriptorIndex) => {}
            Err(error) => return Err(broken(error)),
        }
        // Each reply has someone waiting for it: none waits for those behind it.
        if queue.needs_notification(memory).map_err(broken)? {
            interrupt.signal_used();
        }
    }
    Ok(Turn::More)
}
