//! virtio over memory-mapped registers (virtio 1.2, 4.2).
//!
//! What the driver reads it finds in its [`RegisterPage`]; only its writes come here. The driver is
//! a guest and writes what it likes. A write that the specification does not allow in
//! the device's state, or of another width than its register, is ignored; the first few are logged.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::page::RegisterPage;
use super::queue::QueueSetup;
use super::queue::set_high;
use super::queue::set_low;
use super::registers as reg;
use super::status;
use super::status::Status;
use super::status::Step;
use super::worker;
use super::worker::Seat;
use super::worker::Worker;
use crate::device::Device;
use crate::device::Looks;
use crate::device::Profile;
use crate::device::StillDriven;
use crate::last_words;
use crate::layout::MMIO_BYTES;
use crate::memory::GuestRam;

/// Refused writes that are logged, for each device.
const REFUSALS_LOGGED_MAX: u32 = 8;

/// Configuration a device can have: what its registers leave of their page.
const CONFIG_BYTES: usize = 0xf00;
const _: () = assert!(reg::CONFIG + CONFIG_BYTES as u64 == MMIO_BYTES);

/// The registers of one device.
pub(crate) struct Mmio {
    profile: Profile,
    /// Offered, `VIRTIO_F_VERSION_1` included.
    features: u64,
    page: RegisterPage,
    memory: Arc<GuestRam>,
    worker: Worker,
    refusals: u32,
    driver: Driver,
}

/// Everything the driver sets. A reset replaces it as a whole.
struct Driver {
    status: Status,
    has_failed: bool,
    device_features_sel: u32,
    features_sel: u32,
    features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

impl Driver {
    fn new(profile: &Profile) -> Self {
        Self {
            status: Status::Fresh,
            has_failed: false,
            device_features_sel: 0,
            features_sel: 0,
            features: 0,
            queue_sel: 0,
            queues: profile
                .queue_sizes
                .iter()
                .map(|size| QueueSetup::new(*size))
                .collect(),
        }
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn queue_mut(&mut self) -> Option<&mut QueueSetup> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

impl Mmio {
    /// The registers for a device, and the seat of its thread.
    pub(crate) fn new(
        device: Box<dyn Device>,
        memory: Arc<GuestRam>,
        page: RegisterPage,
    ) -> io::Result<(Self, Seat)> {
        let profile = device.profile();
        let mut config = vec![0; CONFIG_BYTES];
        device.read_config(0, &mut config);
        page.set_bytes(reg::CONFIG, &config);
        let (worker, seat) = worker::employ(device, Arc::clone(&memory), page.clone())?;
        let mmio = Self {
            features: profile.features | (1 << VIRTIO_F_VERSION_1),
            driver: Driver::new(&profile),
            profile,
            page,
            memory,
            worker,
            refusals: 0,
        };
        mmio.show_constants();
        mmio.show();
        Ok((mmio, seat))
    }

    /// The interrupt line.
    pub(crate) fn line(&self) -> &EventFd {
        self.worker.line()
    }

    /// The events behind [`Self::notify_offset`], one for each queue.
    pub(crate) fn kicks(&self) -> &[EventFd] {
        self.worker.kicks()
    }

    /// The register whose writes KVM may turn into kicks by itself.
    pub(crate) fn notify_offset() -> u64 {
        reg::QUEUE_NOTIFY
    }

    /// The register and the value that acknowledge used buffers, which KVM may take by itself.
    pub(crate) fn acknowledgement() -> (u64, u32) {
        (reg::INTERRUPT_ACK, reg::INTERRUPT_USED)
    }

    /// Stops the device, which will not run again.
    pub(crate) fn dismiss(&mut self) {
        self.worker.dismiss();
    }

    /// Takes a write at `offset` of the registers.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let taken = match <[u8; 4]>::try_from(data) {
            Ok(bytes) => self.set_register(offset, u32::from_le_bytes(bytes)),
            Err(_) => false,
        };
        if !taken {
            self.log_refusal(offset, data);
        }
        self.show();
    }

    /// Shows what never changes.
    fn show_constants(&self) {
        for (register, value) in [
            (reg::MAGIC, reg::MAGIC_VALUE),
            (reg::VERSION, reg::VERSION_VALUE),
            (reg::VENDOR_ID, reg::VENDOR_VALUE),
            (reg::SHM_LEN_LOW, reg::NO_SHARED_MEMORY),
            (reg::SHM_LEN_HIGH, reg::NO_SHARED_MEMORY),
            (reg::SHM_BASE_LOW, reg::NO_SHARED_MEMORY),
            (reg::SHM_BASE_HIGH, reg::NO_SHARED_MEMORY),
        ] {
            self.page.set(register, value);
        }
        self.appear(!self.profile.is_hidden);
    }

    /// Shows the driver a device, or a placeholder instead. A driver that runs does not notice.
    pub(crate) fn appear(&self, is_there: bool) {
        let id = match is_there {
            true => self.profile.device_type,
            false => reg::NO_DEVICE,
        };
        self.page.set(reg::DEVICE_ID, id);
    }

    /// Shows the driver a device that looks different from the one that was in its place before.
    ///
    /// # Errors
    /// A driver has not let go of that one. Nothing was changed.
    pub(crate) fn appear_as(&mut self, looks: &Looks) -> Result<(), StillDriven> {
        // Linux acknowledges a device once more after its driver has let go of it.
        let is_free = matches!(self.driver.status, Status::Fresh | Status::Acknowledged);
        if !is_free || self.driver.has_failed {
            return Err(StillDriven);
        }
        self.features = looks.features | (1 << VIRTIO_F_VERSION_1);
        let mut config = looks.config.clone();
        config.resize(CONFIG_BYTES, 0);
        self.page.set_bytes(reg::CONFIG, &config);
        self.show();
        self.appear(true);
        Ok(())
    }

