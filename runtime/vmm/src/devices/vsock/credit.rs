//! How much each side may send.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::RECEIVE_BUFFER_BYTES;

/// The four free-running counters of virtio 1.2, 5.10.6.3. They wrap.
#[derive(Default)]
pub(super) struct Credit {
    /// Bytes that we have sent.
    tx_cnt: u32,
    /// The guest's buffer.
    pub(super) peer_buf_alloc: u32,
    /// What the guest has passed on of what we sent.
    pub(super) peer_fwd_cnt: u32,
    /// What we have passed on of what the guest sent.
    pub(super) fwd_cnt: u32,
    /// The value of `fwd_cnt` that the guest knows.
    pub(super) fwd_told: u32,
}

impl Credit {
    /// Bytes that the guest has room for. A guest that claims to have passed on more than we
    /// sent makes the difference wrap, and so gets nothing.
    pub(super) fn free(&self) -> u32 {
        let on_the_way = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(on_the_way)
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        // One read is far below 4 GiB.
        self.tx_cnt = self
            .tx_cnt
            .wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    pub(super) fn forwarded(&mut self, bytes: usize) {
        // One packet is far below 4 GiB.
        self.fwd_cnt = self
            .fwd_cnt
            .wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Whether so much has been passed on that the guest should hear of it.
    pub(super) fn is_news(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.fwd_told) >= RECEIVE_BUFFER_BYTES / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_that_takes_its_buffer_away_gets_nothing() {
        let mut credit = Credit {
            peer_buf_alloc: 100,
            ..Credit::default()
        };
        credit.sent(60);
        credit.peer_buf_alloc = 50;

        assert_eq!(credit.free(), 0);
    }

    #[test]
    fn guest_that_claims_more_than_was_sent_gets_nothing() {
        let credit = Credit {
            peer_buf_alloc: u32::MAX - 1,
            peer_fwd_cnt: 1,
            ..Credit::default()
        };

        assert_eq!(credit.free(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit {
            tx_cnt: u32::MAX - 9,
            peer_buf_alloc: 100,
            peer_fwd_cnt: u32::MAX - 19,
            fwd_cnt: u32::MAX,
            fwd_told: u32::MAX,
        };
        credit.sent(20);
        assert_eq!(credit.free(), 70);

        credit.forwarded(RECEIVE_BUFFER_BYTES as usize / 2 - 1);
        assert!(!credit.is_news());
        credit.forwarded(1);
        assert!(credit.is_news());
    }
}
