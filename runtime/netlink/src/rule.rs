//! Routing rules: which table a packet's route is looked up in (ip-rule(8)).

use std::io;

use rustix::io::Errno;

use crate::connection::{Connection, NLM_F_CREATE, NLM_F_EXCL};
use crate::message::{AF_INET, AF_INET6, Attributes, Message, Request, u8_at, u32_at};

/// A routing rule. What it says of packets is kept as the kernel has it: interfaces are in it by their
/// names, so that it means the same in another namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// It is for packets of the other family.
    pub is_ipv6: bool,
    /// How many bits of the destination count, which is among the attributes.
    pub destination_length: u8,
    /// How many bits of the source count.
    pub source_length: u8,
    /// The type of service it is for.
    pub tos: u8,
    /// What becomes of the packets: `FR_ACT_...`.
    pub action: u8,
    /// For all packets but those it names.
    pub is_inverted: bool,
    /// `FRA_...` numbers and values, by number: the table, the priority, and what it is for.
    pub attributes: Vec<(u16, Vec<u8>)>,
}

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const FRA_PRIORITY: u16 = 6;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_PAD: u16 = 18;
const FRA_PROTOCOL: u16 = 21;
const RTPROT_KERNEL: u8 = 2;
/// The other flags tell how the rule fares.
const FIB_RULE_INVERT: u32 = 2;

/// `struct fib_rule_hdr`.
const STRUCTURE_BYTES: usize = 12;

impl Connection {
    /// All rules of the namespace, of both families. A kernel without such rules, or without a family,
    /// has none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rules(&mut self) -> io::Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = |flags| {
                let mut structure = [0; STRUCTURE_BYTES];
                structure[0] = family;
                Request::new(RTM_GETRULE, flags, &structure)
            };
            match self.dump(request, Rule::parse) {
                Err(error) if is_without_rules(&error) => {}
                found => rules.extend(found?),
            }
        }
        Ok(rules)
    }

    /// Adds a rule behind those of its priority. The same one there already is an error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_rule(&mut self, rule: &Rule) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.call(RTM_NEWRULE, flags, &|kind, flags| rule.request(kind, flags))
    }

    /// Removes a rule.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_rule(&mut self, rule: &Rule) -> io::Result<()> {
        self.call(RTM_DELRULE, 0, &|kind, flags| rule.request(kind, flags))
    }
}

fn is_without_rules(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    [Errno::AFNOSUPPORT, Errno::OPNOTSUPP]
        .iter()
        .any(|none| errno == Some(none.raw_os_error()))
}

impl Rule {
    /// Whether it is one that the kernel has made by itself.
    #[must_use]
    pub fn is_of_the_kernel(&self) -> bool {
        self.attribute(FRA_PROTOCOL) == Some(&[RTPROT_KERNEL])
    }

    fn attribute(&self, wanted: u16) -> Option<&[u8]> {
        let found = self.attributes.iter().find(|(kind, _)| *kind == wanted);
        found.map(|(_, value)| value.as_slice())
    }

    fn request(&self, kind: u16, flags: u16) -> Request {
        let mut structure = [0; STRUCTURE_BYTES];
        structure[0] = if self.is_ipv6 { AF_INET6 } else { AF_INET };
        structure[1] = self.destination_length;
        structure[2] = self.source_length;
        structure[3] = self.tos;
        structure[7] = self.action;
        let inverted = if self.is_inverted { FIB_RULE_INVERT } else { 0 };
        structure[8..].copy_from_slice(&inverted.to_ne_bytes());
        let add =
            |request: Request, (kind, value): &(u16, Vec<u8>)| request.attribute(*kind, value);
        let request = Request::new(kind, flags, &structure);
        self.attributes.iter().fold(request, add)
    }

    fn parse(message: Message<'_>) -> Option<Self> {
        let payload = message.payload;
        if message.kind != RTM_NEWRULE {
            return None;
        }
        let mut rule = Self {
            is_ipv6: match u8_at(payload, 0)? {
                AF_INET => false,
                AF_INET6 => true,
                _ => return None,
            },
            destination_length: u8_at(payload, 1)?,
            source_length: u8_at(payload, 2)?,
            tos: u8_at(payload, 3)?,
            action: u8_at(payload, 7)?,
            is_inverted: u32_at(payload, 8)? & FIB_RULE_INVERT != 0,
            attributes: Vec::new(),
        };
        let table = u32::from(u8_at(payload, 4)?);
        for (kind, value) in Attributes::after(payload, STRUCTURE_BYTES) {
            // Told of every rule that suppresses nothing.
            let says_nothing = kind == FRA_SUPPRESS_PREFIXLEN && u32_at(value, 0) == Some(u32::MAX);
            if kind != FRA_PAD && !says_nothing {
                rule.attributes.push((kind, value.to_vec()));
            }
        }
        // The kernel does not tell of a zero, and chooses itself where it is not told of one.
        for (kind, value) in [(FRA_PRIORITY, 0), (FRA_TABLE, table)] {
            if rule.attribute(kind).is_none() {
                rule.attributes.push((kind, value.to_ne_bytes().to_vec()));
            }
        }
        rule.attributes.sort_unstable();
        Some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Messages;

    fn parsed(request: Request) -> Option<Rule> {
        let bytes = request.into_bytes(1);
        Rule::parse(Messages { rest: &bytes }.next().unwrap().unwrap())
    }

    fn rule() -> Rule {
        Rule {
            is_ipv6: true,
            destination_length: 8,
            source_length: 128,
            tos: 4,
            action: 1,
            is_inverted: true,
            attributes: vec![
                (2, vec![1; 16]),
                (3, b"eth0\0".to_vec()),
                (FRA_PRIORITY, 100_u32.to_ne_bytes().to_vec()),
                (FRA_TABLE, 1000_u32.to_ne_bytes().to_vec()),
                (FRA_PROTOCOL, vec![3]),
            ],
        }
    }

    #[test]
    fn everything_of_a_rule_comes_back() {
        assert_eq!(parsed(rule().request(RTM_NEWRULE, 0)), Some(rule()));
    }

    #[test]
    fn what_says_nothing_is_left_out_and_a_zero_is_said() {
        let mut bytes = [0; STRUCTURE_BYTES];
        (bytes[0], bytes[4], bytes[7]) = (AF_INET, 255, 1);
        // That an interface of it is not there says how it fares.
        bytes[8] = 8;
        let request = Request::new(RTM_NEWRULE, 0, &bytes)
            .number(FRA_SUPPRESS_PREFIXLEN, u32::MAX)
            .attribute(FRA_PAD, &[])
            .attribute(FRA_PROTOCOL, &[RTPROT_KERNEL]);

        let rule = parsed(request).unwrap();

        let number = |value: u32| value.to_ne_bytes().to_vec();
        let expected = [
            (FRA_PRIORITY, number(0)),
            (FRA_TABLE, number(255)),
            (FRA_PROTOCOL, vec![RTPROT_KERNEL]),
        ];
        assert_eq!(rule.attributes, expected);
        assert!(!rule.is_inverted && rule.is_of_the_kernel());
    }

    #[test]
    fn what_is_cut_or_of_another_family_is_no_rule() {
        let cut = Request::new(RTM_NEWRULE, 0, &[AF_INET, 0, 0, 0]);
        assert_eq!(parsed(cut), None);
        let other = Request::new(RTM_NEWRULE, 0, &[7; STRUCTURE_BYTES]);
        assert_eq!(parsed(other), None);
    }
}
