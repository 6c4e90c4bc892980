//! A request to change the network, understood.

use std::net::IpAddr;

use husk_netlink::{Address, Hop, Mac, Neighbour, Route, Rule};
use husk_protocol::messages as m;

use super::{LOOPBACK_NAME, NetworkError};

/// What the network is to be.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) links: Vec<WantedLink>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug)]
pub(super) struct WantedLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    pub(super) is_up: bool,
}

impl Wanted {
    pub(super) fn parse(
        request: &m::ConfigureNetworkRequest,
        devices: &[Option<u32>],
        lo: Option<u32>,
    ) -> Result<Self, NetworkError> {
        let mut wanted = Self::default();
        for interface in &request.interfaces {
            let link = WantedLink::parse(interface, devices)?;
            for address in &interface.addresses {
                wanted.addresses.push(address_of(address, link.index)?);
            }
            wanted.links.push(link);
        }
        let index_of = |name: &str| {
            let named = wanted.links.iter().find(|link| link.name == name);
            let index = named.map(|link| link.index);
            index
                .or(lo.filter(|_| name == LOOPBACK_NAME))
                .ok_or_else(|| invalid(format!("there is no interface {name:?}")))
        };
        for route in &request.routes {
            wanted.routes.push(route_of(route, index_of)?);
        }
        for neighbour in &request.neighbours {
            wanted.neighbours.push(Neighbour {
                link: index_of(&neighbour.interface)?,
                address: required_ip(&neighbour.address)?,
                mac: mac_of(&neighbour.mac)?,
            });
        }
        wanted.rules = request
            .rules
            .iter()
            .map(rule_of)
            .collect::<Result<_, _>>()?;
        Ok(wanted)
    }

    /// Wants those of a family as they are `now` if it has none of the family: a namespace without
    /// rules finds no route, but a host may know no rules, or no IPv6.
    pub(super) fn keep_rules(&mut self, now: &[Rule]) {
        for is_ipv6 in [false, true] {
            let is_of_it = |rule: &&Rule| rule.is_ipv6 == is_ipv6;
            if self.rules.iter().find(is_of_it).is_none() {
                self.rules.extend(now.iter().filter(is_of_it).cloned());
            }
        }
    }
}

impl WantedLink {
    fn parse(interface: &m::Interface, devices: &[Option<u32>]) -> Result<Self, NetworkError> {
        let number = interface.device;
        let device = usize::try_from(number).ok();
        let index = device.and_then(|device| devices.get(device));
        let name = &interface.name;
        Ok(Self {
            index: index.copied().flatten().ok_or_else(|| {
                let count = devices.len();
                invalid(format!("{name:?} is to be device {number} of {count}"))
            })?,
            name: name.clone(),
            mac: mac_of(&interface.mac)?,
            mtu: interface.mtu,
            is_up: interface.up,
        })
    }
}

fn address_of(address: &m::InterfaceAddress, link: u32) -> Result<Address, NetworkError> {
    Ok(Address {
        link,
        address: required_ip(&address.address)?,
        prefix_length: byte(address.prefix_length)?,
        peer: ip(&address.peer)?,
        broadcast: match ip(&address.broadcast)? {
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            _ => None,
        },
        scope: byte(address.scope)?,
        is_permanent: true,
    })
}

fn route_of(
    route: &m::Route,
    index_of: impl Fn(&str) -> Result<u32, NetworkError>,
) -> Result<Route, NetworkError> {
    let hop = |hop: &m::Hop| {
        Ok(Hop {
            link: index_of(&hop.interface)?,
            gateway: ip(&hop.gateway)?,
            is_on_link: hop.on_link,
            weight: byte(hop.weight)?,
        })
    };
    let metric = |metric: &m::RouteMetric| match u16::try_from(metric.kind) {
        Ok(kind) => Ok((kind, metric.value)),
        Err(_) => Err(invalid(format!("{} is no metric", metric.kind))),
    };
    Ok(Route {
        destination: required_ip(&route.destination)?,
        prefix_length: byte(route.prefix_length)?,
        table: route.table,
        protocol: byte(route.protocol)?,
        scope: byte(route.scope)?,
        kind: byte(route.kind)?,
        tos: byte(route.tos)?,
        metric: route.metric,
        source: ip(&route.source)?,
        metrics: route.metrics.iter().map(metric).collect::<Result<_, _>>()?,
        hops: route.hops.iter().map(hop).collect::<Result<_, _>>()?,
    })
}

