//! virtio-fs: the share, served out of this process (virtio 1.2, 5.11).
//!
//! Each request queue belongs to one worker thread; the first worker also serves the queue of
//! urgent requests, which carries only requests without a reply. A worker answers one request after
//! the other, straight between guest memory and the file. The server waits for no other request, so
//! one that is slow holds up its own queue only; and a guest that asks faster than it is answered
//! waits for free descriptors in its own queue.
//!
//! Workers exist before the guest runs, under their filter: the device's own thread only hands them
//! their queues and waits for them.
//!
//! When the driver resets the device, each worker finishes the request it is at: until then its
//! system call may write to guest memory. A file system of the host that does not answer thus holds
//! up that reset, but never the end of the virtual machine, which is the end of the process.

mod chain;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use husk_virtiofs::{Server, WorkerError};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::worker::{Assignment, Outcome};
use crate::device::{Activation, Device, DeviceError, Profile, ReadyQueue};
use crate::seccomp::{Filters, SeccompError};

const NAME: &str = "fs";

/// The name by which the guest mounts the share.
pub const TAG: &str = "husk";

/// Most request queues, and so most requests at work at a time.
pub const REQUEST_QUEUES_MAX: usize = 8;

/// Linux makes no request larger than its queue: this leaves room for 1 MiB in pages.
const QUEUE_SIZE: u16 = 512;

/// Sizes of the queue of urgent requests and all request queues; a device has some of them.
const QUEUE_SIZES: [u16; 1 + REQUEST_QUEUES_MAX] = [QUEUE_SIZE; 1 + REQUEST_QUEUES_MAX];

/// virtio 1.2, 5.11.4: `tag`, padded with zeros, then `num_request_queues`.
const CONFIG_TAG_BYTES: usize = 36;
const CONFIG_BYTES: usize = CONFIG_TAG_BYTES + size_of::<u32>();

const _: () = assert!(TAG.len() <= CONFIG_TAG_BYTES);

/// See the module.
pub struct FsDevice {
    workers: Vec<WorkerThread>,
    config: [u8; CONFIG_BYTES],
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// More queues than [`REQUEST_QUEUES_MAX`], or none.
    #[error("a share can't have {count} request queues: 1 to {REQUEST_QUEUES_MAX}")]
    QueueCount {
        /// What was asked for.
        count: usize,
    },
    /// The host gives no more threads.
    #[error("cannot start a thread for the share")]
    Spawn(#[source] std::io::Error),
    /// A thread can't serve the share.
    #[error("cannot prepare a thread for the share")]
    Prepare(#[source] WorkerError),
    /// A thread could not be confined.
    #[error("cannot confine a thread for the share")]
    Confine(#[source] SeccompError),
    /// A thread ended before it was ready.
    #[error("a thread for the share ended as it started")]
    Died,
}

struct WorkerThread {
    /// `None` only while the device is dropped.
    assignments: Option<Sender<Assignment>>,
    outcomes: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl FsDevice {
    /// A device that serves `server` on `request_queues` queues. Returns when all its threads are
    /// under their filter.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(
        server: &Arc<Server>,
        request_queues: usize,
        filters: &Filters,
    ) -> Result<Self, FsError> {
        let count = request_queues;
        if !(1..=REQUEST_QUEUES_MAX).contains(&count) {
            return Err(FsError::QueueCount { count });
        }
        let workers = (0..count)
            .map(|number| WorkerThread::start(number, Arc::clone(server), filters.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            config: config_space(count),
            workers,
        })
    }
}

impl Device for FsDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_FS,
            features: (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC),
            queue_sizes: QUEUE_SIZES
                .get(..=self.workers.len())
                .unwrap_or(&QUEUE_SIZES),
            is_hidden: false,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| self.config.get(at..));
        for (place, byte) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *place = *byte;
        }
    }

    fn run(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            stop,
        } = activation;
        let has_event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let stop = Arc::new(stop);
        for (worker, queues) in self.workers.iter().zip(shares_of(queues)) {
            let assignment = Assignment {
                memory: Arc::clone(&memory),
                queues,
                has_event_idx,
                stop: Arc::clone(&stop),
            };
            let sent = worker.assignments.as_ref().map(|to| to.send(assignment));
            if !matches!(sent, Some(Ok(()))) {
                // That worker has no outcome either, which fails the device: the others stop.
                let _ = stop.write(1);
            }
        }
        let mut result = Ok(());
        for worker in &self.workers {
            let outcome = worker
                .outcomes
                .recv()
                .unwrap_or_else(|_| Err(worker_ended()));
            if result.is_ok() {
                result = outcome;
            }
        }
        result
    }
}

/// The config space of a device with that many request queues.
fn config_space(request_queues: usize) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let count = u32::try_from(request_queues).unwrap_or(0).to_le_bytes();
    let (tag, number) = config.split_at_mut(CONFIG_TAG_BYTES);
    for (place, byte) in tag.iter_mut().zip(TAG.as_bytes()) {
        *place = *byte;
    }
    number.copy_from_slice(&count);
    config
}

/// What each worker gets: the first one the queue of urgent requests and the first request queue,
/// each other one a request queue.
fn shares_of(queues: Vec<Option<ReadyQueue>>) -> impl Iterator<Item = Vec<(usize, ReadyQueue)>> {
    let mut queues = queues
        .into_iter()
        .enumerate()
        .map(|(index, queue)| queue.map(|queue| (index, queue)));
    let urgent = queues.next().flatten();
    let mut urgent = Some(urgent);
    queues.map(move |queue| urgent.take().flatten().into_iter().chain(queue).collect())
}

fn worker_ended() -> DeviceError {
    DeviceError::Host {
        device: NAME,
        what: "a worker thread has ended",
        source: std::io::ErrorKind::BrokenPipe.into(),
    }
}

impl WorkerThread {
    fn start(number: usize, server: Arc<Server>, filters: Filters) -> Result<Self, FsError> {
        let (assignments, to_do) = mpsc::channel();
        let (done, outcomes) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("fs-{number}"))
            .spawn(move || worker::work(&server, &filters, &ready, &to_do, &done))
            .map_err(FsError::Spawn)?;
        is_ready.recv().map_err(|_| FsError::Died)??;
        Ok(Self {
            assignments: Some(assignments),
            outcomes,
            thread: Some(thread),
        })
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        // A worker ends when nothing more can be assigned.
        self.assignments = None;
        if let Some(thread) = self.thread.take() {
            // It has reported its own outcome, and there is nothing to do about a panic here.
            let _ = thread.join();
        }
    }
}
