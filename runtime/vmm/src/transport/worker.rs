//! The thread of a device, and the transport's grip on it.
//!
//! The thread exists from before the guest runs until after it has ended, because the thread that
//! handles the driver's last register write must not be able to make threads: it runs the guest.

use std::io;
use std::panic;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::time::Duration;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EFD_CLOEXEC;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::page::RegisterPage;
use super::registers::CONFIG;
use super::registers::CONFIG_GENERATION;
use super::registers::INTERRUPT_CONFIG;
use super::registers::INTERRUPT_STATUS;
use super::registers::INTERRUPT_USED;
use super::registers::STATUS;
use super::status::NEEDS_RESET;
use crate::device::Activation;
use crate::device::ConfigSpace;
use crate::device::Device;
use crate::device::DeviceError;
use crate::device::Interrupt;
use crate::device::News;
use crate::device::ReadyQueue;
use crate::last_words;
use crate::memory::GuestRam;

/// How long a device may take to stop. It waits for no one but the host's files.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// What the driver sees of a device that runs.
///
/// The interrupt status always has the bit of used buffers: drivers look at their queues then, and
/// find out themselves whether there are any. So neither the device nor the driver's thread has
/// anything to do for it, and KVM takes the acknowledgement of that bit by itself.
pub(super) struct Signals {
    shown: Mutex<Shown>,
    page: RegisterPage,
    line: EventFd,
}

/// What two threads have a say in.
#[derive(Default)]
struct Shown {
    /// The device status as far as the driver has set it.
    driver_status: u32,
    needs_reset: bool,
    has_new_config: bool,
    config_generation: u32,
}

impl Signals {
    fn new(page: RegisterPage, line: EventFd) -> Self {
        let signals = Self {
            shown: Mutex::default(),
            page,
            line,
        };
        signals.show(&signals.lock());
        signals
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the page. The lock is held meanwhile, so that the last to change something is the
    /// last to write.
    fn show(&self, shown: &Shown) {
        let interrupt = match shown.has_new_config {
            true => INTERRUPT_USED | INTERRUPT_CONFIG,
            false => INTERRUPT_USED,
        };
        self.page.set(INTERRUPT_STATUS, interrupt);
        self.page.set(STATUS, shown.status());
    }

    /// Takes the bits of the device status that the driver has set.
    pub(super) fn set_driver_status(&self, bits: u32) {
        let mut shown = self.lock();
        shown.driver_status = bits;
        self.show(&shown);
    }

    /// The device status as the driver reads it.
    pub(super) fn status(&self) -> u32 {
        self.lock().status()
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        if bits & INTERRUPT_CONFIG != 0 {
            let mut shown = self.lock();
            shown.has_new_config = false;
            self.show(&shown);
        }
    }

    pub(super) fn clear(&self) {
        let mut shown = self.lock();
        shown.needs_reset = false;
        shown.has_new_config = false;
        self.show(&shown);
    }

    /// Tells the driver that the device is of no use until it is reset (virtio 1.2, 2.1.2).
    pub(super) fn fail(&self) {
        let mut shown = self.lock();
        shown.needs_reset = true;
        shown.has_new_config = true;
        self.show(&shown);
        drop(shown);
        self.raise();
    }

    /// Shows another configuration. A driver that reads it in more than one piece, and meets the
    /// change, finds another generation than before and reads it anew (virtio 1.2, 4.2.2). Should
    /// it have begun between the two writes of the generation, the news comes after all.
    fn show_config(&self, config: &[u8], news: News) {
        let mut shown = self.lock();
        self.show_next_generation(&mut shown);
        self.page.set_bytes(CONFIG, config);
        self.show_next_generation(&mut shown);
        if news == News::Told {
            shown.has_new_config = true;
            self.show(&shown);
            drop(shown);
            self.raise();
        }
    }

    fn show_next_generation(&self, shown: &mut Shown) {
        shown.config_generation = shown.config_generation.wrapping_add(1);
        self.page.set(CONFIG_GENERATION, shown.config_generation);
    }

    fn raise(&self) {
        // A counter that is full is an interrupt that KVM has not taken yet.
        let _ = self.line.write(1);
    }
}

impl Shown {
    fn status(&self) -> u32 {
        match self.needs_reset {
            true => self.driver_status | NEEDS_RESET,
            false => self.driver_status,
        }
    }
}

/// Queues that were checked.
struct Assignment {
    queues: Vec<Option<Queue>>,
    features: u64,
}

/// The transport's side.
pub(crate) struct Worker {
    name: &'static str,
    signals: Arc<Signals>,
    kicks: Vec<EventFd>,
    stop: EventFd,
    /// `None` once the device has not stopped in time, or for good.
    assignments: Option<mpsc::Sender<Assignment>>,
    /// A message each time the device has returned: whether it can be started again.
    returns: mpsc::Receiver<bool>,
    is_running: bool,
}

/// The thread's side.
pub(crate) struct Seat {
    device: Box<dyn Device>,
    memory: Arc<GuestRam>,
    signals: Arc<Signals>,
    kicks: Vec<EventFd>,
    stop: EventFd,
    assignments: mpsc::Receiver<Assignment>,
    returned: mpsc::Sender<bool>,
}

/// Both sides of a device's thread, which is yet to be started with [`Seat::serve`].
pub(crate) fn employ(
    mut device: Box<dyn Device>,
    memory: Arc<GuestRam>,
    page: RegisterPage,
) -> io::Result<(Worker, Seat)> {
    let profile = device.profile();
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    let signals = Arc::new(Signals::new(page, event()?));
    let shown = Arc::clone(&signals);
    device.take_config_space(ConfigSpace::new(move |config, news| {
        shown.show_config(config, news);
    }));
    let kicks: Vec<_> = profile
        .queue_sizes
        .iter()
        .map(|_| event())
        .collect::<io::Result<_>>()?;
    let stop = event()?;
    let (assign, assignments) = mpsc::channel();
    let (returned, returns) = mpsc::channel();
    let seat = Seat {
        device,
        memory,
        signals: Arc::clone(&signals),
        kicks: kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<io::Result<_>>()?,
        stop: stop.try_clone()?,
        assignments,
        returned,
    };
    let worker = Worker {
        name: profile.name,
        signals,
        kicks,
        stop,
        assignments: Some(assign),
        returns,
        is_running: false,
    };
    Ok((worker, seat))
}

impl Worker {
    pub(super) fn signals(&self) -> &Signals {
        &self.signals
    }

