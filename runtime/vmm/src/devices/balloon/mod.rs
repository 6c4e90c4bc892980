//! virtio-balloon: what the guest has freed goes back to the host (virtio 1.2, 5.5).
//!
//! All it offers is free page reporting (5.5.6.7): the guest names pages that it does not use, and
//! finds new ones in their place, all zeros, when it does. The host asks for nothing: `num_pages`
//! stays 0. What a guest puts into the balloon nevertheless stays as it is, until it takes it out.
//!
//! A guest may name whatever it likes, pages that it needs included: it loses nothing but its own.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

#[cfg(test)]
mod tests;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::simple::{SimpleQueue, serve_all};
use crate::device::{Activation, Device, DeviceError, Profile};
use crate::last_words;
use crate::memory;

const NAME: &str = "balloon";

/// `VIRTIO_BALLOON_F_PAGE_REPORTING`
const PAGE_REPORTING: u64 = 1 << 5;

/// The queue of reports. Inflating and deflating have the two before it; that of statistics and that
/// of hints don't exist without their features, and drivers number those that do.
const REPORTS: usize = 2;

/// Most ranges of one report that are looked at. Linux names as many, and wants room for them.
const RANGES_MAX: u16 = 32;

/// Most bytes of one report that are given back, whether they are there or not: what names pages over
/// and over again is work too. Linux names 32 ranges of 4 MiB at most.
const REPORT_BYTES_MAX: u64 = 1 << 30;

/// See the module.
#[derive(Debug, Default)]
pub struct BalloonDevice {
    /// The host has refused something, and the log knows.
    has_complained: bool,
}

impl BalloonDevice {
    /// Gives back what a report names. The guest uses the pages again once the report is used.
    fn give_back(
        &mut self,
        report: DescriptorChain<&GuestMemoryMmap>,
        guest_memory: &GuestMemoryMmap,
    ) {
        let mut left = REPORT_BYTES_MAX;
        for range in report.writable().take(RANGES_MAX.into()) {
            let bytes = u64::from(range.len()).min(left);
            left = left.saturating_sub(bytes);
            if let Err(error) = memory::discard(guest_memory, range.addr(), bytes) {
                self.complain(&error);
            }
        }
    }

    /// The guest has no use for the news: its pages are as good as before.
    fn complain(&mut self, error: &std::io::Error) {
        if !self.has_complained {
            self.has_complained = true;
            last_words::print(format_args!(
                "{NAME}: cannot give memory back to the host: {error}; no more is said of it"
            ));
        }
    }
}

impl Device for BalloonDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_BALLOON,
            features: PAGE_REPORTING,
            queue_sizes: &[16, 16, RANGES_MAX],
            is_hidden: false,
        }
    }

    fn run(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            stop,
        } = activation;
        // virtio 1.2, 5.5.6.7.1: without it there are no reports.
        let has_reports = features & PAGE_REPORTING != 0;
        let queues = queues.into_iter().enumerate();
        let mut queues: Vec<_> = queues
            .map(|(index, queue)| SimpleQueue::new(NAME, index, queue, &memory))
            .collect();
        serve_all(&mut queues, &stop, |index, chain, memory| {
            if index == REPORTS && has_reports {
                self.give_back(chain, memory);
            }
            Ok(0)
        })
    }
}
