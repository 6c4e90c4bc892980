//! How a virtual machine ends.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::PoisonError;

use vmm_sys_util::eventfd::EFD_CLOEXEC;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::fd::borrow;
use crate::vcpu::VcpuError;

/// Why the guest does not run any more.
#[derive(Debug)]
pub enum EndReason {
    /// The guest has powered itself off.
    Stopped,
    /// The guest has asked for a reset: Linux does so after a panic, and to restart.
    Reset,
    /// A virtual CPU has met an exception it has no handler for, not even for the exception of
    /// having none.
    TripleFault,
    /// A virtual CPU can't go on.
    Failed(VcpuError),
}

/// The first reason to end, and an event that there is one.
pub(crate) struct End {
    event: EventFd,
    reason: Mutex<Option<EndReason>>,
}

impl End {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            reason: Mutex::new(None),
        })
    }

    /// Says why the guest ends. Only the first report counts: others are its consequences.
    pub(crate) fn report(&self, reason: EndReason) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(reason);
            // An event counter that is full is readable as well.
            let _ = self.event.write(1);
        }
    }

    /// The reason, once.
    pub(crate) fn take(&self) -> Option<EndReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Readable from the first report on.
impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let end = End::new().unwrap();

        end.report(EndReason::Reset);
        end.report(EndReason::TripleFault);

        assert_eq!(end.event.read().unwrap(), 1);
        assert!(matches!(end.take(), Some(EndReason::Reset)));
    }

    #[test]
    fn no_report_is_no_event() {
        let end = End::new().unwrap();

        assert!(end.event.read().is_err());
        assert!(end.take().is_none());
    }
}
