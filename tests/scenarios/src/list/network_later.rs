//! Networks that change while a pod runs.

use anyhow::{Result, ensure};

use super::network::{Bridge, Netns, Pod};
use crate::ctr::Ctr;
use crate::docker::Docker;

/// Waits, in a container, until a command succeeds or half a minute is over. Docker's and CNI's changes
/// are there at once with runc.
fn until(command: &str) -> String {
    format!("n=0; until {command}; do n=$((n + 1)); test $n -lt 120 || exit 9; sleep 0.25; done")
}

/// What is changed in a network namespace is changed in the container.
pub(super) fn changes_of_a_namespace(ctr: &Ctr) -> Result<()> {
    let bridge = Bridge::new("later0", 1500, &["10.74.0.0/24", "fd00:74::/64"]);
    let netns = Netns::new(ctr, "later")?;
    bridge.add(&netns, "eth0")?;
    let pod = Pod::start(ctr, &netns)?;
    for (change, seen) in [
        (
            "address add 10.74.1.7/24 dev eth0",
            "ip address | grep -q 10.74.1.7/24",
        ),
        (
            "-6 address add fd00:74:1::7/64 dev eth0 nodad",
            "ip address | grep -q fd00:74:1::7/64",
        ),
        (
            "route add 198.51.100.0/24 via 10.74.0.1",
            "ip route | grep -q 198.51.100.0/24",
        ),
        (
            "route add blackhole 203.0.113.0/24",
            "ip route | grep -q 203.0.113.0/24",
        ),
        (
            "route add prohibit 192.0.2.0/25",
            "ip route | grep -q 'prohibit 192.0.2.0/25'",
        ),
        (
            "route add 192.0.2.128/25 via 10.66.0.1 dev eth0 onlink table 100 metric 9",
            "ip route show table 100 | grep -q '192.0.2.128/25 via 10.66.0.1 dev eth0 .*onlink'",
        ),
        (
            "rule add from 10.74.1.7 lookup 100 priority 1000",
            "ip rule | grep -q '^1000:.*10.74.1.7.*lookup 100'",
        ),
        (
            "-6 rule add fwmark 0x7 lookup 200 priority 2000",
            "ip -6 rule | grep -q '^2000:.*fwmark 0x7.*lookup 200'",
        ),
        ("rule delete priority 1000", "! ip rule | grep -q '^1000:'"),
        (
            "link set eth0 mtu 1300",
            "grep -qx 1300 /sys/class/net/eth0/mtu",
        ),
        (
            "route delete 198.51.100.0/24",
            "! ip route | grep -q 198.51.100.0/24",
        ),
        (
            "address delete 10.74.1.7/24 dev eth0",
            "! ip address | grep -q 10.74.1.7/24",
        ),
        (
            "link set eth0 mtu 1500",
            "grep -qx 1500 /sys/class/net/eth0/mtu",
        ),
        ("link set eth0 down", "! ip link show eth0 | grep -q ,UP"),
        ("link set eth0 up", "ip link show eth0 | grep -q ,UP"),
        (
            "route add default via 10.74.0.1",
            "ip route | grep -q default",
        ),
    ] {
        netns.ip(change)?;
        let seen = pod.sh(&until(seen));
        ensure!(
            seen.is_ok(),
            "after {change:?} the container has not changed"
        );
    }
    pod.sh("ping -c 1 -w 30 -s 1400 10.74.0.1")?;
    pod.end()
}

/// `docker network connect` and `disconnect`, twice.
pub(super) fn docker_networks(ctr: &Ctr) -> Result<()> {
    let docker = Docker::start(ctr.runtime())?;
    let create = ["network", "create", "--subnet", "10.91.0.0/24", "later"];
    docker.says(&create)?;
    docker.detach("box", &[], &["sleep", "1000"])?;
    let sh = |script: &str| docker.says(&["exec", "box", "sh", "-c", script]);
    for _ in 0..2 {
        docker.says(&["network", "connect", "later", "box"])?;
        // Under a new name each time.
        sh(&until("ip address | grep -q 10.91.0."))?;
        sh("ping -c 1 -w 30 10.91.0.1")?;
        docker.says(&["network", "disconnect", "later", "box"])?;
        sh(&until("! ip address | grep -q 10.91.0."))?;
    }
    sh(
        "ip route | grep -q 'default via .* dev eth0' && ping -c 1 -w 30 $(ip route | sed -n 's/default via \\([0-9.]*\\) .*/\\1/p')",
    )?;
    docker.says(&["rm", "--force", "box"])?;
    docker.says(&["network", "rm", "later"])?;
    docker.stop()
}
