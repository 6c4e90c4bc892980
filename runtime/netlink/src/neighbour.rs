//! Neighbours that were set by hand.

use std::io;
use std::net::IpAddr;

use crate::connection::{Connection, NLM_F_CREATE, NLM_F_REPLACE};
use crate::link::Mac;
use crate::message::{Attributes, Message, Request, address_of, family_of, u8_at, u16_at, u32_at};

/// Who has an address, for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// [`Link::index`](crate::Link::index).
    pub link: u32,
    /// Its IP address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
}

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const NTF_PROXY: u8 = 0x08;

/// `struct ndmsg`.
const STRUCTURE_BYTES: usize = 12;

impl Connection {
    /// All permanent neighbours in the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let request = |flags| Request::new(RTM_GETNEIGH, flags, &[0; STRUCTURE_BYTES]);
        self.dump(request, Neighbour::parse)
    }

    /// Adds a neighbour, or replaces the one with its address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.call(RTM_NEWNEIGH, flags, &|kind, flags| {
            neighbour.request(kind, flags)
        })
    }

    /// Removes a neighbour.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        self.call(RTM_DELNEIGH, 0, &|kind, flags| {
            neighbour.request(kind, flags)
        })
    }
}

impl Neighbour {
    fn request(&self, kind: u16, flags: u16) -> Request {
        let mut structure = [0; STRUCTURE_BYTES];
        structure[0] = family_of(self.address);
        structure[4..8].copy_from_slice(&self.link.to_ne_bytes());
        structure[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
        Request::new(kind, flags, &structure)
            .address(NDA_DST, self.address)
            .attribute(NDA_LLADDR, &self.mac)
    }

    fn parse(message: Message<'_>) -> Option<Self> {
        let payload = message.payload;
        let is_set =
            u16_at(payload, 8)? & NUD_PERMANENT != 0 && u8_at(payload, 10)? & NTF_PROXY == 0;
        if message.kind != RTM_NEWNEIGH || !is_set {
            return None;
        }
        let (mut address, mut mac) = (None, None);
        for (kind, value) in Attributes::after(payload, STRUCTURE_BYTES) {
            match kind {
                NDA_DST => address = address_of(value),
                NDA_LLADDR => mac = value.try_into().ok(),
                _ => {}
            }
        }
        Some(Self {
            link: u32_at(payload, 4)?,
            address: address?,
            mac: mac?,
        })
    }
}
