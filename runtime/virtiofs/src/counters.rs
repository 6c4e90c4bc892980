//! What the server has done, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// Totals since the server was made, except where it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken, with and without a reply.
    pub requests: u64,
    /// Requests that were no requests: too short, or with a wrong length.
    pub malformed: u64,
    /// Bytes of file data read.
    pub bytes_read: u64,
    /// Bytes of file data written.
    pub bytes_written: u64,
    /// Files known to the guest now.
    pub inodes: u64,
    /// Files and directories open now.
    pub handles: u64,
}

/// The counters that count up.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) requests: Total,
    pub(crate) malformed: Total,
    pub(crate) bytes_read: Total,
    pub(crate) bytes_written: Total,
}

/// A number that counts up.
#[derive(Debug, Default)]
pub(crate) struct Total(AtomicU64);

impl Total {
    pub(crate) fn add(&self, count: usize) {
        // Lengths are below 2^64 on every machine there is.
        self.0
            .fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
