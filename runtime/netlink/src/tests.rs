//! Against the kernel of this machine, in network namespaces of their own. Needs root.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use nix::sched::{CloneFlags, unshare};

use crate::{
    Address, Connection, Hop, LOOPBACK, Link, LinkChange, Monitor, Neighbour, Route, Rule,
    loopback, tap,
};

/// Runs `test` in a new network namespace, where that is allowed.
fn in_namespace(test: impl FnOnce(&mut Connection) + Send) {
    std::thread::scope(|scope| {
        let run = || {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("SKIPPED: cannot make a network namespace: {errno}");
                return;
            }
            test(&mut Connection::open().unwrap());
        };
        scope.spawn(run).join().unwrap();
    });
}

fn link(connection: &mut Connection, name: &str) -> Link {
    let links = connection.links().unwrap();
    links.into_iter().find(|link| link.name == name).unwrap()
}

fn is_absent<T>(made: io::Result<T>) -> Option<T> {
    match made {
        Ok(made) => Some(made),
        Err(error) => {
            eprintln!("SKIPPED: this kernel has it not: {error}");
            None
        }
    }
}

#[test]
fn new_namespace_has_a_loopback_interface_that_is_down() {
    in_namespace(|connection| {
        let links = connection.links().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").unwrap();
        assert_eq!((lo.hardware, lo.is_up, lo.mtu), (LOOPBACK, false, 65536));
        assert!(connection.addresses().unwrap().is_empty());
    });
}

#[test]
fn tap_takes_names_addresses_routes_and_neighbours() {
    in_namespace(|connection| {
        let Some(tap) = is_absent(tap::create("tap-a")) else {
            return;
        };
        assert!(tap.as_raw_fd() >= 0);
        let index = link(connection, "tap-a").index;
        let mac = [2, 0, 0, 0, 0, 7];
        let change = LinkChange {
            name: Some("eth7"),
            mac: Some(mac),
            mtu: Some(1400),
            has_no_link_local: true,
            ..LinkChange::default()
        };
        connection.change_link(index, &change).unwrap();
        let up = LinkChange {
            is_up: Some(true),
            ..LinkChange::default()
        };
        connection.change_link(index, &up).unwrap();
        let changed = link(connection, "eth7");
        assert_eq!((changed.index, changed.mtu), (index, 1400));
        assert_eq!((changed.mac, changed.is_up), (Some(mac), true));

        let own = Ipv4Addr::new(10, 9, 0, 2);
        let addresses = [
            Address {
                link: index,
                address: own.into(),
                prefix_length: 24,
                peer: None,
                broadcast: Some(Ipv4Addr::new(10, 9, 0, 255)),
                scope: 0,
                is_permanent: true,
            },
            Address {
                link: index,
                address: "fd00::2".parse().unwrap(),
                prefix_length: 64,
                peer: None,
                broadcast: None,
                scope: 0,
                is_permanent: true,
            },
        ];
        for address in &addresses {
            connection.add_address(address).unwrap();
        }
        assert_eq!(connection.addresses().unwrap(), addresses);

        let routes = [
            route("10.9.0.0", 24, hop(index, None), Some(own.into())),
            route("0.0.0.0", 0, hop(index, Some("10.9.0.1")), None),
            route("10.8.0.0", 16, vec![], None),
            route("fd00::", 64, hop(index, None), None),
            route("::", 0, hop(index, Some("fd00::1")), None),
        ];
        for route in &routes {
            connection.add_route(route).unwrap();
        }
        let found = connection.routes().unwrap();
        for route in &routes {
            let is_it = |found: &&Route| {
                found.destination == route.destination && found.prefix_length == route.prefix_length
            };
            let found = found.iter().find(is_it).unwrap();
            assert_eq!((found.kind, &found.hops), (route.kind, &route.hops));
            assert_eq!((found.metric, found.source), (route.metric, route.source));
        }
        connection.remove_route(&routes[1]).unwrap();
        assert!(connection.remove_route(&routes[1]).is_err());

        let neighbour = Neighbour {
            link: index,
            address: Ipv4Addr::new(10, 9, 0, 1).into(),
            mac: [2, 0, 0, 0, 0, 1],
        };
        connection.add_neighbour(&neighbour).unwrap();
        assert_eq!(
            connection.neighbours().unwrap(),
            std::slice::from_ref(&neighbour)
        );
        connection.remove_neighbour(&neighbour).unwrap();
        assert_eq!(connection.neighbours().unwrap(), []);
        connection.remove_address(&addresses[1]).unwrap();
        assert_eq!(connection.addresses().unwrap(), addresses[..1]);
    });
}

fn hop(link: u32, gateway: Option<&str>) -> Vec<Hop> {
    vec![Hop {
        link,
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        ..Hop::default()
    }]
}

fn route(to: &str, prefix_length: u8, hops: Vec<Hop>, source: Option<IpAddr>) -> Route {
    const UNICAST: u8 = 1;
    const BLACKHOLE: u8 = 6;
    let is_link = hops.iter().any(|hop| hop.gateway.is_none());
    Route {
        destination: to.parse().unwrap(),
        prefix_length,
        table: 254,
        protocol: 3,
        scope: if is_link && !to.contains(':') { 253 } else { 0 },
        kind: if hops.is_empty() { BLACKHOLE } else { UNICAST },
        tos: 0,
        metric: Some(77),
        source,
        metrics: Vec::new(),
        hops,
    }
}

