//! The pod's network: from the interfaces in its network namespace to the guest's.
//!
//! The namespace stays what whoever has made it wants it to be. Each interface in it gets a tap beside
//! it, and the kernel passes what comes in at either one on to the other: the tap's descriptor is
//! the cable of a network device of the guest. What else belongs to an interface (its addresses, its
//! routes) is read, and set in the guest by the agent.
//!
//! Taps end with their descriptors. What stays of a redirection in the namespace is removed by
//! [`detach`], since a namespace that somebody else has made may be used again.

mod counters;
mod devices;
mod message;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use husk_netlink::{
    Address, Connection, ETHERNET, LOOPBACK, Link, LinkChange, Mac, Monitor, Neighbour, Route,
    Rule, tap,
};
use husk_vmm_control::NET_DEVICES_MAX;
use rustix::io::Errno;

pub(crate) use self::devices::Devices;
use crate::netns::{Netns, on_thread};

/// Why the pod has no network. Nothing that was made for it is left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The namespace can't be entered.
    #[error("cannot enter the pod's network namespace")]
    Enter(#[source] io::Error),
    /// It can't be read.
    #[error("cannot list the {what} in the pod's network namespace")]
    List {
        /// What was to be listed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// More interfaces than a machine has devices.
    #[error(
        "the pod's network namespace has {count} interfaces: a virtual machine has at most \
         {NET_DEVICES_MAX}"
    )]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// An interface that came when the machine was there.
    #[error("the virtual machine has no network device left for the interface {interface}")]
    NoDevice {
        /// Its name.
        interface: String,
    },
    /// One that could not be had when it came, and is there still.
    #[error("{text}")]
    Refused {
        /// The error at that time.
        text: String,
    },
    /// An interface that carries no Ethernet frames.
    #[error(
        "the interface {interface} is not Ethernet, which is all that a virtual machine can have"
    )]
    NotEthernet {
        /// Its name.
        interface: String,
    },
    /// Two virtual machines can't have one interface.
    #[error("the interface {interface} serves another virtual machine already")]
    Occupied {
        /// Its name.
        interface: String,
    },
    /// A step of tying an interface to a tap.
    #[error("cannot give the interface {interface} to the virtual machine: {step}")]
    Attach {
        /// Its name.
        interface: String,
        /// The step that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What there is in a namespace.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Those that a guest can have, in the order in which they came.
    pub(crate) links: Vec<Link>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) routes: Vec<Route>,
    pub(crate) neighbours: Vec<Neighbour>,
    pub(crate) rules: Vec<Rule>,
    /// Those of virtual machines.
    taps: Vec<Link>,
}

/// A tap that was tied to an interface.
#[derive(Debug)]
pub(crate) struct Attached {
    /// [`Link::index`] of the interface.
    pub(crate) link: u32,
    pub(crate) mac: Mac,
    pub(crate) tap: OwnedFd,
}

/// What came of a look at the namespace.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) survey: Survey,
    /// Those that have come.
    pub(crate) attached: Vec<Attached>,
    /// Those that have come and can't be had.
    pub(crate) left: Vec<(u32, NetworkError)>,
}

/// Looks at the namespace, and ties taps to those of its interfaces that are neither `known` nor
/// `refused`, as far as there are devices `free`.
pub(crate) async fn attach(
    netns: &Netns,
    known: Vec<u32>,
    refused: Vec<u32>,
    free: usize,
) -> Result<Found, NetworkError> {
    let netns = netns.clone();
    let work = move || {
        netns.enter().map_err(NetworkError::Enter)?;
        let mut connection = Connection::open().map_err(NetworkError::Enter)?;
        look(&mut connection, &known, &refused, free)
    };
    on_thread("network", work)
        .await
        .map_err(NetworkError::Enter)?
}

/// Ties taps to all interfaces. The monitor hears of everything that changes after that.
pub(crate) async fn attach_all(netns: &Netns) -> Result<(Found, Monitor), NetworkError> {
    let netns = netns.clone();
    let work = move || {
        netns.enter().map_err(NetworkError::Enter)?;
        let monitor = Monitor::open().map_err(NetworkError::Enter)?;
        let mut connection = Connection::open().map_err(NetworkError::Enter)?;
        let mut found = look(&mut connection, &[], &[], NET_DEVICES_MAX)?;
        let Some((_, error)) = found.left.pop() else {
            return Ok((found, monitor));
        };
        for done in &found.attached {
            release(&mut connection, done.link);
        }
        Err(error)
    };
    on_thread("network", work)
        .await
        .map_err(NetworkError::Enter)?
}

fn look(
    connection: &mut Connection,
    known: &[u32],
    refused: &[u32],
    free: usize,
) -> Result<Found, NetworkError> {
    let mut found = Found {
        survey: Survey::make(connection)?,
        ..Found::default()
    };
    for link in &found.survey.links {
        if known.contains(&link.index) {
            keep_up(connection, link, &found.survey.taps)?;
        } else if refused.contains(&link.index) {
            continue;
        } else if found.attached.len() == free {
            let interface = link.name.clone();
            let error = NetworkError::NoDevice { interface };
            found.left.push((link.index, error));
        } else {
            match attach_one(connection, link) {
                Ok(one) => found.attached.push(one),
                Err(error) => found.left.push((link.index, error)),
            }
        }
    }
    Ok(found)
}

