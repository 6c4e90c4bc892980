//! virtio-blk: a file or a block device of the host as a disk (virtio 1.2, 5.2).
//!
//! The descriptor was handed over, and whether it may be written to was decided when it was opened.
//! Each request goes straight between guest memory and the file, one after the other. What the guest
//! has written is in the host's cache until the guest flushes it.
//!
//! A device is made without a disk: it is hidden from the guest until one is plugged in, and takes on
//! its size, its features and its serial number then. From the moment a disk is pulled out, the
//! guest's requests fail.

mod disk;
mod request;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use self::disk::Disk;
pub use self::disk::{DiskError, Geometry, SERIAL_BYTES_MAX};
use super::simple::SimpleQueue;
use crate::device::{Activation, Device, DeviceError, Looks, Profile};

const NAME: &str = "blk";

/// virtio 1.2, 5.2.5: the unit of all numbers, whatever the size of a block.
const SECTOR_BYTES: u64 = 512;

/// Requests that the guest may have on their way.
const QUEUE_SIZE: u16 = 128;

/// Most buffers of one request's data, and the most bytes of one of them.
const SEGMENTS_MAX: u32 = 126;
const SEGMENT_BYTES_MAX: u32 = 1 << 20;

/// Most data of one request. A chain may name the same page many times over, so its length does not
/// bound the memory behind it.
const REQUEST_BYTES_MAX: usize = (SEGMENTS_MAX * SEGMENT_BYTES_MAX) as usize;

/// Most parts of a disk that one request makes zero, and the most sectors of one of them: 1 GiB, as
/// the host may have to write them.
const ZERO_PARTS_MAX: usize = 16;
const ZERO_SECTORS_MAX: u32 = 1 << 21;

/// Up to `write_zeroes_may_unmap` and what pads it.
const CONFIG_BYTES: usize = 60;

/// See the module.
pub struct BlkDevice {
    slot: Arc<Slot>,
}

/// Where disks are plugged in, from outside of the device's thread.
#[derive(Debug)]
pub struct Socket {
    slot: Arc<Slot>,
}

/// The disk that is plugged in. The device has a share in it only while it answers a request.
#[derive(Debug, Default)]
struct Slot(Mutex<Option<Arc<Disk>>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Disk>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> Option<Arc<Disk>> {
        self.lock().clone()
    }

    fn replace(&self, disk: Option<Disk>) {
        let old = std::mem::replace(&mut *self.lock(), disk.map(Arc::new));
        // Closed without the lock.
        drop(old);
    }
}

impl BlkDevice {
    /// A device without a disk, and the socket for one.
    #[must_use]
    pub fn new() -> (Self, Socket) {
        let slot = Arc::new(Slot::default());
        let socket = Socket {
            slot: Arc::clone(&slot),
        };
        (Self { slot }, socket)
    }
}

impl Socket {
    /// Plugs a disk in. The guest is to meet a device that looks as returned.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn plug(&self, file: OwnedFd, geometry: Geometry) -> Result<Looks, DiskError> {
        let disk = Disk::new(file, geometry)?;
        let looks = looks(&disk);
        self.slot.replace(Some(disk));
        Ok(looks)
    }

    /// Pulls the disk out, if there is one. It is closed at once, or after the request that the device
    /// is at.
    pub fn pull(&self) {
        self.slot.replace(None);
    }
}

impl Device for BlkDevice {
    fn profile(&self) -> Profile {
        Profile {
            name: NAME,
            device_type: VIRTIO_ID_BLOCK,
            features: features(None),
            queue_sizes: &[QUEUE_SIZE],
            is_hidden: true,
        }
    }

    fn run(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.get_mut(0).and_then(Option::take);
        let mut queue = SimpleQueue::new(NAME, 0, queue, &activation.memory);
        queue.serve(&activation.stop, |chain, memory| {
            let disk = self.slot.disk();
            Ok(request::answer(chain, memory, disk.as_deref()))
        })
    }
}

/// What a device with a disk offers.
fn features(disk: Option<&Geometry>) -> u64 {
    let mut offered = vec![
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_RING_F_INDIRECT_DESC,
    ];
    match disk {
        Some(disk) if disk.is_read_only => offered.push(VIRTIO_BLK_F_RO),
        Some(disk) if disk.can_zero => {
            offered.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        Some(_) | None => {}
    }
    offered.into_iter().fold(0, |bits, bit| bits | (1 << bit))
}

/// virtio 1.2, 5.2.4.
fn looks(disk: &Disk) -> Looks {
    let geometry = disk.geometry();
    let zero_parts = u32::try_from(ZERO_PARTS_MAX).unwrap_or(1);
    let block_sectors = u32::try_from(SECTOR_BYTES).map_or(1, |bytes| geometry.block_bytes / bytes);
    let mut config = vec![0; CONFIG_BYTES];
    let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &disk.sectors().to_le_bytes());
    for (at, value) in [
        (8, SEGMENT_BYTES_MAX),
        (12, SEGMENTS_MAX),
        (20, geometry.block_bytes),
        (36, ZERO_SECTORS_MAX),
        (40, zero_parts),
        (44, block_sectors),
        (48, ZERO_SECTORS_MAX),
        (52, zero_parts),
    ] {
        set(at, &value.to_le_bytes());
    }
    // write_zeroes_may_unmap
    set(56, &[1]);
    Looks {
        features: features(Some(geometry)),
        config,
    }
}