fn rule_of(rule: &m::Rule) -> Result<Rule, NetworkError> {
    /// Longest value: an interface's name, or an IPv6 address.
    const VALUE_BYTES_MAX: usize = 64;
    let attribute = |attribute: &m::RuleAttribute| {
        let length = attribute.value.len();
        match u16::try_from(attribute.kind) {
            Ok(kind) if length <= VALUE_BYTES_MAX => Ok((kind, attribute.value.clone())),
            Ok(kind) => Err(invalid(format!(
                "attribute {kind} of a rule has {length} bytes"
            ))),
            Err(_) => Err(invalid(format!(
                "{} is no attribute of a rule",
                attribute.kind
            ))),
        }
    };
    Ok(Rule {
        is_ipv6: rule.ipv6,
        destination_length: byte(rule.destination_length)?,
        source_length: byte(rule.source_length)?,
        tos: byte(rule.tos)?,
        action: byte(rule.action)?,
        is_inverted: rule.inverted,
        attributes: rule
            .attributes
            .iter()
            .map(attribute)
            .collect::<Result<_, _>>()?,
    })
}

fn required_ip(bytes: &[u8]) -> Result<IpAddr, NetworkError> {
    ip(bytes)?.ok_or_else(|| invalid("an address is missing".to_owned()))
}

fn ip(bytes: &[u8]) -> Result<Option<IpAddr>, NetworkError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or(v6)
        .map(Some)
        .map_err(|_| invalid(format!("an address has {} bytes", bytes.len())))
}

fn mac_of(bytes: &[u8]) -> Result<Mac, NetworkError> {
    bytes
        .try_into()
        .map_err(|_| invalid(format!("an Ethernet address has {} bytes", bytes.len())))
}

fn byte(number: u32) -> Result<u8, NetworkError> {
    u8::try_from(number).map_err(|_| invalid(format!("{number} is more than 255")))
}

fn invalid(what: String) -> NetworkError {
    NetworkError::Invalid(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> m::Interface {
        m::Interface {
            device: 1,
            name: "eth0".to_owned(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            up: true,
            ..m::Interface::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut m::ConfigureNetworkRequest)) -> String {
        let mut request = m::ConfigureNetworkRequest {
            interfaces: vec![interface()],
            ..m::ConfigureNetworkRequest::default()
        };
        change(&mut request);
        Wanted::parse(&request, &[Some(7), Some(9)], Some(1))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let address = |address: Vec<u8>, prefix_length| m::InterfaceAddress {
            address,
            prefix_length,
            ..m::InterfaceAddress::default()
        };
        let route = |interface: &str| m::Route {
            destination: vec![0; 4],
            hops: vec![m::Hop {
                interface: interface.to_owned(),
                ..m::Hop::default()
            }],
            ..m::Route::default()
        };
        assert!(refusal(|r| r.interfaces[0].device = 2).contains("device 2 of 2"));
        assert!(refusal(|r| r.interfaces[0].mac = vec![0; 7]).contains("7 bytes"));
        let bad = |address| refusal(|r| r.interfaces[0].addresses.push(address));
        assert!(bad(address(vec![], 8)).contains("missing"));
        assert!(bad(address(vec![1; 5], 8)).contains("5 bytes"));
        assert!(bad(address(vec![1; 4], 300)).contains("300"));
        assert!(refusal(|r| r.routes.push(route("eth9"))).contains("eth9"));
        let rule = |kind, length| m::Rule {
            attributes: vec![m::RuleAttribute {
                kind,
                value: vec![0; length],
                ..m::RuleAttribute::default()
            }],
            ..m::Rule::default()
        };
        assert!(refusal(|r| r.rules.push(rule(6, 70_000))).contains("70000 bytes"));
        assert!(refusal(|r| r.rules.push(rule(70_000, 4))).contains("70000 is no"));
    }

    #[test]
    fn rules_of_a_family_that_the_host_does_not_tell_of_stay() {
        let rule = |is_ipv6, tos| Rule {
            is_ipv6,
            destination_length: 0,
            source_length: 0,
            tos,
            action: 1,
            is_inverted: false,
            attributes: Vec::new(),
        };
        let mut wanted = Wanted {
            rules: vec![rule(false, 4)],
            ..Wanted::default()
        };

        wanted.keep_rules(&[rule(false, 0), rule(true, 0)]);

        assert_eq!(wanted.rules, [rule(false, 4), rule(true, 0)]);
    }

    #[test]
    fn interfaces_are_found_by_their_device() {
        let mut request = m::ConfigureNetworkRequest::default();
        request.interfaces.push(interface());
        for name in ["eth0", "lo"] {
            request.neighbours.push(m::Neighbour {
                interface: name.to_owned(),
                address: vec![10, 0, 0, 1],
                mac: vec![0; 6],
                ..m::Neighbour::default()
            });
        }

        let wanted = Wanted::parse(&request, &[None, Some(9)], Some(1)).unwrap();

        let links: Vec<_> = wanted.neighbours.iter().map(|one| one.link).collect();
        assert_eq!((wanted.links[0].index, links), (9, vec![9, 1]));
    }
}