/// Lets the tap of an interface pass as much as the interface does.
fn keep_up(connection: &mut Connection, link: &Link, taps: &[Link]) -> Result<(), NetworkError> {
    let mtu = link.mtu.min(TAP_MTU_MAX);
    let name = tap_name(link.index);
    let outdated = taps.iter().find(|tap| tap.name == name && tap.mtu != mtu);
    let Some(tap) = outdated else { return Ok(()) };
    let change = LinkChange {
        mtu: Some(mtu),
        ..LinkChange::default()
    };
    let changed = connection.change_link(tap.index, &change);
    changed.map_err(|source| NetworkError::Attach {
        interface: link.name.clone(),
        step: "change the MTU of its tap",
        source,
    })
}

/// Ends all redirections in a namespace that somebody else has made. One that is not there any more
/// has none. Blocks, not for long.
pub(crate) fn detach(path: &Path) {
    let Ok(netns) = Netns::open(path) else {
        return;
    };
    let work = move || {
        if netns.enter().is_err() {
            return;
        }
        let Ok(mut connection) = Connection::open() else {
            return;
        };
        let links = connection.links().unwrap_or_default();
        // A tap's own redirection ends with the tap.
        for link in links.iter().filter(|link| !is_tap(link)) {
            // The path may be that of another namespace by now, where somebody lives.
            let tap = tap_name(link.index);
            if links.iter().all(|other| other.name != tap) {
                release(&mut connection, link.index);
            }
        }
    };
    let thread = std::thread::Builder::new().name("network".to_owned());
    match thread.spawn(work) {
        // A panic was printed, and there is nothing left to do.
        Ok(thread) => drop(thread.join()),
        Err(error) => tracing::warn!(%error, ?path, "the pod's network stays redirected"),
    }
}

fn release(connection: &mut Connection, link: u32) {
    if let Err(error) = connection.remove_redirect(link) {
        tracing::warn!(%error, link, "an interface stays redirected");
    }
}

/// The tap's name tells whose it is: a second virtual machine meets it.
fn attach_one(connection: &mut Connection, link: &Link) -> Result<Attached, NetworkError> {
    let failed = |step| {
        let interface = link.name.clone();
        move |source| NetworkError::Attach {
            interface,
            step,
            source,
        }
    };
    let mac = link.mac.ok_or_else(|| NetworkError::NotEthernet {
        interface: link.name.clone(),
    })?;
    let name = tap_name(link.index);
    let tap = match tap::create(&name) {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            let interface = link.name.clone();
            return Err(NetworkError::Occupied { interface });
        }
        tap => tap.map_err(failed("make a tap by /dev/net/tun"))?,
    };
    let links = connection.links().map_err(failed("find its tap"))?;
    let index = links.iter().find(|link| link.name == name);
    let index = index.ok_or_else(|| failed("find its tap")(Errno::NODEV.into()))?;
    let set_up = LinkChange {
        mtu: Some(link.mtu.min(TAP_MTU_MAX)),
        // The tap itself has nothing to say in the network.
        has_no_link_local: true,
        ..LinkChange::default()
    };
    let up = LinkChange {
        is_up: Some(true),
        ..LinkChange::default()
    };
    connection
        .change_link(index.index, &set_up)
        .and_then(|()| connection.change_link(index.index, &up))
        .map_err(failed("set its tap up"))?;
    connection
        .redirect(index.index, link.index)
        .and_then(|()| connection.redirect(link.index, index.index))
        .map_err(failed("redirect its traffic"))?;
    Ok(Attached {
        link: link.index,
        mac,
        tap,
    })
}

fn tap_name(link: u32) -> String {
    format!("{TAP_PREFIX}{link}")
}

/// Followed by the index of the interface it serves.
const TAP_PREFIX: &str = "husk";

/// Linux allows taps no more: 65535 with the Ethernet header.
const TAP_MTU_MAX: u32 = 65521;

impl Survey {
    /// Whether an interface is there.
    pub(crate) fn has(&self, link: u32) -> bool {
        self.links.iter().any(|found| found.index == link)
    }

    fn make(connection: &mut Connection) -> Result<Self, NetworkError> {
        let list = |what| move |source| NetworkError::List { what, source };
        let links = connection.links().map_err(list("interfaces"))?;
        let (taps, links) = links.into_iter().partition(is_tap);
        let links = usable(links)?;
        if links.is_empty() {
            return Ok(Self::default());
        }
        let mut addresses = connection.addresses().map_err(list("addresses"))?;
        let mut routes = connection.routes().map_err(list("routes"))?;
        let mut neighbours = connection.neighbours().map_err(list("neighbours"))?;
        let rules = connection.rules().map_err(list("routing rules"))?;
        let is_usable = |index: u32| links.iter().any(|link| link.index == index);
        // What a router announces, the guest hears itself.
        addresses.retain(|address| {
            is_usable(address.link) && (address.is_permanent || address.address.is_ipv4())
        });
        routes.retain_mut(|route| keep(route, is_usable));
        neighbours.retain(|neighbour| is_usable(neighbour.link));
        Ok(Self {
            links,
            addresses,
            routes,
            neighbours,
            rules,
            taps,
        })
    }
}

