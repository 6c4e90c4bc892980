//! Routes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::connection::{Connection, NLM_F_APPEND, NLM_F_CREATE};
use crate::message::{
    AF_INET, AF_INET6, Attributes, Message, Request, address_of, family_of, octets, u8_at, u16_at,
    u32_at,
};

/// A route. The numbers are those of rtnetlink(7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads; the unspecified address and no bits: anywhere.
    pub destination: IpAddr,
    /// How many bits of it count.
    pub prefix_length: u8,
    /// `RT_TABLE_...`
    pub table: u32,
    /// Who has made it: `RTPROT_...`.
    pub protocol: u8,
    /// `RT_SCOPE_...`
    pub scope: u8,
    /// `RTN_...`: unicast, blackhole, unreachable ...
    pub kind: u8,
    /// The type of service it is for.
    pub tos: u8,
    /// Of several routes the one with the least is taken.
    pub metric: Option<u32>,
    /// The address that packets are sent from.
    pub source: Option<IpAddr>,
    /// `RTAX_...` numbers and values: MTU, advertised segment size ...
    pub metrics: Vec<(u16, u32)>,
    /// Whereto the packets go. Blackholes have none.
    pub hops: Vec<Hop>,
}

/// Whereto packets of a route go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hop {
    /// [`Link::index`](crate::Link::index), zero for none.
    pub link: u32,
    /// The router; none: the destination is a neighbour.
    pub gateway: Option<IpAddr>,
    /// The router is a neighbour even if no route says so.
    pub is_on_link: bool,
    /// How much of the traffic it gets, counted from zero.
    pub weight: u8,
}

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
/// The one metric that is no number.
const RTAX_CC_ALGO: u16 = 16;
const RTNH_F_ONLINK: u8 = 4;
/// A cached answer, not an entry.
const RTM_F_CLONED: u32 = 0x200;

/// `struct rtmsg`.
const STRUCTURE_BYTES: usize = 12;
/// `struct rtnexthop`.
const HOP_BYTES: usize = 8;

impl Connection {
    /// All routes of the namespace, of both families and in all tables.
    ///
    /// # Errors
    /// The kernel's.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = |flags| {
                let mut structure = [0; STRUCTURE_BYTES];
                structure[0] = family;
                Request::new(RTM_GETROUTE, flags, &structure)
            };
            routes.extend(self.dump(request, Route::parse)?);
        }
        Ok(routes)
    }

    /// Adds a route behind those that are as good.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_route(&mut self, route: &Route) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.call(RTM_NEWROUTE, flags, &|kind, flags| {
            route.request(kind, flags)
        })
    }

    /// Removes a route.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_route(&mut self, route: &Route) -> io::Result<()> {
        self.call(RTM_DELROUTE, 0, &|kind, flags| route.request(kind, flags))
    }
}

impl Route {
    fn request(&self, kind: u16, flags: u16) -> Request {
        let mut structure = [0; STRUCTURE_BYTES];
        structure[0] = family_of(self.destination);
        structure[1] = self.prefix_length;
        structure[3] = self.tos;
        structure[5] = self.protocol;
        structure[6] = self.scope;
        structure[7] = self.kind;
        if let [hop] = self.hops.as_slice() {
            structure[8] = hop.flags();
        }
        let mut request = Request::new(kind, flags, &structure).number(RTA_TABLE, self.table);
        if self.prefix_length > 0 {
            request = request.address(RTA_DST, self.destination);
        }
        if let Some(metric) = self.metric {
            request = request.number(RTA_PRIORITY, metric);
        }
        if let Some(source) = self.source {
            request = request.address(RTA_PREFSRC, source);
        }
        if !self.metrics.is_empty() {
            request = request.nest(RTA_METRICS, |request| {
                let add =
                    |request: Request, (kind, value): &(u16, u32)| request.number(*kind, *value);
                self.metrics.iter().fold(request, add)
            });
        }
        match self.hops.as_slice() {
            [] => request,
            [hop] => {
                if hop.link != 0 {
                    request = request.number(RTA_OIF, hop.link);
                }
                hop.add_gateway(request, self.destination)
            }
            hops => request.nest(RTA_MULTIPATH, |request| {
                hops.iter().fold(request, |request, hop| {
                    let [a, b, c, d] = hop.link.to_ne_bytes();
                    let rest = [hop.flags(), hop.weight, a, b, c, d];
                    request.next_hop(rest, |request| hop.add_gateway(request, self.destination))
                })
            }),
        }
    }

