//! virtio-rng: the host's random numbers (virtio 1.2, 5.4).
//!
//! One queue of buffers to fill. The lengths are the driver's, so a request is bounded here.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::simple::SimpleQueue;
use crate::device::{Activation, Device, DeviceError, Profile};
use crate::memory::GuestRam;

const NAME: &str = "rng";

/// Most bytes that one request is given; the driver asks again for more. A chain may name the same
/// page many times over, so its length does not bound the work behind it.
pub const REQUEST_BYTES_MAX: usize = 4096;

/// Bytes fetched at once: the kernel gives that many without a signal interrupting it.
const PIECE_BYTES: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub struct RngDevice;

impl Device for RngDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_RNG,
            features: 0,
            queue_sizes: &[16],
            is_hidden: false,
        }
    }

    fn run(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.get_mut(0).and_then(Option::take);
        let mut queue = SimpleQueue::new(NAME, 0, queue, &activation.memory);
        queue.serve(&activation.stop, answer)
    }
}

/// Fills the buffers of one request. Returns the bytes written.
fn answer(chain: DescriptorChain<&GuestRam>, memory: &GuestRam) -> Result<usize, DeviceError> {
    let mut done = 0_usize;
    for descriptor in chain.writable() {
        let bytes = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let bytes = bytes.min(REQUEST_BYTES_MAX.saturating_sub(done));
        let written = fill(memory, descriptor.addr(), bytes)?;
        done = done.saturating_add(written);
        if written < bytes {
            // The buffer lies outside of memory. What comes after it would leave a hole in what
            // the driver believes to be filled.
            break;
        }
    }
    Ok(done)
}

/// Writes random bytes from `start` on, as far as there is memory.
fn fill(memory: &GuestRam, start: GuestAddress, bytes: usize) -> Result<usize, DeviceError> {
    let mut piece = [0_u8; PIECE_BYTES];
    let mut done = 0_usize;
    while done < bytes {
        let wanted = bytes.saturating_sub(done).min(PIECE_BYTES);
        let random = piece.get_mut(..wanted).unwrap_or_default();
        let got = getrandom(&mut *random, GetRandomFlags::empty()).map_err(failed)?;
        let random = random.get(..got).unwrap_or_default();
        let at = start.0.checked_add(done as u64).map(GuestAddress);
        let written = at.map_or(0, |at| memory.write(random, at).unwrap_or(0));
        done = done.saturating_add(written);
        if written < got {
            break;
        }
    }
    Ok(done)
}

fn failed(errno: rustix::io::Errno) -> DeviceError {
    DeviceError::Host {
        device: NAME,
        what: "getrandom",
        source: io::Error::from(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Driver;
    use super::*;

    #[test]
    fn chain_that_nothing_can_be_written_to_comes_back_empty() {
        let mut driver = Driver::new(0);
        driver.add(&[(Driver::OUTSIDE, 64, true)]);
        driver.add(&[(Driver::DATA, 64, false)]);
        driver.add(&[(Driver::DATA, 0, true)]);

        let used = driver.run(&mut RngDevice);

        assert_eq!(used, [(0, 0), (1, 0), (2, 0)]);
    }

    #[test]
    fn head_outside_of_the_table_does_not_end_the_device() {
        let mut driver = Driver::new(0);
        driver.add_head(9999);
        driver.add(&[(Driver::DATA, 8, true)]);

        let used = driver.run(&mut RngDevice);

        assert_eq!(used, [(0, 8)]);
    }

    #[test]
    fn buffer_after_one_outside_of_memory_is_not_counted() {
        let mut driver = Driver::new(0);
        driver.add(&[
            (Driver::DATA, 16, true),
            (Driver::OUTSIDE, 16, true),
            (Driver::DATA, 16, true),
        ]);

        let used = driver.run(&mut RngDevice);

        assert_eq!(used, [(0, 16)]);
    }

    #[test]
    fn request_gets_no_more_than_the_limit() {
        let mut driver = Driver::new(0);
        driver.add(&[(Driver::DATA, 65536, true), (Driver::DATA, 65536, true)]);

        let used = driver.run(&mut RngDevice);

        assert_eq!(used, [(0, 4096)]);
    }

    #[test]
    fn requests_get_different_bytes() {
        let mut driver = Driver::new(0);
        driver.add(&[(Driver::DATA, 500, true)]);
        driver.add(&[(Driver::DATA + 500, 500, true)]);

        let used = driver.run(&mut RngDevice);

        assert_eq!(used, [(0, 500), (1, 500)]);
        let first = driver.read(Driver::DATA, 500);
        let second = driver.read(Driver::DATA + 500, 500);
        assert_ne!(first, [0; 500]);
        assert_ne!(first, second);
    }
}
