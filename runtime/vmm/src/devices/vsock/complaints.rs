//! What the log is told of a guest that breaks the rules.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::last_words;

/// Log lines about the guest's packets. A guest can make as many mistakes as it likes, and reset
/// the device as often, so their number is limited for as long as the device exists.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    count: AtomicU32,
}

impl Complaints {
    const MAX: u32 = 16;

    /// Logs it, unless there have been too many. Whether it did.
    pub(super) fn note(&self, what: fmt::Arguments<'_>) -> bool {
        let counted = |count: u32| (count < Self::MAX).then_some(count + 1);
        let before = self
            .count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted);
        match before {
            Ok(count) if count + 1 == Self::MAX => {
                last_words::print(format_args!("vsock: {what}; further ones are not logged"));
            }
            Ok(_) => last_words::print(format_args!("vsock: {what}")),
            Err(_) => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_does_not_grow_with_the_guests_mistakes() {
        let complaints = Complaints::default();

        let logged = (0..1000)
            .filter(|number| complaints.note(format_args!("mistake {number}")))
            .count();

        assert_eq!(logged, Complaints::MAX as usize);
    }
}
