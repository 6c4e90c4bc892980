//! What the agent is told of the network.

use std::net::IpAddr;

use husk_netlink::{Address, Hop, Link, Route, Rule};
use husk_protocol::messages as m;

use super::Survey;

/// The message; `device_of` tells which device of the machine an interface has.
pub(crate) fn request(
    survey: &Survey,
    device_of: impl Fn(u32) -> Option<usize>,
) -> m::ConfigureNetworkRequest {
    let mut request = m::ConfigureNetworkRequest::new();
    for link in &survey.links {
        if let Some(device) = device_of(link.index) {
            request.interfaces.push(interface(link, device, survey));
        }
    }
    let name_of = |index: u32| {
        let has_device = |link: &&Link| link.index == index && device_of(index).is_some();
        survey.links.iter().find(has_device).map(|link| &link.name)
    };
    for known in &survey.routes {
        request.routes.extend(route(known, name_of));
    }
    for known in &survey.neighbours {
        if let Some(name) = name_of(known.link) {
            let mut neighbour = m::Neighbour::new();
            neighbour.interface.clone_from(name);
            neighbour.address = octets(known.address);
            neighbour.mac = known.mac.to_vec();
            request.neighbours.push(neighbour);
        }
    }
    request.rules = survey.rules.iter().map(rule).collect();
    request
}

fn interface(link: &Link, device: usize, survey: &Survey) -> m::Interface {
    let mut interface = m::Interface::new();
    interface.device = u32::try_from(device).unwrap_or(u32::MAX);
    interface.name.clone_from(&link.name);
    interface.mac = link.mac.unwrap_or_default().to_vec();
    interface.mtu = link.mtu;
    interface.up = link.is_up;
    let own = survey.addresses.iter();
    let own = own.filter(|address| address.link == link.index);
    interface.addresses = own.map(address).collect();
    interface
}

fn address(known: &Address) -> m::InterfaceAddress {
    let mut address = m::InterfaceAddress::new();
    address.address = octets(known.address);
    address.prefix_length = known.prefix_length.into();
    address.peer = known.peer.map(octets).unwrap_or_default();
    let broadcast = known.broadcast.map(IpAddr::from);
    address.broadcast = broadcast.map(octets).unwrap_or_default();
    address.scope = known.scope.into();
    address
}

/// None if it leads to an interface that the guest has not.
fn route<'a>(known: &Route, name_of: impl Fn(u32) -> Option<&'a String>) -> Option<m::Route> {
    let mut route = m::Route::new();
    route.destination = octets(known.destination);
    route.prefix_length = known.prefix_length.into();
    route.table = known.table;
    route.protocol = known.protocol.into();
    route.scope = known.scope.into();
    route.kind = known.kind.into();
    route.tos = known.tos.into();
    route.metric = known.metric;
    route.source = known.source.map(octets).unwrap_or_default();
    for (kind, value) in &known.metrics {
        let mut metric = m::RouteMetric::new();
        (metric.kind, metric.value) = ((*kind).into(), *value);
        route.metrics.push(metric);
    }
    for known in &known.hops {
        route.hops.push(hop(known, name_of(known.link)?));
    }
    Some(route)
}

fn hop(known: &Hop, name: &str) -> m::Hop {
    let mut hop = m::Hop::new();
    name.clone_into(&mut hop.interface);
    hop.gateway = known.gateway.map(octets).unwrap_or_default();
    hop.on_link = known.is_on_link;
    hop.weight = known.weight.into();
    hop
}

fn rule(known: &Rule) -> m::Rule {
    let mut rule = m::Rule::new();
    rule.ipv6 = known.is_ipv6;
    rule.destination_length = known.destination_length.into();
    rule.source_length = known.source_length.into();
    rule.tos = known.tos.into();
    rule.action = known.action.into();
    rule.inverted = known.is_inverted;
    for (kind, value) in &known.attributes {
        let mut attribute = m::RuleAttribute::new();
        (attribute.kind, attribute.value) = ((*kind).into(), value.clone());
        rule.attributes.push(attribute);
    }
    rule
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
