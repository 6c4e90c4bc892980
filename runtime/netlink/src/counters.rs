//! What has passed through interfaces.

use std::io;

use crate::connection::Connection;
use crate::link::{IFLA_IFNAME, RTM_GETLINK, RTM_NEWLINK, STRUCTURE_BYTES, structure};
use crate::message::{Attributes, Message, Request, text_of, u32_at, u64_at};

/// What has passed through an interface since it was made, as its own namespace sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// [`Link::index`](crate::Link::index).
    pub link: u32,
    /// Its name.
    pub name: String,
    /// What has come in.
    pub received: Passed,
    /// What has gone out.
    pub sent: Passed,
}

/// One direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// With Ethernet headers.
    pub bytes: u64,
    /// A large one that is cut later counts as one.
    pub packets: u64,
    /// Those that were broken.
    pub errors: u64,
    /// Those that were thrown away.
    pub dropped: u64,
}

/// linux/if_link.h: `struct rtnl_link_stats64`, which begins with packets, bytes, errors and dropped,
/// of both directions each.
const IFLA_STATS64: u16 = 23;

impl Connection {
    /// The counters of all interfaces of the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&mut self) -> io::Result<Vec<Counters>> {
        let request = |flags| Request::new(RTM_GETLINK, flags, &structure(0, 0, 0));
        self.dump(request, Counters::parse)
    }
}

impl Counters {
    fn parse(message: Message<'_>) -> Option<Self> {
        if message.kind != RTM_NEWLINK {
            return None;
        }
        let mut counters = Self {
            link: u32_at(message.payload, 4)?,
            ..Self::default()
        };
        for (kind, value) in Attributes::after(message.payload, STRUCTURE_BYTES) {
            match kind {
                IFLA_IFNAME => counters.name = text_of(value),
                IFLA_STATS64 => {
                    counters.received = Passed::parse(value, 0)?;
                    counters.sent = Passed::parse(value, 1)?;
                }
                _ => {}
            }
        }
        Some(counters)
    }
}

impl Passed {
    /// `direction`: 0 for what was received.
    fn parse(value: &[u8], direction: usize) -> Option<Self> {
        let figure = |which: usize| u64_at(value, (2 * which + direction) * size_of::<u64>());
        Some(Self {
            packets: figure(0)?,
            bytes: figure(1)?,
            errors: figure(2)?,
            dropped: figure(3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Messages;

    fn parsed(figures: &[u64]) -> Option<Counters> {
        let bytes: Vec<u8> = figures.iter().flat_map(|it| it.to_ne_bytes()).collect();
        let request = Request::new(RTM_NEWLINK, 0, &structure(7, 0, 0))
            .text(IFLA_IFNAME, "eth0")
            .attribute(IFLA_STATS64, &bytes);
        let bytes = request.into_bytes(1);
        Counters::parse(Messages { rest: &bytes }.next().unwrap().unwrap())
    }

    #[test]
    fn each_figure_is_found_in_its_place() {
        let counters = parsed(&[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        let passed = |bytes, packets, errors, dropped| Passed {
            bytes,
            packets,
            errors,
            dropped,
        };
        assert_eq!((counters.link, counters.name.as_str()), (7, "eth0"));
        assert_eq!(counters.received, passed(3, 1, 5, 7));
        assert_eq!(counters.sent, passed(4, 2, 6, 8));
    }

    #[test]
    fn figures_that_are_cut_are_none() {
        assert_eq!(parsed(&[1, 2, 3, 4, 5, 6, 7]), None);
    }
}
