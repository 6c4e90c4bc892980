//! virtio-console: the guest's console as a log (virtio 1.2, 5.3).
//!
//! One port, output only. What the guest prints goes to a file of limited size; its receive queue
//! is never used, for nobody types.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::fs::File;
use std::io::Write;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, WriteVolatile};

use super::simple::SimpleQueue;
use crate::device::{Activation, Device, DeviceError, Profile};
use crate::memory::GuestRam;

const NAME: &str = "console";

/// The queue of what the guest prints; queue 0 is for what is typed.
const TRANSMIT_QUEUE: usize = 1;

/// Most bytes of the log. The rest is discarded, after a line that says so.
pub const LOG_BYTES_MAX: usize = 1024 * 1024;

/// The last line of a full log.
const LOG_FULL: &[u8] = b"\nhusk: the console log is full, the rest is discarded\n";

/// Most bytes of one request that are looked at. Linux prints a page at a time.
const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// See the module.
#[derive(Debug)]
pub struct ConsoleDevice {
    log: File,
    left: usize,
    is_open: bool,
}

impl ConsoleDevice {
    /// A console that prints into `log`.
    #[must_use]
    pub fn new(log: File) -> Self {
        Self {
            log,
            left: LOG_BYTES_MAX,
            is_open: true,
        }
    }

    /// Writes what one request prints, as far as it lies in guest memory.
    fn print(&mut self, chain: DescriptorChain<&GuestRam>, memory: &GuestRam) {
        let mut request = REQUEST_BYTES_MAX;
        for descriptor in chain.readable() {
            let bytes = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let bytes = bytes.min(request);
            request = request.saturating_sub(bytes);
            for piece in memory.get_slices(descriptor.addr(), bytes) {
                let Ok(piece) = piece else { return };
                let bytes = piece.len().min(self.left);
                let Ok(piece) = piece.subslice(0, bytes) else {
                    return;
                };
                if !self.is_open {
                    return;
                }
                // The log is for people; a full disk shall not stop the guest.
                if self.log.write_all_volatile(&piece).is_err() {
                    self.is_open = false;
                    return;
                }
                self.left = self.left.saturating_sub(bytes);
                if self.left == 0 {
                    self.is_open = false;
                    let _ = self.log.write_all(LOG_FULL);
                }
            }
        }
    }
}

impl Device for ConsoleDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_CONSOLE,
            // Neither a size nor multiple ports: the config space is all zero.
            features: 0,
            queue_sizes: &[16, 64],
            is_hidden: false,
        }
    }

    fn run(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queue = activation
            .queues
            .get_mut(TRANSMIT_QUEUE)
            .and_then(Option::take);
        let mut queue = SimpleQueue::new(NAME, TRANSMIT_QUEUE, queue, &activation.memory);
        queue.serve(&activation.stop, |chain, memory| {
            self.print(chain, memory);
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::super::fake::Driver;
    use super::*;

    fn log_of(file: &mut File) -> Vec<u8> {
        let mut text = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut text).unwrap();
        text
    }

    #[test]
    fn what_is_not_in_guest_memory_is_not_printed() {
        let mut log = tempfile::tempfile().unwrap();
        let mut driver = Driver::new(TRANSMIT_QUEUE);
        driver.add(&[(Driver::OUTSIDE, 64, false)]);
        driver.add(&[(Driver::DATA, 64, true)]);
        driver.add_head(9999);

        driver.run(&mut ConsoleDevice::new(log.try_clone().unwrap()));

        assert_eq!(log_of(&mut log), b"");
    }

    #[test]
    fn prints_all_pieces_in_order() {
        let mut log = tempfile::tempfile().unwrap();
        let mut driver = Driver::new(TRANSMIT_QUEUE);
        driver.write(Driver::DATA, b"hello, world");
        driver.add(&[(Driver::DATA, 5, false), (Driver::DATA + 5, 2, false)]);
        driver.add(&[(Driver::DATA + 7, 5, false)]);

        let used = driver.run(&mut ConsoleDevice::new(log.try_clone().unwrap()));

        assert_eq!(used, [(0, 0), (2, 0)]);
        assert_eq!(log_of(&mut log), b"hello, world");
    }

    #[test]
    fn full_log_says_so_once_and_grows_no_more() {
        let mut log = tempfile::tempfile().unwrap();
        let mut console = ConsoleDevice::new(log.try_clone().unwrap());
        console.left = 10;
        let mut driver = Driver::new(TRANSMIT_QUEUE);
        driver.write(Driver::DATA, b"0123456789");
        driver.add(&[(Driver::DATA, 8, false)]);
        driver.add(&[(Driver::DATA, 8, false)]);
        driver.add(&[(Driver::DATA, 8, false)]);

        driver.run(&mut console);

        assert_eq!(
            log_of(&mut log),
            [b"0123456701".as_slice(), LOG_FULL].concat()
        );
    }

    #[test]
    fn log_that_cannot_be_written_does_not_stop_the_guest() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut driver = Driver::new(TRANSMIT_QUEUE);
        driver.add(&[(Driver::DATA, 8, false)]);
        driver.add(&[(Driver::DATA, 8, false)]);

        let used = driver.run(&mut ConsoleDevice::new(full));

        assert_eq!(used, [(0, 0), (1, 0)]);
    }
}
