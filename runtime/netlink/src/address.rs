//! Addresses of interfaces.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use crate::connection::{Connection, NLM_F_CREATE, NLM_F_REPLACE};
use crate::message::{Attributes, Message, Request, address_of, family_of, u8_at, u32_at};

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// [`Link::index`](crate::Link::index).
    pub link: u32,
    /// The interface's own.
    pub address: IpAddr,
    /// How many bits of it (or of the peer's) name the network.
    pub prefix_length: u8,
    /// The other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// Where it is said.
    pub broadcast: Option<Ipv4Addr>,
    /// How far it is valid: `RT_SCOPE_...`.
    pub scope: u8,
    /// It was set for good, and not by what a router or a lease says.
    pub is_permanent: bool,
}

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_PERMANENT: u32 = 0x80;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;

/// `struct ifaddrmsg`.
const STRUCTURE_BYTES: usize = 8;

impl Connection {
    /// All addresses in the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let request = |flags| Request::new(RTM_GETADDR, flags, &[0; STRUCTURE_BYTES]);
        self.dump(request, Address::parse)
    }

    /// Adds an address, or replaces the same one. The route to its network is not added with it, and
    /// nobody is asked whether the address is in use (IPv6 duplicate address detection).
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_address(&mut self, address: &Address) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.call(RTM_NEWADDR, flags, &|kind, flags| {
            let flagged = IFA_F_NODAD | IFA_F_NOPREFIXROUTE;
            address.request(kind, flags).number(IFA_FLAGS, flagged)
        })
    }

    /// Removes an address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_address(&mut self, address: &Address) -> io::Result<()> {
        self.call(RTM_DELADDR, 0, &|kind, flags| address.request(kind, flags))
    }
}

impl Address {
    fn request(&self, kind: u16, flags: u16) -> Request {
        let mut structure = [0; STRUCTURE_BYTES];
        structure[0] = family_of(self.address);
        structure[1] = self.prefix_length;
        structure[3] = self.scope;
        structure[4..].copy_from_slice(&self.link.to_ne_bytes());
        let mut request = Request::new(kind, flags, &structure)
            .address(IFA_LOCAL, self.address)
            .address(IFA_ADDRESS, self.peer.unwrap_or(self.address));
        if let Some(broadcast) = self.broadcast {
            request = request.address(IFA_BROADCAST, broadcast.into());
        }
        request
    }

    fn parse(message: Message<'_>) -> Option<Self> {
        if message.kind != RTM_NEWADDR {
            return None;
        }
        let payload = message.payload;
        let (mut local, mut remote, mut broadcast) = (None, None, None);
        let mut flags = u32::from(u8_at(payload, 2)?);
        for (kind, value) in Attributes::after(payload, STRUCTURE_BYTES) {
            match kind {
                IFA_LOCAL => local = address_of(value),
                IFA_ADDRESS => remote = address_of(value),
                IFA_BROADCAST => broadcast = address_of(value),
                IFA_FLAGS => flags = u32_at(value, 0)?,
                _ => {}
            }
        }
        // IPv6 names the interface's address alone, and a peer's beside it.
        let address = local.or(remote)?;
        Some(Self {
            link: u32_at(payload, 4)?,
            address,
            prefix_length: u8_at(payload, 1)?,
            peer: remote.filter(|remote| *remote != address),
            broadcast: match broadcast {
                Some(IpAddr::V4(broadcast)) => Some(broadcast),
                _ => None,
            },
            scope: u8_at(payload, 3)?,
            is_permanent: flags & IFA_F_PERMANENT != 0,
        })
    }
}
