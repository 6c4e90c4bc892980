//! Packet filters in pods, through CRI.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_cri::messages::ContainerConfig;
use husk_cri::{container, pod};

use super::pods::mount;
use super::pods_whole::fetch;
use crate::ctr::Ctr;
use crate::kubelet::Kubelet;

/// Long enough for what is served, in the testbed, and what is not served waits for it.
const CONNECT_DEADLINE: Duration = Duration::from_secs(8);

/// Served.
const WEB: u16 = 8080;
/// Redirected to the one that is served.
const FRONT: u16 = 80;
/// Served, and filtered.
const HIDDEN: u16 = 8081;

/// One program that filters: how the rules are set, how they tell what they have counted, and how
/// they go.
struct Filter {
    name: &'static str,
    set: &'static str,
    /// Each line with `packets N` or `N` first, of the rule for the hidden port and of the other.
    count: [&'static str; 2],
    clear: &'static str,
}

const FILTERS: [Filter; 3] = [
    Filter {
        name: "nft",
        set: "nft -f - <<'END'
table inet husk {
    chain in {
        type filter hook input priority 0;
        ct state new tcp dport 8081 counter drop
    }
    chain front {
        type nat hook prerouting priority -100;
        tcp dport 80 counter redirect to :8080
    }
}
END",
        count: [
            "nft list chain inet husk in | sed -n 's/.*8081 counter packets \\([0-9]*\\).*/\\1/p'",
            "nft list chain inet husk front | sed -n 's/.*80 counter packets \\([0-9]*\\).*/\\1/p'",
        ],
        clear: "nft delete table inet husk",
    },
    Filter {
        name: "iptables-nft",
        set: "iptables-nft -A INPUT -p tcp --dport 8081 -m conntrack --ctstate NEW -j DROP
            iptables-nft -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080
            ip6tables-nft -A INPUT -p tcp --dport 8081 -j REJECT --reject-with tcp-reset",
        count: [
            "iptables-nft -nvxL INPUT | sed -n 's/^ *\\([0-9]*\\) .*dpt:8081.*/\\1/p'",
            "iptables-nft -t nat -nvxL PREROUTING | sed -n 's/^ *\\([0-9]*\\) .*dpt:80 .*/\\1/p'",
        ],
        clear: "iptables-nft -F; iptables-nft -t nat -F; ip6tables-nft -F",
    },
    Filter {
        name: "iptables-legacy",
        set: "iptables-legacy -A INPUT -p tcp --dport 8081 -m conntrack --ctstate NEW -j DROP
            iptables-legacy -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080
            ip6tables-legacy -A INPUT -p tcp --dport 8081 -j REJECT --reject-with tcp-reset",
        count: [
            "iptables-legacy -nvxL INPUT | sed -n 's/^ *\\([0-9]*\\) .*dpt:8081.*/\\1/p'",
            "iptables-legacy -t nat -nvxL PREROUTING | sed -n 's/^ *\\([0-9]*\\) .*dpt:80 .*/\\1/p'",
        ],
        clear: "iptables-legacy -F; iptables-legacy -t nat -F; ip6tables-legacy -F",
    },
];

/// One container sets the rules that another is behind, as a service mesh has it, with each of the
/// programs that images bring: a port is closed, another is sent elsewhere, and both count.
pub(super) fn packet_filter(ctr: &Ctr) -> Result<()> {
    if !ctr.is_husk() {
        // A container can't load what the host's kernel has as modules; the guest's has it built in.
        let modules = ["-a", "iptable_filter", "iptable_nat", "ip6table_filter"];
        let loaded = Command::new("modprobe").args(modules).status()?;
        ensure!(loaded.success(), "cannot load the modules of old iptables");
    }
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let serve = format!(
            "mkdir /www; echo page > /www/index.html; httpd -p {WEB} -h /www
            httpd -p {HIDDEN} -h /www; exec sleep 10000"
        );
        let web = kubelet.start(pod, container("web", &["sh", "-c", &serve]))?;
        let admin = kubelet.start(pod, admin())?;
        kubelet.shell(
            &web,
            "until wget -q -O /dev/null http://localhost:8081/; do sleep 0.2; done",
        )?;
        kubelet.shell(
            &admin,
            "ln -s host/lib host/lib64 / && ln -s /host/lib /usr/lib && rmdir /usr/sbin
                ln -s /host/sbin /usr/sbin && mkdir -p /run && nft --version",
        )?;
        let address = kubelet.addresses(pod)?[0];
        serves(address, HIDDEN)?;
        for filter in &FILTERS {
            behind(kubelet, &admin, address, filter).with_context(|| filter.name)?;
        }
        // A container without the right to can't.
        let refused = kubelet.shell(&web, "ip route add blackhole 192.0.2.0/24 || echo refused")?;
        ensure!(refused == "refused", "a plain container has set a route");
        Ok(())
    })
}

/// The one with Debian's programs and the right to use them.
fn admin() -> ContainerConfig {
    let mut config = container("admin", &["sleep", "10000"]);
    config.mounts = vec![mount("/host", Path::new("/usr"), true)];
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    let capabilities = security.capabilities.mut_or_insert_default();
    capabilities.add_capabilities = vec!["NET_ADMIN".to_owned(), "NET_RAW".to_owned()];
    config
}

fn behind(kubelet: &Kubelet, admin: &str, address: IpAddr, filter: &Filter) -> Result<()> {
    kubelet.shell(admin, &format!("set -e\n{}", filter.set))?;
    serves(address, WEB)?;
    serves(address, FRONT)?;
    let hidden = TcpStream::connect_timeout(&(address, HIDDEN).into(), CONNECT_DEADLINE);
    match hidden {
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
        hidden => bail!("the hidden port is not silent: {hidden:?}"),
    }
    for count in filter.count {
        let packets = kubelet.shell(admin, count)?;
        let is_counted = packets.parse::<u64>().is_ok_and(|packets| packets > 0);
        ensure!(is_counted, "{count:?} says {packets:?}");
    }
    kubelet.shell(admin, filter.clear)?;
    serves(address, HIDDEN)?;
    let front = TcpStream::connect_timeout(&(address, FRONT).into(), CONNECT_DEADLINE);
    ensure!(front.is_err(), "the front is still there");
    Ok(())
}

fn serves(address: IpAddr, port: u16) -> Result<()> {
    let page = fetch(SocketAddr::new(address, port))?;
    ensure!(page == "page", "port {port} answers {page:?}");
    Ok(())
}
