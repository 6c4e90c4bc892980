//! A driver that writes registers, and a device that reports what it is given.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::poll;
use virtio_queue::QueueT;

use super::Mmio;
use super::RegisterPage;
use super::registers as reg;
use super::status::ACKNOWLEDGE;
use super::status::DRIVER;
use super::status::DRIVER_OK;
use super::status::FAILED;
use super::status::FEATURES_OK;
use super::status::NEEDS_RESET;
use crate::device::Activation;
use crate::device::ConfigSpace;
use crate::device::Device;
use crate::device::DeviceError;
use crate::device::Looks;
use crate::device::News;
use crate::device::Profile;
use crate::device::StillDriven;
use crate::devices::fd::borrow;
use crate::memory::Memory;
use crate::memory::ReadOnlyPages;

/// How long anything may take that has to happen.
const DEADLINE: Duration = Duration::from_secs(20);

const OFFERED: u64 = 1 << 3 | 1 << 40;
const VERSION_1: u64 = 1 << 32;
const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
const MEMORY_BYTES: u64 = 1 << 20;
const USED_AND_CONFIG: u32 = reg::INTERRUPT_USED | reg::INTERRUPT_CONFIG;

/// What the device does when it runs.
#[derive(Clone, Copy)]
enum Manner {
    ServeUntilStopped,
    /// Looks for the stop only after it was kicked.
    HangUntilKicked,
    FailAtOnce,
    PanicAtOnce,
}

/// What the device has seen.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Started {
        features: u64,
        sizes: Vec<Option<u16>>,
    },
    Kicked,
    Stopped,
}

struct FakeDevice {
    manner: Manner,
    seen: mpsc::Sender<Seen>,
    config: Arc<OnceLock<ConfigSpace>>,
}

impl Device for FakeDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: "fake",
            device_type: 42,
            features: OFFERED,
            queue_sizes: &[16, 8],
            is_hidden: false,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert_eq!(offset, 0);
        data[..4].copy_from_slice(&[1, 2, 3, 4]);
    }

    fn take_config_space(&mut self, config: ConfigSpace) {
        assert!(self.config.set(config).is_ok());
    }

    fn run(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let sizes = activation
            .queues
            .iter()
            .map(|queue| queue.as_ref().map(|ready| ready.queue.size()))
            .collect();
        let features = activation.features;
        self.seen.send(Seen::Started { features, sizes }).unwrap();
        match self.manner {
            Manner::ServeUntilStopped | Manner::HangUntilKicked => {}
            Manner::FailAtOnce => {
                return Err(DeviceError::Host {
                    device: "fake",
                    what: "work",
                    source: std::io::ErrorKind::Other.into(),
                });
            }
            Manner::PanicAtOnce => panic!("on purpose"),
        }
        let first = activation.queues.into_iter().flatten().next().unwrap();
        if matches!(self.manner, Manner::HangUntilKicked) {
            let kick = PollFd::from_borrowed_fd(borrow(&first.kick), PollFlags::IN);
            poll(&mut [kick], None).unwrap();
        }
        loop {
            let (stop, kick) = (borrow(&activation.stop), borrow(&first.kick));
            let mut fds = [stop, kick].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            poll(&mut fds, None).unwrap();
            if fds[0].revents().contains(PollFlags::IN) {
                self.seen.send(Seen::Stopped).unwrap();
                return Ok(());
            }
            first.kick.read().unwrap();
            self.seen.send(Seen::Kicked).unwrap();
            first.interrupt.signal_used();
        }
    }
}