    /// Shows what a write of the driver's may have changed.
    fn show(&self) {
        let driver = &self.driver;
        let features = word(self.features, driver.device_features_sel);
        let size_max = driver.queue().map_or(0, |queue| queue.size_max.into());
        let is_ready = driver.queue().map_or(0, |queue| queue.is_ready.into());
        self.page.set(reg::DEVICE_FEATURES, features);
        self.page.set(reg::QUEUE_SIZE_MAX, size_max);
        self.page.set(reg::QUEUE_READY, is_ready);
        let mut bits = driver.status.bits();
        if driver.has_failed {
            bits |= status::FAILED;
        }
        self.worker.signals().set_driver_status(bits);
    }

    /// Whether the write was one that the driver may make now.
    fn set_register(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.driver.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver.features_sel = value,
            reg::DRIVER_FEATURES => return self.choose_features(value),
            reg::QUEUE_SEL => self.driver.queue_sel = value,
            reg::QUEUE_NOTIFY => return self.kick(value),
            // Linux asks a file system for its window; no region exists, whichever is selected.
            reg::SHM_SEL => {}
            reg::INTERRUPT_ACK => self.worker.signals().acknowledge(value),
            reg::STATUS => return self.set_status(value),
            _ => return self.set_up_queue(offset, value),
        }
        true
    }

    /// virtio 1.2, 3.1.1: features are chosen in one state only.
    fn choose_features(&mut self, value: u32) -> bool {
        let driver = &mut self.driver;
        match (driver.status, driver.features_sel) {
            (Status::Driven, 0) => set_low(&mut driver.features, value),
            (Status::Driven, 1) => set_high(&mut driver.features, value),
            // There are no features beyond 63, so none of them can be chosen.
            (Status::Driven, _) => return value == 0,
            _ => return false,
        }
        true
    }

    /// KVM does this itself for queues that exist, so that it never comes here.
    fn kick(&self, queue: u32) -> bool {
        let kick = usize::try_from(queue)
            .ok()
            .and_then(|queue| self.worker.kicks().get(queue));
        // A counter that is full wakes the device as well.
        kick.map(|kick| kick.write(1)).is_some()
    }

    /// virtio 1.2, 4.2.3.2: queues are set up between the features and the start.
    fn set_up_queue(&mut self, offset: u64, value: u32) -> bool {
        if self.driver.status != Status::Agreed {
            // Linux disables queues after it has reset the device, which has done so already.
            return offset == reg::QUEUE_READY && value == 0;
        }
        let Some(queue) = self.driver.queue_mut() else {
            return false;
        };
        // virtio 1.2, 4.2.2.2: a ready queue must not be changed.
        if queue.is_ready && offset != reg::QUEUE_READY {
            return false;
        }
        match offset {
            reg::QUEUE_SIZE => queue.size = value,
            reg::QUEUE_READY => queue.is_ready = value & 1 == 1,
            reg::QUEUE_DESC_LOW => set_low(&mut queue.desc_gpa, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc_gpa, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.driver_gpa, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver_gpa, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.device_gpa, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.device_gpa, value),
            _ => return false,
        }
        true
    }

    fn set_status(&mut self, bits: u32) -> bool {
        match self.driver.status.step(bits) {
            None => return false,
            Some(Step::Stay) => {}
            Some(Step::GiveUp) => self.driver.has_failed = true,
            Some(Step::Reset) => self.reset(),
            Some(Step::To(Status::Agreed)) => {
                // The driver reads back whether the bit is set (virtio 1.2, 3.1.1, step 6).
                if !self.has_valid_features() {
                    return false;
                }
                self.driver.status = Status::Agreed;
            }
            Some(Step::To(Status::Live)) => self.start(),
            Some(Step::To(next)) => self.driver.status = next,
        }
        true
    }

    /// The driver takes only what was offered, and no legacy interface.
    fn has_valid_features(&self) -> bool {
        let chosen = self.driver.features;
        chosen & !self.features == 0 && chosen & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn start(&mut self) {
        self.driver.status = Status::Live;
        let has_event_index = self.driver.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.driver.queues.len());
        for (index, setup) in self.driver.queues.iter().enumerate() {
            match setup.check(&self.memory, has_event_index) {
                Ok(queue) => queues.push(queue),
                Err(error) => {
                    if self.refusals < REFUSALS_LOGGED_MAX {
                        self.refusals += 1;
                        let name = self.profile.name;
                        last_words::print(format_args!("{name}: queue {index}: {error}"));
                    }
                    self.worker.signals().fail();
                    return;
                }
            }
        }
        self.worker.start(queues, self.driver.features);
    }

    /// Stops the device before the driver may touch the queues' memory again.
    fn reset(&mut self) {
        self.worker.stop();
        self.driver = Driver::new(&self.profile);
    }

    fn log_refusal(&mut self, offset: u64, data: &[u8]) {
        if self.refusals < REFUSALS_LOGGED_MAX {
            self.refusals += 1;
            last_words::print(format_args!(
                "{}: the driver's write of {data:02x?} to register {offset:#x} is refused in status \
                 {:#x}",
                self.profile.name,
                self.worker.signals().status(),
            ));
        }
    }
}

/// One half of the features; none are beyond 63.
fn word(features: u64, sel: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match sel {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
