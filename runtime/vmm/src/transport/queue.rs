//! What the driver says of a queue, until it is checked.

use virtio_queue::Queue;
use virtio_queue::QueueT;
use vm_memory::Address;
use vm_memory::GuestAddress;

use crate::memory::GuestRam;

/// The numbers of one queue. Any of them may be wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueSetup {
    pub(super) size_max: u16,
    pub(super) size: u32,
    pub(super) desc_gpa: u64,
    pub(super) driver_gpa: u64,
    pub(super) device_gpa: u64,
    pub(super) is_ready: bool,
}

/// Why a queue can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueueError {
    #[error("its size {size} is no power of two up to {size_max}")]
    Size { size: u32, size_max: u16 },
    #[error("an address is not aligned as it must be")]
    Alignment(#[source] virtio_queue::Error),
    #[error("a part of it is outside of guest memory")]
    Memory,
}

impl QueueSetup {
    pub(super) fn new(size_max: u16) -> Self {
        Self {
            size_max,
            size: size_max.into(),
            desc_gpa: 0,
            driver_gpa: 0,
            device_gpa: 0,
            is_ready: false,
        }
    }

    /// The queue, if all numbers are right. `None` if the driver has left it disabled.
    pub(super) fn check(
        &self,
        memory: &GuestRam,
        has_event_index: bool,
    ) -> Result<Option<Queue>, QueueError> {
        if !self.is_ready {
            return Ok(None);
        }
        let wrong_size = |_| QueueError::Size {
            size: self.size,
            size_max: self.size_max,
        };
        let size = u16::try_from(self.size)
            .map_err(|_| virtio_queue::Error::InvalidSize)
            .map_err(wrong_size)?;
        let mut queue = Queue::new(self.size_max).map_err(wrong_size)?;
        queue.try_set_size(size).map_err(wrong_size)?;
        queue
            .try_set_desc_table_address(GuestAddress(self.desc_gpa))
            .map_err(QueueError::Alignment)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver_gpa))
            .map_err(QueueError::Alignment)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device_gpa))
            .map_err(QueueError::Alignment)?;
        queue.set_event_idx(has_event_index);
        queue.set_ready(true);
        if queue.is_valid(memory) {
            Ok(Some(queue))
        } else {
            Err(QueueError::Memory)
        }
    }
}

/// Replaces the lower half of an address.
pub(super) fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !u64::from(u32::MAX)) | u64::from(value);
}

/// Replaces the upper half of an address.
pub(super) fn set_high(address: &mut u64, value: u32) {
    *address = GuestAddress(*address).mask(u64::from(u32::MAX)) | (u64::from(value) << 32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    const MEMORY_BYTES: u64 = 1 << 20;

    fn right() -> QueueSetup {
        QueueSetup {
            size: 16,
            desc_gpa: 0x1000,
            driver_gpa: 0x2000,
            device_gpa: 0x3000,
            is_ready: true,
            ..QueueSetup::new(256)
        }
    }

    fn check(setup: QueueSetup) -> Result<Option<Queue>, QueueError> {
        let memory = Memory::map(MEMORY_BYTES).unwrap();
        setup.check(memory.mmap(), false)
    }

    #[test]
    fn wrong_sizes_are_refused() {
        for size in [0, 3, 257, 512, 0x1_0010] {
            let checked = check(QueueSetup { size, ..right() });

            assert!(matches!(checked, Err(QueueError::Size { .. })), "{size}");
        }
    }

    #[test]
    fn addresses_that_are_not_aligned_are_refused() {
        let wrong = [
            QueueSetup {
                desc_gpa: 0x1008,
                ..right()
            },
            QueueSetup {
                driver_gpa: 0x2001,
                ..right()
            },
            QueueSetup {
                device_gpa: 0x3002,
                ..right()
            },
        ];
        for setup in wrong {
            assert!(matches!(check(setup), Err(QueueError::Alignment(_))));
        }
    }

    #[test]
    fn parts_outside_of_memory_are_refused() {
        let last = MEMORY_BYTES - 16;
        let wrong = [
            QueueSetup {
                desc_gpa: last,
                ..right()
            },
            QueueSetup {
                driver_gpa: last,
                ..right()
            },
            QueueSetup {
                device_gpa: last,
                ..right()
            },
            QueueSetup {
                desc_gpa: u64::MAX - 15,
                ..right()
            },
        ];
        for setup in wrong {
            assert!(matches!(check(setup), Err(QueueError::Memory)));
        }
    }

    #[test]
    fn a_disabled_queue_is_not_looked_at() {
        let setup = QueueSetup {
            size: 3,
            is_ready: false,
            ..right()
        };

        assert!(check(setup).unwrap().is_none());
    }

    #[test]
    fn a_right_queue_has_the_driver_s_numbers() {
        let queue = check(right()).unwrap().unwrap();

        assert_eq!((queue.size(), queue.desc_table()), (16, 0x1000));
        assert_eq!((queue.avail_ring(), queue.used_ring()), (0x2000, 0x3000));
    }

    #[test]
    fn halves_of_an_address_do_not_touch_each_other() {
        let mut address = u64::MAX;

        set_low(&mut address, 0x1234_5678);
        set_high(&mut address, 0x9);

        assert_eq!(address, 0x9_1234_5678);
    }
}