/// The registers, with the device's thread behind them.
struct Rig {
    mmio: Mmio,
    page: RegisterPage,
    config: Arc<OnceLock<ConfigSpace>>,
    seen: mpsc::Receiver<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    fn new(manner: Manner) -> Self {
        let memory = Memory::map(MEMORY_BYTES).unwrap();
        let (sender, seen) = mpsc::channel();
        let config = Arc::default();
        let device = FakeDevice {
            manner,
            seen: sender,
            config: Arc::clone(&config),
        };
        let page = RegisterPage::new(Arc::new(ReadOnlyPages::map(1).unwrap()), 0);
        let (mmio, seat) = Mmio::new(Box::new(device), memory.shared(), page.clone()).unwrap();
        let thread = Some(thread::spawn(|| seat.serve()));
        Self {
            mmio,
            page,
            config,
            seen,
            thread,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.page.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(reg::STATUS)
    }

    fn choose(&mut self, features: u64) {
        for (sel, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(reg::DRIVER_FEATURES_SEL, sel);
            self.write(reg::DRIVER_FEATURES, u32::try_from(word).unwrap());
        }
    }

    /// Goes to the state in which queues are set up.
    fn agree(&mut self, features: u64) {
        self.write(reg::STATUS, ACKNOWLEDGE);
        self.write(reg::STATUS, ACKNOWLEDGE | DRIVER);
        self.choose(features);
        self.write(reg::STATUS, READY);
    }

    fn set_up_queue(&mut self, index: u32, size: u32) {
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_SIZE, size);
        self.write(reg::QUEUE_DESC_LOW, 0x1000);
        self.write(reg::QUEUE_DRIVER_LOW, 0x2000);
        self.write(reg::QUEUE_DEVICE_LOW, 0x3000);
        self.write(reg::QUEUE_READY, 1);
    }

    fn go_live(&mut self) {
        self.agree(VERSION_1);
        self.set_up_queue(0, 16);
        self.write(reg::STATUS, READY | DRIVER_OK);
    }

    fn next_seen(&self) -> Seen {
        self.seen.recv_timeout(DEADLINE).unwrap()
    }

    /// Waits for the interrupt line.
    fn await_line(&self) {
        let line = self.mmio.line();
        let mut fds = [PollFd::from_borrowed_fd(borrow(line), PollFlags::IN)];
        let deadline = DEADLINE.try_into().unwrap();
        assert_eq!(poll(&mut fds, Some(&deadline)).unwrap(), 1);
        line.read().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.mmio.dismiss();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

#[test]
fn writes_of_other_widths_do_nothing() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    rig.mmio.write(reg::STATUS, &[1]);
    rig.mmio.write(reg::STATUS, &[1; 8]);
    rig.mmio.write(reg::STATUS, &[]);

    assert_eq!(rig.status(), 0);
}

#[test]
fn registers_that_are_none_read_as_zero() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    for offset in [0x01c, 0x0c0, 0x050, 0x0ac] {
        rig.write(offset, 1);
        assert_eq!(rig.read(offset), 0, "{offset:#x}");
    }
}

#[test]
fn the_driver_skips_no_step() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    rig.write(reg::STATUS, READY | DRIVER_OK);
    assert_eq!(rig.status(), 0);
    rig.write(reg::STATUS, ACKNOWLEDGE);
    rig.write(reg::STATUS, DRIVER);
    assert_eq!(rig.status(), ACKNOWLEDGE);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    for features in [0, OFFERED, VERSION_1 | 1 << 5, VERSION_1 | 1 << 63] {
        let mut rig = Rig::new(Manner::ServeUntilStopped);

        rig.agree(features);

        assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
}

#[test]
fn features_are_chosen_in_their_state_only() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.choose(OFFERED);
    rig.agree(VERSION_1);
    rig.choose(VERSION_1 | OFFERED);
    rig.set_up_queue(0, 16);

    rig.write(reg::STATUS, READY | DRIVER_OK);

    let features = VERSION_1;
    let sizes = vec![Some(16), None];
    assert_eq!(rig.next_seen(), Seen::Started { features, sizes });
}

#[test]
fn a_queue_set_up_too_early_is_not_set_up() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.set_up_queue(0, 16);
    rig.agree(VERSION_1);

    assert_eq!(rig.read(reg::QUEUE_READY), 0);
}

#[test]
fn a_ready_queue_is_not_changed() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.agree(VERSION_1);
    rig.set_up_queue(0, 16);

    rig.write(reg::QUEUE_DESC_LOW, 0xffff_fff0);
    rig.write(reg::STATUS, READY | DRIVER_OK);

    assert_eq!(rig.status(), READY | DRIVER_OK);
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
}

