//! Descriptors of types that only know their number.

use std::os::fd::BorrowedFd;

use vmm_sys_util::eventfd::EventFd;

/// Borrows the descriptor of an eventfd.
pub(crate) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor, so it stays open while `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) }
}
