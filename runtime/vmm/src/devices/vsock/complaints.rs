//! What the log is told of a guest that breaks the rules.

use std::cmp::Ordering;
use std::fmt;

/// Log lines about the guest's packets. A guest can make as many mistakes as it likes, so their
/// number is limited for as long as the driver is up.
#[derive(Default)]
pub(super) struct Complaints {
    count: u32,
}

impl Complaints {
    const MAX: u32 = 16;

    pub(super) fn note(&mut self, what: fmt::Arguments<'_>) {
        self.count = self.count.saturating_add(1);
        match self.count.cmp(&Self::MAX) {
            Ordering::Less => eprintln!("vsock: {what}"),
            Ordering::Equal => eprintln!("vsock: {what}; further ones are not logged"),
            Ordering::Greater => {}
        }
    }
}