#[test]
fn a_wrong_queue_needs_a_reset_and_starts_nothing() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.agree(VERSION_1);
    rig.set_up_queue(0, 15);

    rig.write(reg::STATUS, READY | DRIVER_OK);

    assert_eq!(rig.status(), READY | DRIVER_OK | NEEDS_RESET);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), USED_AND_CONFIG);
    rig.write(reg::INTERRUPT_ACK, USED_AND_CONFIG);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
    assert!(rig.seen.try_recv().is_err());
}

#[test]
fn a_queue_that_does_not_exist_has_no_size() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.agree(VERSION_1);

    for index in [2, u32::MAX] {
        rig.set_up_queue(index, 16);

        assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 0);
        assert_eq!(rig.read(reg::QUEUE_READY), 0);
    }
    rig.write(reg::QUEUE_NOTIFY, 2);
    rig.write(reg::QUEUE_NOTIFY, u32::MAX);
}

#[test]
fn a_device_that_fails_needs_a_reset_and_can_start_again() {
    let mut rig = Rig::new(Manner::FailAtOnce);
    rig.go_live();
    rig.await_line();

    assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    rig.write(reg::STATUS, 0);

    assert_eq!(rig.status(), 0);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
    rig.go_live();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
}

#[test]
fn a_device_that_panics_needs_a_reset_and_is_not_started_again() {
    let mut rig = Rig::new(Manner::PanicAtOnce);
    rig.go_live();
    rig.await_line();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));

    rig.write(reg::STATUS, 0);
    rig.go_live();

    assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(rig.seen.try_recv().is_err());
}

#[test]
fn a_driver_that_gives_up_shows_in_the_status() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.write(reg::STATUS, ACKNOWLEDGE);

    rig.write(reg::STATUS, ACKNOWLEDGE | FAILED);

    assert_eq!(rig.status(), ACKNOWLEDGE | FAILED);
}

#[test]
fn the_device_says_who_it_is() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    let identity = [reg::MAGIC, reg::VERSION, reg::DEVICE_ID].map(|offset| rig.read(offset));
    rig.write(reg::DEVICE_FEATURES_SEL, 1);
    let features_high = rig.read(reg::DEVICE_FEATURES);
    rig.write(reg::DEVICE_FEATURES_SEL, 2);

    assert_eq!(identity, [0x7472_6976, 2, 42]);
    assert_eq!(features_high, 1 << (40 - 32) | 1);
    assert_eq!(rig.read(reg::DEVICE_FEATURES), 0);
}

#[test]
fn device_that_is_not_there_is_a_placeholder() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    rig.mmio.appear(false);
    assert_eq!(rig.read(reg::DEVICE_ID), 0);

    rig.mmio.appear(true);
    assert_eq!(rig.read(reg::DEVICE_ID), 42);
}

#[test]
fn a_device_that_is_driven_does_not_become_another() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    let looks = Looks {
        features: 1 << 5,
        config: vec![9],
    };
    rig.mmio.appear(false);
    rig.write(reg::STATUS, ACKNOWLEDGE);
    rig.write(reg::STATUS, ACKNOWLEDGE | DRIVER);

    assert_eq!(rig.mmio.appear_as(&looks), Err(StillDriven));

    assert_eq!(rig.read(reg::DEVICE_ID), 0);
    assert_eq!(rig.read(reg::CONFIG), 0x0403_0201);
    // As Linux leaves a device that it has let go of.
    rig.write(reg::STATUS, 0);
    rig.write(reg::STATUS, ACKNOWLEDGE);
    rig.mmio.appear_as(&looks).unwrap();
    assert_eq!(rig.read(reg::DEVICE_ID), 42);
    assert_eq!(rig.read(reg::CONFIG), 9);
    assert_eq!(rig.read(reg::DEVICE_FEATURES), 1 << 5);
}

