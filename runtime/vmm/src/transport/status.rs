//! How far the driver has come with a device (virtio 1.2, 2.1 and 3.1.1).

pub(super) const ACKNOWLEDGE: u32 = 1;
pub(super) const DRIVER: u32 = 2;
pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
/// Set by us alone.
pub(super) const NEEDS_RESET: u32 = 64;
pub(super) const FAILED: u32 = 128;

/// The life of a device, as the driver moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// As after a reset.
    Fresh,
    /// The driver has noticed the device.
    Acknowledged,
    /// The driver knows how to drive the device; features are chosen.
    Driven,
    /// The features are agreed on; queues are set up.
    Agreed,
    /// The device runs.
    Live,
}

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Zero was written.
    Reset,
    /// The same again.
    Stay,
    /// The next state, if its conditions hold.
    To(Status),
    /// The driver has given up.
    GiveUp,
}

impl Status {
    /// The bits the driver has set to come here.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Fresh => 0,
            Self::Acknowledged => ACKNOWLEDGE,
            Self::Driven => ACKNOWLEDGE | DRIVER,
            Self::Agreed => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            Self::Live => ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        }
    }

    /// What follows from a write of `bits`; `None` is refused. The driver must not clear a bit
    /// (virtio 1.2, 2.1.1), and may skip none (3.1.1).
    pub(super) fn step(self, bits: u32) -> Option<Step> {
        if bits == 0 {
            return Some(Step::Reset);
        }
        // It may write back what it has read, our own bit with it.
        let bits = bits & !NEEDS_RESET;
        if bits & FAILED != 0 {
            return Some(Step::GiveUp);
        }
        if bits == self.bits() {
            return Some(Step::Stay);
        }
        let next = match self {
            Self::Fresh => Self::Acknowledged,
            Self::Acknowledged => Self::Driven,
            Self::Driven => Self::Agreed,
            Self::Agreed => Self::Live,
            Self::Live => return None,
        };
        (bits == next.bits()).then_some(Step::To(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Status; 5] = [
        Status::Fresh,
        Status::Acknowledged,
        Status::Driven,
        Status::Agreed,
        Status::Live,
    ];

    #[test]
    fn the_only_way_is_step_by_step() {
        for (at, from) in ALL.into_iter().enumerate() {
            for bits in (1..FAILED).filter(|bits| bits & NEEDS_RESET == 0) {
                let expected = match ALL.iter().position(|to| to.bits() == bits) {
                    Some(to) if to == at => Some(Step::Stay),
                    Some(to) if to == at + 1 => Some(Step::To(ALL[to])),
                    _ => None,
                };

                assert_eq!(from.step(bits), expected, "{from:?} and {bits:#x}");
            }
        }
    }

    #[test]
    fn reset_and_failure_come_from_everywhere() {
        for from in ALL {
            assert_eq!(from.step(0), Some(Step::Reset));
            assert_eq!(from.step(from.bits() | FAILED), Some(Step::GiveUp));
        }
    }

    #[test]
    fn our_own_bit_may_be_written_back() {
        let bits = Status::Live.bits() | NEEDS_RESET;

        assert_eq!(Status::Live.step(bits), Some(Step::Stay));
    }
}