/// The interfaces that a guest can have. Those of tunnels that nobody has set up are in every new
/// namespace of some hosts; ports belong to the interface above them.
fn usable(links: Vec<Link>) -> Result<Vec<Link>, NetworkError> {
    let mut usable = Vec::new();
    for link in links {
        if link.hardware == LOOPBACK || link.has_master || is_tap(&link) {
            continue;
        }
        match link.mac {
            Some(mac) if link.hardware == ETHERNET && mac != [0; 6] => usable.push(link),
            _ if link.is_up => {
                let interface = link.name;
                return Err(NetworkError::NotEthernet { interface });
            }
            _ => {}
        }
    }
    if usable.len() > NET_DEVICES_MAX {
        let count = usable.len();
        return Err(NetworkError::TooMany { count });
    }
    usable.sort_by_key(|link| link.index);
    Ok(usable)
}

/// Whether it is a tap of some virtual machine.
fn is_tap(link: &Link) -> bool {
    let number = link.name.strip_prefix(TAP_PREFIX).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether a route is one for the guest, and makes it one.
fn keep(route: &mut Route, is_usable: impl Fn(u32) -> bool) -> bool {
    /// `RT_TABLE_LOCAL`, which the guest's kernel fills itself.
    const LOCAL: u32 = 255;
    /// `RTPROT_RA`: what a router announces, the guest hears itself.
    const ANNOUNCED: u8 = 9;
    /// `RTN_...`
    const UNICAST: u8 = 1;
    const BLACKHOLE: u8 = 6;
    const UNREACHABLE: u8 = 7;
    const PROHIBIT: u8 = 8;
    const THROW: u8 = 9;
    if route.table == LOCAL || route.protocol == ANNOUNCED {
        return false;
    }
    match route.kind {
        UNICAST => route.hops.iter().all(|hop| is_usable(hop.link)),
        BLACKHOLE | UNREACHABLE | PROHIBIT | THROW => {
            // IPv6 names the loopback interface, which says nothing.
            route.hops.clear();
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, index: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            hardware: ETHERNET,
            is_up: true,
            mtu: 1500,
            mac: Some([2, 0, 0, 0, 0, 1]),
            has_master: false,
        }
    }

    #[test]
    fn interface_that_is_up_and_not_ethernet_is_refused_by_name() {
        let tunnel = Link {
            hardware: 768,
            mac: None,
            ..link("tunl0", 2)
        };
        let refused = usable(vec![tunnel.clone()]).unwrap_err().to_string();
        assert!(refused.contains("tunl0"), "{refused}");
        let down = Link {
            is_up: false,
            ..tunnel
        };
        assert!(usable(vec![down]).unwrap().is_empty());
    }

    #[test]
    fn only_what_a_guest_can_have_is_taken() {
        let lo = Link {
            hardware: LOOPBACK,
            ..link("lo", 1)
        };
        let port = Link {
            has_master: true,
            ..link("port", 4)
        };
        let links = vec![
            link("net1", 9),
            lo,
            port,
            link("husk7", 8),
            link("huskies", 3),
        ];

        let names: Vec<_> = usable(links)
            .unwrap()
            .into_iter()
            .map(|link| link.name)
            .collect();

        assert_eq!(names, ["huskies", "net1"]);
    }

    #[test]
    fn too_many_interfaces_are_refused() {
        let many = (0..9).map(|index| link("x", index)).collect();
        assert!(matches!(
            usable(many),
            Err(NetworkError::TooMany { count: 9 })
        ));
    }

    #[test]
    fn routes_of_the_kernel_and_of_others_are_left_out() {
        let route = Route {
            destination: std::net::Ipv4Addr::new(10, 0, 0, 0).into(),
            prefix_length: 8,
            table: 254,
            protocol: 3,
            scope: 0,
            kind: 1,
            tos: 0,
            metric: None,
            source: None,
            metrics: Vec::new(),
            hops: vec![husk_netlink::Hop {
                link: 2,
                ..Default::default()
            }],
        };
        let kept = |change: fn(&mut Route)| {
            let mut route = route.clone();
            change(&mut route);
            keep(&mut route, |link| link == 2).then_some(route.hops.len())
        };
        assert_eq!(kept(|_| {}), Some(1));
        assert_eq!(kept(|route| route.table = 100), Some(1));
        assert_eq!(kept(|route| route.table = 255), None);
        assert_eq!(kept(|route| route.protocol = 9), None);
        assert_eq!(kept(|route| route.kind = 5), None);
        assert_eq!(kept(|route| route.hops[0].link = 3), None);
        assert_eq!(
            kept(|route| (route.kind, route.hops[0].link) = (6, 1)),
            Some(0)
        );
    }
}
