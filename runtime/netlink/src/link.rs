//! Interfaces.

use std::io;

use crate::connection::Connection;
use crate::message::{Attributes, Message, Request, text_of, u16_at, u32_at};

/// The address of an Ethernet interface.
pub type Mac = [u8; 6];

/// [`Link::hardware`] of Ethernet: `ARPHRD_ETHER`.
pub const ETHERNET: u16 = 1;
/// [`Link::hardware`] of a loopback interface: `ARPHRD_LOOPBACK`.
pub const LOOPBACK: u16 = 772;

/// An interface as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The number it has in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is: `ARPHRD_...`.
    pub hardware: u16,
    /// It was brought up.
    pub is_up: bool,
    /// Longest packet, without the Ethernet header.
    pub mtu: u32,
    /// Its address, if it has an Ethernet one.
    pub mac: Option<Mac>,
    /// It is a port of another interface.
    pub has_master: bool,
}

/// What to change about an interface; what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkChange<'a> {
    /// Only while it is down.
    pub name: Option<&'a str>,
    /// Its address.
    pub mac: Option<Mac>,
    /// Longest packet.
    pub mtu: Option<u32>,
    /// Brings it up or down.
    pub is_up: Option<bool>,
    /// Keeps the kernel from giving it an IPv6 link-local address.
    pub has_no_link_local: bool,
}

pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_GETLINK: u16 = 18;
const IFLA_ADDRESS: u16 = 1;
pub(crate) const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const AF_INET6: u16 = 10;
const IFF_UP: u32 = 1;

/// `struct ifinfomsg`.
pub(crate) const STRUCTURE_BYTES: usize = 16;

pub(crate) fn structure(index: u32, flags: u32, change: u32) -> [u8; STRUCTURE_BYTES] {
    let mut bytes = [0; STRUCTURE_BYTES];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

impl Connection {
    /// All interfaces of the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let request = |flags| Request::new(RTM_GETLINK, flags, &structure(0, 0, 0));
        self.dump(request, Link::parse)
    }

    /// Changes an interface.
    ///
    /// # Errors
    /// The kernel's; some of the change may have been made.
    pub fn change_link(&mut self, index: u32, change: &LinkChange<'_>) -> io::Result<()> {
        let (flags, mask) = match change.is_up {
            Some(true) => (IFF_UP, IFF_UP),
            Some(false) => (0, IFF_UP),
            None => (0, 0),
        };
        self.call(RTM_NEWLINK, 0, &|kind, netlink_flags| {
            let structure = structure(index, flags, mask);
            let mut request = Request::new(kind, netlink_flags, &structure);
            if let Some(name) = change.name {
                request = request.text(IFLA_IFNAME, name);
            }
            if let Some(mac) = change.mac {
                request = request.attribute(IFLA_ADDRESS, &mac);
            }
            if let Some(mtu) = change.mtu {
                request = request.number(IFLA_MTU, mtu);
            }
            if change.has_no_link_local {
                request = request.nest(IFLA_AF_SPEC, |request| {
                    request.nest(AF_INET6, |request| {
                        request.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
                    })
                });
            }
            request
        })
    }
}

impl Link {
    fn parse(message: Message<'_>) -> Option<Self> {
        if message.kind != RTM_NEWLINK {
            return None;
        }
        let payload = message.payload;
        let mut link = Self {
            hardware: u16_at(payload, 2)?,
            index: u32_at(payload, 4)?,
            is_up: u32_at(payload, 8)? & IFF_UP != 0,
            name: String::new(),
            mtu: 0,
            mac: None,
            has_master: false,
        };
        for (kind, value) in Attributes::after(payload, STRUCTURE_BYTES) {
            match kind {
                IFLA_IFNAME => link.name = text_of(value),
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_ADDRESS => link.mac = value.try_into().ok(),
                IFLA_MASTER => link.has_master = true,
                _ => {}
            }
        }
        Some(link)
    }
}