#[test]
fn a_device_that_became_another_has_its_features_only() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    let looks = Looks {
        features: 1 << 5,
        config: Vec::new(),
    };
    rig.mmio.appear_as(&looks).unwrap();

    rig.agree(VERSION_1 | OFFERED);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER);
    rig.write(reg::STATUS, 0);
    rig.agree(VERSION_1 | 1 << 5);

    assert_eq!(rig.status(), READY);
}

#[test]
fn a_shared_memory_region_that_does_not_exist_has_no_length() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);

    rig.write(reg::SHM_SEL, 0);

    let length = [reg::SHM_LEN_LOW, reg::SHM_LEN_HIGH].map(|offset| rig.read(offset));
    assert_eq!(length, [u32::MAX; 2]);
}

#[test]
fn the_configuration_is_read_in_any_width() {
    let rig = Rig::new(Manner::ServeUntilStopped);
    let (mut byte, mut word, mut beyond) = ([0; 1], [0; 8], [0xff; 8]);

    rig.page.read(reg::CONFIG + 1, &mut byte);
    rig.page.read(reg::CONFIG, &mut word);
    rig.page.read(0xff8, &mut beyond);

    assert_eq!(byte, [2]);
    assert_eq!(word, [1, 2, 3, 4, 0, 0, 0, 0]);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn a_change_of_the_configuration_is_told_until_it_is_acknowledged() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.go_live();
    let config = rig.config.get().unwrap().clone();
    let generation = rig.read(reg::CONFIG_GENERATION);

    config.show(&[9, 8, 7, 6], News::Told);

    rig.await_line();
    assert_eq!(rig.read(reg::CONFIG), 0x0607_0809);
    assert_ne!(rig.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), USED_AND_CONFIG);
    rig.write(reg::INTERRUPT_ACK, USED_AND_CONFIG);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
    assert_eq!(rig.read(reg::CONFIG), 0x0607_0809);
}

#[test]
fn a_change_that_the_driver_knows_of_is_shown_and_not_told() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.go_live();
    let config = rig.config.get().unwrap().clone();
    let generation = rig.read(reg::CONFIG_GENERATION);

    config.show(&[9], News::Known);

    assert_eq!(rig.read(reg::CONFIG), 0x0403_0209);
    assert_ne!(rig.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
    // It does not block: nothing was written.
    assert!(rig.mmio.line().read().is_err());
}

#[test]
fn a_kick_becomes_an_interrupt() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.go_live();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));

    rig.write(reg::QUEUE_NOTIFY, 0);
    assert_eq!(rig.next_seen(), Seen::Kicked);
    rig.await_line();

    assert_eq!(rig.read(reg::INTERRUPT_STATUS), reg::INTERRUPT_USED);
}

#[test]
fn a_reset_stops_the_device_and_forgets_the_driver() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.go_live();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));

    rig.write(reg::STATUS, 0);

    assert_eq!(rig.seen.try_recv(), Ok(Seen::Stopped));
    assert_eq!((rig.status(), rig.read(reg::QUEUE_READY)), (0, 0));
    rig.go_live();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
}

#[test]
fn a_stop_that_came_too_early_is_seen_by_the_device_at_last() {
    let mut rig = Rig::new(Manner::HangUntilKicked);
    rig.go_live();
    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
    rig.write(reg::STATUS, 0);
    assert!(rig.seen.try_recv().is_err());

    rig.write(reg::STATUS, 0);
    rig.write(reg::QUEUE_NOTIFY, 0);

    assert_eq!(rig.next_seen(), Seen::Stopped);
}

#[test]
fn a_kick_before_a_reset_does_not_outlive_it() {
    let mut rig = Rig::new(Manner::ServeUntilStopped);
    rig.write(reg::QUEUE_NOTIFY, 0);
    rig.write(reg::STATUS, 0);
    rig.go_live();

    assert!(matches!(rig.next_seen(), Seen::Started { .. }));
    rig.write(reg::STATUS, 0);
    assert_eq!(rig.next_seen(), Seen::Stopped);
}
