//! The pod's network: what the host has read in the pod's network namespace, set here.
//!
//! The guest has a network device for each interface of that namespace. Everything about an interface
//! is set as it is there, down to the routes that the kernel would make by itself, so that none is
//! there too many. What containers change themselves is left alone: a later call changes only what
//! an earlier one has made.

mod wanted;

use std::fs;
use std::io;
use std::path::Path;

use husk_netlink::{Connection, Link, LinkChange, Rule};
use husk_protocol::messages as m;
use rustix::io::Errno;

use self::wanted::{Wanted, WantedLink};
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
            None => {
                self.set.rules = rules_of_the_kernel(&mut connection)?;
                Slots::of_interfaces(disks)
                    .map_err(step(|| "look for network devices".to_owned()))?
            }
        };
        let devices = drive(self.slots.insert(slots), request)?;
        let links = list(&mut connection)?;
        let lo = links.iter().find(|link| link.name == LOOPBACK_NAME);
        let mut wanted = Wanted::parse(request, &devices, lo.map(|lo| lo.index))?;
        wanted.keep_rules(&self.set.rules);
        self.remove_old(&mut connection, &wanted);
        self.add_new(&mut connection, &links, wanted)
    }

    /// Removes what was set and is not wanted any more. What is gone already is as good.
    fn remove_old(&mut self, connection: &mut Connection, wanted: &Wanted) {
        for neighbour in old(&self.set.neighbours, &wanted.neighbours) {
            let _ = connection.remove_neighbour(neighbour);
        }
        for rule in old(&self.set.rules, &wanted.rules) {
            let _ = connection.remove_rule(rule);
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
        self.set.rules.retain(|one| wanted.rules.contains(one));
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
        for rule in new(wanted.rules, &self.set.rules) {
            match connection.add_rule(&rule) {
                Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
                added => added.map_err(step(|| format!("add the routing rule {rule:?}")))?,
            }
            self.set.rules.push(rule);
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

/// Those that are there before anybody has set one, and so may be taken away.
fn rules_of_the_kernel(connection: &mut Connection) -> Result<Vec<Rule>, NetworkError> {
    let rules = connection.rules();
    let mut rules = rules.map_err(step(|| "list the routing rules".to_owned()))?;
    rules.retain(Rule::is_of_the_kernel);
    Ok(rules)
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