    /// The interrupt line.
    pub(super) fn line(&self) -> &EventFd {
        &self.signals.line
    }

    /// The events that wake the device, one for each queue.
    pub(super) fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    pub(super) fn start(&mut self, queues: Vec<Option<Queue>>, features: u64) {
        let assignment = Assignment { queues, features };
        let sent = self
            .assignments
            .as_ref()
            .is_some_and(|thread| thread.send(assignment).is_ok());
        if sent {
            self.is_running = true;
        } else {
            self.signals.fail();
        }
    }

    /// Stops the device, if it runs, and forgets all signals. A device that does not stop in time
    /// is never started again.
    pub(super) fn stop(&mut self) {
        if self.assignments.is_none() {
            // The stop may still be to be seen by a device that did not stop in time.
            self.signals.clear();
            return;
        }
        if self.is_running {
            // Can't fail: the counter is zero whenever the device runs.
            let _ = self.stop.write(1);
            match self.returns.recv_timeout(STOP_DEADLINE) {
                Ok(true) => {}
                Ok(false) | Err(mpsc::RecvTimeoutError::Disconnected) => self.assignments = None,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    last_words::print(format_args!(
                        "{}: does not stop within {STOP_DEADLINE:?}",
                        self.name
                    ));
                    self.assignments = None;
                    self.is_running = false;
                    self.signals.clear();
                    return;
                }
            }
            self.is_running = false;
        }
        for event in self.kicks.iter().chain([&self.stop]) {
            // Not readable is as good.
            let _ = event.read();
        }
        self.signals.clear();
    }

    /// Stops the device for good: its thread ends.
    pub(super) fn dismiss(&mut self) {
        self.stop();
        self.assignments = None;
    }
}

impl Seat {
    pub(crate) fn name(&self) -> &'static str {
        self.device.profile().name
    }

    pub(crate) fn device_type(&self) -> u32 {
        self.device.profile().device_type
    }

    /// Runs the device whenever the driver has set it up, until the worker is dismissed.
    pub(crate) fn serve(mut self) {
        let mut failures_logged = 0;
        while let Ok(assignment) = self.assignments.recv() {
            let name = self.name();
            let run = AssertUnwindSafe(|| self.run(assignment));
            let is_usable = match panic::catch_unwind(run) {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    if failures_logged < FAILURES_LOGGED_MAX {
                        failures_logged += 1;
                        log_chain(name, &error);
                    }
                    self.signals.fail();
                    true
                }
                Err(_) => {
                    // The panic was printed; what state the device is in, nobody knows.
                    self.signals.fail();
                    false
                }
            };
            if self.returned.send(is_usable).is_err() || !is_usable {
                return;
            }
        }
    }

    fn run(&mut self, assignment: Assignment) -> Result<(), DeviceError> {
        let device = self.name();
        let failed = |source| DeviceError::Host {
            device,
            what: "duplicate an event",
            source,
        };
        let mut queues = Vec::with_capacity(assignment.queues.len());
        for (queue, kick) in assignment.queues.into_iter().zip(&self.kicks) {
            let Some(queue) = queue else {
                queues.push(None);
                continue;
            };
            let signals = Arc::clone(&self.signals);
            queues.push(Some(ReadyQueue {
                queue,
                kick: kick.try_clone().map_err(failed)?,
                interrupt: Interrupt::new(move || signals.raise()),
            }));
        }
        self.device.run(Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: assignment.features,
            stop: self.stop.try_clone().map_err(failed)?,
        })
    }
}

/// Failures of one device that are logged. A guest can make them as fast as it resets the device.
const FAILURES_LOGGED_MAX: u32 = 8;

/// Prints an error and its causes.
fn log_chain(name: &str, error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    last_words::print(format_args!("{name}: failed: {text}"));
}
