//! The registers as the driver reads them: a page of memory that it can read and not write.
//!
//! A read of a register that had to be answered would stop the virtual CPU and wake this process.
//! Drivers read dozens of registers while they start, and one at each interrupt. So what they would
//! be answered is written down beforehand: all that changes a register is a write of the driver's,
//! which still comes here, or the device's own doing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;
use vm_memory::VolatileSlice;

use crate::memory::ReadOnlyPages;

/// One device's page.
#[derive(Clone)]
pub(crate) struct RegisterPage {
    pages: Arc<ReadOnlyPages>,
    index: usize,
}

impl RegisterPage {
    /// The page of that index, which must exist.
    pub(crate) fn new(pages: Arc<ReadOnlyPages>, index: usize) -> Self {
        let page = Self { pages, index };
        assert!(page.pages.page(index).is_some(), "no register page {index}");
        page
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // Looked at in `new`.
        self.pages.page(self.index).expect("the page exists")
    }

    /// Shows a register.
    pub(super) fn set(&self, offset: u64, value: u32) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let stored = self.slice().store(value.to_le(), at, Ordering::SeqCst);
        debug_assert!(
            stored.is_ok(),
            "register {offset:#x} is outside of its page"
        );
    }

    /// Shows bytes from `offset` on; what does not fit the page is left out.
    pub(super) fn set_bytes(&self, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let written = self.slice().write(bytes, at);
        debug_assert!(written.is_ok(), "{offset:#x} is outside of its page");
    }

    /// What the driver reads at `offset`.
    #[cfg(test)]
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let at = usize::try_from(offset).unwrap();
        self.slice().read_slice(data, at).unwrap();
    }
}
