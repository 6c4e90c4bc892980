//! Which device a physical address belongs to that the guest writes to. What it reads there is
//! memory, so that reads need no bus.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use crate::layout::MMIO_BYTES;
use crate::layout::MMIO_GPA;
use crate::transport::Mmio;

/// The register spaces of all devices, one after the other from [`MMIO_GPA`] on.
pub(crate) struct Bus {
    devices: Vec<Mutex<Mmio>>,
}

impl Bus {
    pub(crate) fn new(devices: Vec<Mmio>) -> Self {
        Self {
            devices: devices.into_iter().map(Mutex::new).collect(),
        }
    }

    /// Takes a write. Where nothing is, it is lost.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((mut device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }

    /// Every device, in order.
    pub(crate) fn devices(&self) -> impl Iterator<Item = MutexGuard<'_, Mmio>> {
        self.devices
            .iter()
            .map(|device| device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn device(&self, address: u64) -> Option<(MutexGuard<'_, Mmio>, u64)> {
        let offset = address.checked_sub(MMIO_GPA)?;
        let index = usize::try_from(offset / MMIO_BYTES).ok()?;
        let device = self.devices.get(index)?;
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        Some((device, offset % MMIO_BYTES))
    }
}
