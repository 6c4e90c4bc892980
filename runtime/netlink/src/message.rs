//! Requests as they are built, and what is in an answer.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// linux/netlink.h: `struct nlmsghdr`.
pub(crate) const HEADER_BYTES: usize = 16;
/// `struct nlattr`.
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Everything is padded to this.
const ALIGN: usize = 4;
/// The bits of an attribute's type that are none: `NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`.
const ATTRIBUTE_FLAGS: u16 = 0xc000;
const NESTED: u16 = 0x8000;

/// A request under construction.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of that kind with the structure that belongs to it.
    pub(crate) fn new(kind: u16, flags: u16, structure: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(structure);
        let mut request = Self { bytes };
        request.pad();
        request
    }

    pub(crate) fn attribute(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + payload.len());
        let length = length.expect("no attribute of ours is that long");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.pad();
        self
    }

    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// A string, which the kernel wants terminated.
    pub(crate) fn text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub(crate) fn address(self, kind: u16, address: IpAddr) -> Self {
        self.attribute(kind, &octets(address))
    }

    /// An attribute that consists of those that `fill` adds.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self = fill(self.attribute(kind | NESTED, &[]));
        self.patch_length(start);
        self
    }

    /// Sets the length at `start` to that of everything from there on.
    fn patch_length(&mut self, start: usize) {
        let length = u16::try_from(self.bytes.len() - start);
        let length = length.expect("no attribute of ours is that long");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// `struct rtnexthop` with the attributes that `fill` adds.
    pub(crate) fn next_hop(mut self, rest: [u8; 6], fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&rest);
        self = fill(self);
        self.patch_length(start);
        self
    }

    pub(crate) fn into_bytes(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn pad(&mut self) {
        let length = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(length, 0);
    }
}

const NLM_F_REQUEST: u16 = 1;

/// One message of an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram.
pub(crate) struct Messages<'a> {
    pub(crate) rest: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.rest);
        let read = || {
            let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
            let message = Message {
                kind: u16_at(bytes, 4)?,
                flags: u16_at(bytes, 6)?,
                sequence: u32_at(bytes, 8)?,
                payload: bytes.get(HEADER_BYTES..length)?,
            };
            let rest = bytes.get(length.next_multiple_of(ALIGN)..);
            Some((message, rest.unwrap_or_default()))
        };
        match read() {
            Some((message, rest)) => {
                self.rest = rest;
                Some(Ok(message))
            }
            None => Some(Err(malformed())),
        }
    }
}

/// What is behind the structure of a message, or within an attribute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// Those behind the first `skipped` bytes.
    pub(crate) fn after(payload: &'a [u8], skipped: usize) -> Self {
        Self {
            rest: payload.get(skipped..).unwrap_or_default(),
        }
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.rest, 0)?);
        let kind = u16_at(self.rest, 2)? & !ATTRIBUTE_FLAGS;
        let payload = self.rest.get(ATTRIBUTE_HEADER_BYTES..length)?;
        let next = self.rest.get(length.next_multiple_of(ALIGN)..);
        self.rest = next.unwrap_or_default();
        Some((kind, payload))
    }
}

/// Not what the kernel is known to say.
pub(crate) fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed netlink message")
}

pub(crate) fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

/// A string without its terminator.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

/// An address by its length.
pub(crate) fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(octets).into())
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

pub(crate) fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_messages_are_refused() {
        let whole = Request::new(16, 0, &[0; 16]).into_bytes(7);
        for length in 1..whole.len() {
            let mut messages = Messages {
                rest: &whole[..length],
            };
            assert!(messages.next().unwrap().is_err(), "{length}");
            assert!(messages.next().is_none());
        }
    }

    #[test]
    fn message_shorter_than_its_header_is_refused() {
        let mut bytes = Request::new(16, 0, &[]).into_bytes(7);
        bytes[0] = 8;

        assert!(Messages { rest: &bytes }.next().unwrap().is_err());
    }

    #[test]
    fn attributes_end_at_the_first_that_is_no_attribute() {
        for bad in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 5], &[4], &[0; 8]] {
            assert_eq!(Attributes::after(bad, 0).next(), None, "{bad:?}");
        }
    }

    #[test]
    fn nested_attributes_come_back() {
        let request = Request::new(16, 0, &[]).text(3, "lo").nest(18, |request| {
            request.attribute(1, b"veth").number(2, 0x0102_0304)
        });
        let bytes = request.into_bytes(7);

        let message = Messages { rest: &bytes }.next().unwrap().unwrap();
        let mut attributes = Attributes::after(message.payload, 0);

        assert_eq!((message.kind, message.sequence), (16, 7));
        assert_eq!(attributes.next(), Some((3, &b"lo\0"[..])));
        let (kind, nested) = attributes.next().unwrap();
        assert_eq!(kind, 18);
        let nested: Vec<_> = Attributes::after(nested, 0).collect();
        assert_eq!(nested[0], (1, &b"veth"[..]));
        assert_eq!(nested[1], (2, &0x0102_0304_u32.to_ne_bytes()[..]));
        assert_eq!(attributes.next(), None);
    }
}