#[test]
fn rules_of_the_kernel_are_listed_and_more_are_added_and_removed() {
    in_namespace(|connection| {
        let monitor = Monitor::open().unwrap();
        let own = connection.rules().unwrap();
        if own.is_empty() {
            eprintln!("SKIPPED: this kernel has no rules");
            return;
        }
        assert!(own.iter().all(Rule::is_of_the_kernel), "{own:?}");
        let number = |value: u32| value.to_ne_bytes().to_vec();
        // From 10.9.0.0/16, at priority 100, to table 1000, by `ip rule`.
        let rule = Rule {
            is_ipv6: false,
            destination_length: 0,
            source_length: 16,
            tos: 0,
            action: 1,
            is_inverted: true,
            attributes: vec![
                (2, vec![10, 9, 0, 0]),
                (6, number(100)),
                (15, number(1000)),
                (21, vec![3]),
            ],
        };
        connection.add_rule(&rule).unwrap();
        assert!(monitor.take().unwrap());
        let refused = connection.add_rule(&rule).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        let mut all = connection.rules().unwrap();
        assert!(all.contains(&rule), "{all:?}");
        all.retain(|one| *one != rule);
        assert_eq!(all, own);
        connection.remove_rule(&rule).unwrap();
        // As they are listed, they can be taken away and put back.
        for rule in &own {
            connection.remove_rule(rule).unwrap();
        }
        assert_eq!(connection.rules().unwrap(), []);
        for rule in &own {
            connection.add_rule(rule).unwrap();
        }
        assert_eq!(connection.rules().unwrap(), own);
    });
}

#[test]
fn what_passes_through_an_interface_is_counted() {
    in_namespace(|connection| {
        let up = LinkChange {
            is_up: Some(true),
            ..LinkChange::default()
        };
        let lo = link(connection, "lo").index;
        connection.change_link(lo, &up).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = socket.local_addr().unwrap();
        socket.send_to(&[0; 1000], to).unwrap();
        let counters = connection.counters().unwrap();
        let lo = counters.iter().find(|one| one.name == "lo").unwrap();
        // With the headers of IP and UDP.
        assert_eq!((lo.sent.packets, lo.sent.bytes), (1, 1028));
        assert_eq!(lo.received, lo.sent);
    });
}

#[test]
fn name_of_a_tap_is_taken_once() {
    in_namespace(|_| {
        let Some(_tap) = is_absent(tap::create("tap-a")) else {
            return;
        };
        let refused = tap::create("tap-a").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        assert!(tap::create("a-name-that-is-too-long").is_err());
    });
}

#[test]
fn redirection_is_made_replaced_and_removed() {
    in_namespace(|connection| {
        let (Some(_a), Some(_b)) = (is_absent(tap::create("a")), is_absent(tap::create("b")))
        else {
            return;
        };
        let (a, b) = (link(connection, "a").index, link(connection, "b").index);
        connection.remove_redirect(a).unwrap();
        if is_absent(connection.redirect(a, b)).is_none() {
            return;
        }
        connection.redirect(a, b).unwrap();
        connection.remove_redirect(a).unwrap();
        connection.remove_redirect(a).unwrap();
        assert!(connection.redirect(a, 0x7fff_ffff).is_err());
    });
}

#[test]
fn connections_to_any_port_of_loopback_are_caught_until_the_end() {
    in_namespace(|connection| {
        let up = LinkChange {
            is_up: Some(true),
            ..LinkChange::default()
        };
        let lo = link(connection, "lo").index;
        connection.change_link(lo, &up).unwrap();
        let netns = File::open("/proc/thread-self/ns/net").unwrap();
        let Some(caught) = is_absent(loopback::catch(netns.as_fd())) else {
            return;
        };
        let addresses = [
            SocketAddr::from((Ipv4Addr::LOCALHOST, 80)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, 65535)),
        ];
        for (address, listener) in addresses.into_iter().zip(&caught.listeners) {
            let _client = TcpStream::connect(address).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            assert_eq!(accepted.local_addr().unwrap(), address);
        }
        // Another address of the namespace is nobody's.
        assert!(TcpStream::connect(("127.0.0.2", 80)).is_err());
        drop(caught);
        assert!(TcpStream::connect(addresses[0]).is_err());
    });
}

#[test]
fn monitor_hears_of_changes_and_of_nothing_else() {
    in_namespace(|connection| {
        let monitor = Monitor::open().unwrap();
        assert!(!monitor.take().unwrap());
        let up = LinkChange {
            is_up: Some(true),
            ..LinkChange::default()
        };
        let lo = link(connection, "lo").index;
        connection.change_link(lo, &up).unwrap();
        assert!(monitor.take().unwrap());
        // More than one socket holds.
        for turn in 0..4000 {
            let mtu = LinkChange {
                mtu: Some(1300 + turn % 2),
                ..LinkChange::default()
            };
            connection.change_link(lo, &mtu).unwrap();
        }
        let mut takes = 0;
        while monitor.take().unwrap() {
            takes += 1;
            assert!(takes < 100, "it hears what nobody says");
        }
        assert!(takes > 0);
    });
}
