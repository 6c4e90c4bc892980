//! The pod's network: what the host has read in the pod's network namespace, set here.
//!
//! The guest has a network device for each interface of that namespace. Everything about an interface
//! is set as it is there, down to the routes that the kernel would make by itself, so that none is
//! there too many. What containers change themselves is left alone: a later call changes only what
//! an earlier one has made.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use husk_netlink::{Address, Connection, Hop, Link, LinkChange, Mac, Neighbour, Route};
use husk_protocol::messages as m;
use rustix::io::Errno;

use crate::slots::Slots;

/// The interface that every guest has.
const LOOPBACK_NAME: &str = "lo";

/// Why the network is not as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The request makes no sense.
    #[error("the network is not one: {0}")]
    Invalid(String),
    /// The kernel refused something.
    #[error("cannot {what}")]
    Step {
        /// The step, and what it was about.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// What was set, to be able to change it.
#[derive(Debug, Default)]
pub struct Network {
    slots: Option<Slots>,
    set: Wanted,
}

/// A request, understood.
#[derive(Debug, Default)]
struct Wanted {
    links: Vec<WantedLink>,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

#[derive(Debug)]
struct WantedLink {
    index: u32,
    name: String,
    mac: Mac,
    mtu: u32,
    is_up: bool,
}

impl Network {
    /// Makes the network look as said. The machine has so many slots for disks.
    pub fn configure(
        &mut self,
        request: &m::ConfigureNetworkRequest,
        disks: usize,
    ) -> Result<(), NetworkError> {
        let mut connection =
            Connection::open().map_err(step(|| "open a netlink socket".to_owned()))?;
        let slots = match self.slots.take() {
            Some(slots) => slots,
            None => Slots::of_interfaces(disks)
                .map_err(step(|| "look for network devices".to_owned()))?,
        };
        let devices = drive(self.slots.insert(slots), request)?;
        let links = list(&mut connection)?;
        let lo = links.iter().find(|link| link.name == LOOPBACK_NAME);
        let wanted = Wanted::parse(request, &devices, lo.map(|lo| lo.index))?;
        self.remove_old(&mut connection, &wanted);
        self.add_new(&mut connection, &links, wanted)
    }

    /// Removes what was set and is not wanted any more. What is gone already is as good.
    fn remove_old(&mut self, connection: &mut Connection, wanted: &Wanted) {
        for neighbour in old(&self.set.neighbours, &wanted.neighbours) {
            let _ = connection.remove_neighbour(neighbour);
        }
        for route in old(&self.set.routes, &wanted.routes) {
            let _ = connection.remove_route(route);
        }
        for address in old(&self.set.addresses, &wanted.addresses) {
            let _ = connection.remove_address(address);
        }
        self.set
            .neighbours
            .retain(|one| wanted.neighbours.contains(one));
        self.set.routes.retain(|one| wanted.routes.contains(one));
        self.set
            .addresses
            .retain(|one| wanted.addresses.contains(one));
    }

    /// Writes down what was set as it is, so that what fails is tried again.
    fn add_new(
        &mut self,
        connection: &mut Connection,
        links: &[Link],
        wanted: Wanted,
    ) -> Result<(), NetworkError> {
        free_names(connection, links, &wanted)?;
        for link in &wanted.links {
            change(connection, links, link)?;
        }
        self.set.links = wanted.links;
        for address in new(wanted.addresses, &self.set.addresses) {
            connection.add_address(&address).map_err(step(|| {
                let (address, length) = (address.address, address.prefix_length);
                format!("add the address {address}/{length}")
            }))?;
            self.set.addresses.push(address);
        }
        for link in &self.set.links {
            let change = LinkChange {
                is_up: Some(link.is_up),
                ..LinkChange::default()
            };
            connection
                .change_link(link.index, &change)
                .map_err(step(|| format!("bring {} up", link.name)))?;
        }
        // The way to a router must be there before a route that leads to the router.
        let (through, direct): (Vec<_>, Vec<_>) = new(wanted.routes, &self.set.routes)
            .into_iter()
            .partition(|route| route.hops.iter().any(|hop| hop.gateway.is_some()));
        for route in direct.into_iter().chain(through) {
            match connection.add_route(&route) {
                Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
                added => added.map_err(step(|| {
                    let (destination, length) = (route.destination, route.prefix_length);
                    format!("add the route to {destination}/{length}")
                }))?,
            }
            self.set.routes.push(route);
        }
        for neighbour in new(wanted.neighbours, &self.set.neighbours) {
            connection
                .add_neighbour(&neighbour)
                .map_err(step(|| format!("add the neighbour {}", neighbour.address)))?;
            self.set.neighbours.push(neighbour);
        }
        Ok(())
    }
}

/// Those of `wanted` that are not among `others`.
fn new<T: PartialEq>(mut wanted: Vec<T>, others: &[T]) -> Vec<T> {
    wanted.retain(|one| !others.contains(one));
    wanted
}

/// Those of `all` that are not among `others`.
fn old<'a, T: PartialEq>(all: &'a [T], others: &'a [T]) -> impl Iterator<Item = &'a T> {
    all.iter().filter(|one| !others.contains(one))
}

fn list(connection: &mut Connection) -> Result<Vec<Link>, NetworkError> {
    let links = connection.links();
    links.map_err(step(|| "list the interfaces".to_owned()))
}

/// Makes the kernel drive the devices that are asked for, and no others. Returns the indices of their
/// interfaces, by device.
fn drive(
    slots: &Slots,
    request: &m::ConfigureNetworkRequest,
) -> Result<Vec<Option<u32>>, NetworkError> {
    let is_wanted = |slot| {
        let wanted = |it: &m::Interface| usize::try_from(it.device) == Ok(slot);
        request.interfaces.iter().any(wanted)
    };
    let drive = |slot| match is_wanted(slot) {
        true => slots
            .drive(slot)
            .and_then(|shown| index_of(&shown))
            .map(Some),
        false => slots.let_go(slot).map(|()| None),
    };
    (0..slots.count())
        .map(|slot| drive(slot).map_err(step(|| format!("switch network device {slot}"))))
        .collect()
}

/// The index of an interface that the kernel shows in a directory.
fn index_of(shown: &Path) -> io::Result<u32> {
    let index = fs::read_to_string(shown.join("ifindex"))?;
    let index = index.trim().parse();
    index.map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Gives the interfaces that are to be renamed names that none of them is to have.
fn free_names(
    connection: &mut Connection,
    links: &[Link],
    wanted: &Wanted,
) -> Result<(), NetworkError> {
    for link in links {
        let is_taken = |wanted: &WantedLink| wanted.name == link.name && wanted.index != link.index;
        if wanted.links.iter().any(is_taken) {
            let name = format!("husk{}", link.index);
            let change = LinkChange {
                name: Some(&name),
                ..LinkChange::default()
            };
            connection
                .change_link(link.index, &change)
                .map_err(step(|| format!("rename {} to {name}", link.name)))?;
        }
    }
    Ok(())
}

/// Sets all of an interface but its addresses and whether it is up.
fn change(
    connection: &mut Connection,
    links: &[Link],
    wanted: &WantedLink,
) -> Result<(), NetworkError> {
    let now = links.iter().find(|link| link.index == wanted.index);
    let change = LinkChange {
        // It may have been renamed just now.
        name: Some(&wanted.name),
        mac: (now.and_then(|link| link.mac) != Some(wanted.mac)).then_some(wanted.mac),
        mtu: (now.map(|link| link.mtu) != Some(wanted.mtu)).then_some(wanted.mtu),
        is_up: None,
        // It gets the one of the pod's namespace, if there is one.
        has_no_link_local: true,
    };
    let changed = connection.change_link(wanted.index, &change);
    changed.map_err(step(|| {
        let WantedLink { name, mtu, .. } = wanted;
        format!("set up the interface {name} with an MTU of {mtu}")
    }))
}

fn step(what: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Step {
        what: what(),
        source,
    }
}

impl Wanted {
    fn parse(
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
        Ok(wanted)
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
