//! What a virtio device is to the rest of the VMM.
//!
//! A device states who it is as one value and gets queues only once the driver has configured all
//! of them and the transport has checked every number (virtio 1.2, 3.1.1). It never sees a
//! register. One thread owns the device and its queues while it runs.

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// The identity of a device: what the transport answers the driver with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// For thread names and log lines.
    pub name: &'static str,
    /// virtio 1.2, 5: device type.
    pub device_type: u32,
    /// Features offered, `VIRTIO_F_VERSION_1` excluded (the transport adds it).
    pub features: u64,
    /// Largest size of each queue, a power of two; its length is the number of queues.
    pub queue_sizes: &'static [u16],
    /// The driver meets a placeholder in its place, which it leaves alone, until the device is told
    /// to appear (virtio 1.2, 4.2.2, `DeviceID`).
    pub is_hidden: bool,
}

/// What a driver finds in a device that was made without it: what is plugged in later brings it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looks {
    /// As in [`Profile::features`], which it takes the place of.
    pub features: u64,
    /// The config space; what lies behind it reads as zero.
    pub config: Vec<u8>,
}

/// The guest has a driver for what was in a device's place before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest has not let go of what was there before")]
pub struct StillDriven;

/// One virtio device.
pub trait Device: Send {
    /// Who the device is. Always the same value.
    fn profile(&self) -> Profile;

    /// Fills `data` from the config space at `offset`; what lies outside reads as zero.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Is given, before anything else, what a device needs whose config space changes while it is
    /// there.
    fn take_config_space(&mut self, _config: ConfigSpace) {}

    /// Serves the queues until `activation.stop` is readable, on a thread of its own. After it
    /// returns the device is as new: a driver that resets may start it again.
    ///
    /// # Errors
    /// What makes the device unusable. The transport then sets `DEVICE_NEEDS_RESET` (virtio 1.2,
    /// 2.1.1).
    fn run(&mut self, activation: Activation) -> Result<(), DeviceError>;
}

/// What a device needs to run.
pub struct Activation {
    /// All of the guest's memory.
    pub memory: Arc<GuestRam>,
    /// Ready queues, as many as the profile says; a queue that the driver left disabled is `None`.
    pub queues: Vec<Option<ReadyQueue>>,
    /// The features that driver and device agreed on.
    pub features: u64,
    /// Readable when the device must return from `run`.
    pub stop: EventFd,
}

/// A queue whose size and addresses were checked against guest memory.
pub struct ReadyQueue {
    /// The split virtqueue.
    pub queue: Queue,
    /// Readable when the driver has made buffers available.
    pub kick: EventFd,
    /// Tells the driver of used buffers.
    pub interrupt: Interrupt,
}

/// The device's way to interrupt the driver.
#[derive(Clone)]
pub struct Interrupt {
    line: Arc<dyn Fn() + Send + Sync>,
}

impl Interrupt {
    /// An interrupt that calls `line`, which sets the status bit and raises the line.
    pub fn new(line: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            line: Arc::new(line),
        }
    }

    /// Tells the driver that a queue has used buffers (virtio 1.2, 4.2.2: `InterruptStatus` bit 0).
    pub fn signal_used(&self) {
        (self.line)();
    }
}

/// A device's way to change its config space while a driver may look at it.
#[derive(Clone)]
pub struct ConfigSpace {
    show: Arc<Show>,
}

type Show = dyn Fn(&[u8], News) + Send + Sync;

/// Whether a driver is told of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// It is: a configuration change notification (virtio 1.2, 2.3).
    Told,
    /// It isn't, as it knows: the change follows from what it has asked for.
    Known,
}

impl ConfigSpace {
    /// One that calls `show`, which writes the bytes where the driver reads them.
    pub fn new(show: impl Fn(&[u8], News) + Send + Sync + 'static) -> Self {
        Self {
            show: Arc::new(show),
        }
    }

    /// Shows other bytes from the start on. What lies behind them stays. Calls must not overlap: the
    /// last one is what the driver sees.
    pub fn show(&self, config: &[u8], news: News) {
        (self.show)(config, news);
    }
}

/// Why a device gave up.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of a queue.
    #[error("queue {index} of {device}: the driver left it in an unusable state")]
    Queue {
        /// [`Profile::name`].
        device: &'static str,
        /// Which queue.
        index: usize,
        /// What virtio-queue found.
        source: virtio_queue::Error,
    },
    /// The host refused something the device can't do without.
    #[error("{device}: {what}")]
    Host {
        /// [`Profile::name`].
        device: &'static str,
        /// The operation that failed.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}