    fn parse(message: Message<'_>) -> Option<Self> {
        let payload = message.payload;
        let is_entry = u32_at(payload, 8)? & RTM_F_CLONED == 0;
        if message.kind != RTM_NEWROUTE || !is_entry {
            return None;
        }
        let any: IpAddr = match u8_at(payload, 0)? {
            AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut route = Self {
            destination: any,
            prefix_length: u8_at(payload, 1)?,
            tos: u8_at(payload, 3)?,
            table: u8_at(payload, 4)?.into(),
            protocol: u8_at(payload, 5)?,
            scope: u8_at(payload, 6)?,
            kind: u8_at(payload, 7)?,
            metric: None,
            source: None,
            metrics: Vec::new(),
            hops: Vec::new(),
        };
        let mut hop = Hop {
            is_on_link: u8_at(payload, 8)? & RTNH_F_ONLINK != 0,
            ..Hop::default()
        };
        for (kind, value) in Attributes::after(payload, STRUCTURE_BYTES) {
            match kind {
                RTA_DST => route.destination = address_of(value)?,
                RTA_TABLE => route.table = u32_at(value, 0)?,
                RTA_PRIORITY => route.metric = u32_at(value, 0),
                RTA_PREFSRC => route.source = address_of(value),
                RTA_METRICS => route.metrics = metrics_of(value),
                RTA_OIF => hop.link = u32_at(value, 0)?,
                RTA_GATEWAY => hop.gateway = address_of(value),
                RTA_VIA => hop.gateway = via_of(value),
                RTA_MULTIPATH => route.hops = hops_of(value),
                _ => {}
            }
        }
        if route.hops.is_empty() && (hop.link != 0 || hop.gateway.is_some()) {
            route.hops.push(hop);
        }
        Some(route)
    }
}

impl Hop {
    fn flags(&self) -> u8 {
        if self.is_on_link { RTNH_F_ONLINK } else { 0 }
    }

    fn add_gateway(&self, request: Request, destination: IpAddr) -> Request {
        match self.gateway {
            None => request,
            Some(gateway) if family_of(gateway) == family_of(destination) => {
                request.address(RTA_GATEWAY, gateway)
            }
            Some(gateway) => {
                let mut via = u16::from(family_of(gateway)).to_ne_bytes().to_vec();
                via.extend(octets(gateway));
                request.attribute(RTA_VIA, &via)
            }
        }
    }
}

fn metrics_of(value: &[u8]) -> Vec<(u16, u32)> {
    Attributes::after(value, 0)
        .filter(|(kind, _)| *kind != RTAX_CC_ALGO)
        .filter_map(|(kind, value)| Some((kind, u32_at(value, 0)?)))
        .collect()
}

/// `struct rtvia`: a family and an address.
fn via_of(value: &[u8]) -> Option<IpAddr> {
    address_of(value.get(2..)?)
}

fn hops_of(mut rest: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while let Some((hop, length)) = hop_of(rest) {
        hops.push(hop);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

fn hop_of(bytes: &[u8]) -> Option<(Hop, usize)> {
    let length = usize::from(u16_at(bytes, 0)?);
    let mut hop = Hop {
        is_on_link: u8_at(bytes, 2)? & RTNH_F_ONLINK != 0,
        weight: u8_at(bytes, 3)?,
        link: u32_at(bytes, 4)?,
        gateway: None,
    };
    for (kind, value) in Attributes::after(bytes.get(..length)?, HOP_BYTES) {
        match kind {
            RTA_GATEWAY => hop.gateway = address_of(value),
            RTA_VIA => hop.gateway = via_of(value),
            _ => {}
        }
    }
    // Shorter ones would be met again and again.
    (length >= HOP_BYTES).then_some((hop, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Messages;

    fn round_trip(route: &Route) -> Option<Route> {
        let bytes = route.request(RTM_NEWROUTE, 0).into_bytes(1);
        let message = Messages { rest: &bytes }.next().unwrap().unwrap();
        Route::parse(message)
    }

    fn route() -> Route {
        Route {
            destination: Ipv4Addr::new(10, 1, 0, 0).into(),
            prefix_length: 16,
            table: 1000,
            protocol: 3,
            scope: 253,
            kind: 1,
            tos: 4,
            metric: Some(50),
            source: Some(Ipv4Addr::new(10, 2, 0, 9).into()),
            metrics: vec![(2, 1400)],
            hops: vec![Hop {
                link: 2,
                gateway: Some(Ipv4Addr::new(169, 254, 1, 1).into()),
                is_on_link: true,
                weight: 0,
            }],
        }
    }

    #[test]
    fn everything_of_a_route_comes_back() {
        assert_eq!(round_trip(&route()), Some(route()));
    }

    #[test]
    fn several_hops_and_a_gateway_of_the_other_family_come_back() {
        let mut route = route();
        route.hops.push(Hop {
            link: 3,
            gateway: Some("fe80::1".parse().unwrap()),
            is_on_link: false,
            weight: 9,
        });
        assert_eq!(round_trip(&route), Some(route));
    }

    #[test]
    fn blackhole_by_default_has_no_hop() {
        let route = Route {
            destination: Ipv6Addr::UNSPECIFIED.into(),
            prefix_length: 0,
            kind: 6,
            source: None,
            hops: Vec::new(),
            ..route()
        };
        assert_eq!(round_trip(&route), Some(route));
    }

    #[test]
    fn garbled_hops_end_the_list() {
        for bad in [&[0; 8][..], &[8, 0, 0], &[40, 0, 0, 0, 1, 0, 0, 0]] {
            assert!(hops_of(bad).is_empty(), "{bad:?}");
        }
    }
}
