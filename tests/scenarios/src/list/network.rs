//! A pod's network, made by CNI plugins as containerd's CRI plugin has them make it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::ctr::{Ctr, finish};
use crate::shim::{Shim, granted};

/// Where Debian puts the plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// For anything that goes through a network in the testbed.
const DEADLINE_S: &str = "100";

/// What is sent through TCP: more than any buffer on the way.
const BLOB_BYTES: u64 = 12 * 1024 * 1024;

/// A network namespace with a name. Dropping it removes it.
pub(super) struct Netns {
    name: String,
}

impl Netns {
    pub(super) fn new(ctr: &Ctr, which: &str) -> Result<Self> {
        let name = format!("{}-{which}", ctr.id);
        host(&format!(
            "ip netns add {name} && ip -n {name} link set lo up"
        ))?;
        Ok(Self { name })
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    fn flag(&self) -> String {
        format!("network:{}", self.path())
    }

    /// `ip` in it.
    pub(super) fn ip(&self, arguments: &str) -> Result<String> {
        host(&format!("ip -n {} {arguments}", self.name))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // The first one has made a mount of the directory, which is of no use to anybody else.
        let _ = host(&format!(
            "ip netns delete {}; umount /run/netns 2>/dev/null || true",
            self.name
        ));
    }
}

/// A bridge of the host, with networks of both families. Dropping it removes it.
pub(super) struct Bridge {
    name: &'static str,
    conf: String,
}

impl Bridge {
    pub(super) fn new(name: &'static str, mtu: u32, ranges: &[&str]) -> Self {
        let range = |subnet: &&str| format!("[{{\"subnet\":\"{subnet}\"}}]");
        let ranges: Vec<_> = ranges.iter().map(range).collect();
        let conf = format!(
            "\"cniVersion\":\"0.4.0\",\"name\":\"{name}\",\"type\":\"bridge\",\"bridge\":\"{name}\",\
             \"isGateway\":true,\"mtu\":{mtu},\"ipam\":{{\"type\":\"host-local\",\"dataDir\":\
             \"/run/{name}-ipam\",\"routes\":[{}],\"ranges\":[{}]}}",
            if ranges.len() > 1 {
                "{\"dst\":\"0.0.0.0/0\"},{\"dst\":\"::/0\"}"
            } else {
                "{\"dst\":\"::/0\"}"
            },
            ranges.join(",")
        );
        Self { name, conf }
    }

    /// Makes an interface in the namespace. Returns what the plugin says.
    pub(super) fn add(&self, netns: &Netns, interface: &str) -> Result<String> {
        plugin(
            "ADD",
            "bridge",
            netns,
            interface,
            &format!("{{{}}}", self.conf),
        )
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let name = self.name;
        let _ = host(&format!("ip link delete {name}; rm -rf /run/{name}-ipam"));
    }
}

/// Calls a plugin as the specification of CNI says.
fn plugin(verb: &str, plugin: &str, netns: &Netns, interface: &str, conf: &str) -> Result<String> {
    let mut child = Command::new("timeout")
        .args([DEADLINE_S, &format!("{PLUGINS}/{plugin}")])
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", &netns.name)
        .env("CNI_NETNS", netns.path())
        .env("CNI_IFNAME", interface)
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run the plugin {plugin}"))?;
    let mut stdin = child.stdin.take().context("no input")?;
    stdin.write_all(conf.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{plugin} {verb} says {said}");
    Ok(said)
}

/// Runs a command of the host's shell.
fn host(script: &str) -> Result<String> {
    let output = Command::new("timeout")
        .args([DEADLINE_S, "sh", "-c", script])
        .stdin(Stdio::null())
        .output()
        .context("cannot run sh")?;
    let said = String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned();
    ensure!(
        output.status.success(),
        "{script:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// A container that runs in a namespace until it is dropped.
pub(super) struct Pod<'a> {
    ctr: &'a Ctr,
    id: String,
}

impl<'a> Pod<'a> {
    pub(super) fn start(ctr: &'a Ctr, netns: &Netns) -> Result<Self> {
        let pod = Self {
            ctr,
            id: netns.name.clone(),
        };
        let flag = netns.flag();
        let run = ["run", "--detach", "--null-io", "--runtime", ctr.runtime()];
        let with = ["--with-ns", &flag, ctr.image, &pod.id, "sleep", "10000"];
        ctr.ctr(&[&run[..], &with[..]].concat())?.success()?;
        Ok(pod)
    }

    pub(super) fn sh(&self, script: &str) -> Result<String> {
        let exec = ["task", "exec", "--exec-id", "e", &self.id];
        let command = ["timeout", DEADLINE_S, "sh", "-c", script];
        let ended = self.ctr.ctr(&[&exec[..], &command[..]].concat())?;
        ended.success().with_context(|| format!("{script:?}"))
    }

    /// Runs a script while the host does something.
    fn sh_while<T: Send>(
        &self,
        script: &str,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<(String, T)> {
        thread::scope(|scope| {
            let working = scope.spawn(work);
            let said = self.sh(script);
            match working.join() {
                Ok(done) => Ok((said?, done?)),
                Err(_) => bail!("the host's part panicked"),
            }
        })
    }

    pub(super) fn end(&self) -> Result<()> {
        let id = self.id.as_str();
        self.ctr.ctr(&["task", "rm", "--force", id])?;
        self.ctr.ctr(&["container", "rm", id])?.success()?;
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Nothing to do if it has ended as it should.
        let _ = self.ctr.ctr(&["task", "rm", "--force", &self.id]);
        let _ = self.ctr.ctr(&["container", "rm", &self.id]);
    }
}

/// The first address of a family that an interface of a namespace has.
fn address(netns: &Netns, interface: &str, family: &str) -> Result<IpAddr> {
    let listed = netns.ip(&format!(
        "-o {family} address show dev {interface} scope global"
    ))?;
    let mut words = listed.split_whitespace();
    let found = words
        .find(|word| word.contains('/'))
        .context("no address")?;
    let (address, _) = found.split_once('/').context("no prefix")?;
    Ok(address.parse()?)
}

/// A file with random bytes, and its checksum.
struct Blob {
    path: String,
    sum: String,
}

impl Blob {
    fn new(ctr: &Ctr) -> Result<Self> {
        let path = format!("/tmp/{}-blob", ctr.id);
        let sum = host(&format!(
            "head -c {BLOB_BYTES} /dev/urandom > {path} && sha256sum < {path}"
        ))?;
        Ok(Self { path, sum })
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Accepts one connection, which must come in time.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept()?;
    let deadline = Some(Duration::from_secs(100));
    stream.set_read_timeout(deadline)?;
    stream.set_write_timeout(deadline)?;
    Ok(stream)
}

/// Sends the blob to the pod and back, each over a connection that the pod makes to the host.
fn there_and_back(pod: &Pod<'_>, gateway: IpAddr, blob: &Blob) -> Result<()> {
    let listener = TcpListener::bind(SocketAddr::new(gateway, 0))
        .with_context(|| format!("cannot listen on {gateway}"))?;
    let port = listener.local_addr()?.port();
    let send = || -> Result<u64> {
        let mut stream = accept(&listener)?;
        Ok(io::copy(&mut File::open(&blob.path)?, &mut stream)?)
    };
    let script = format!("nc {gateway} {port} </dev/null >/blob; sha256sum < /blob");
    let (seen, _) = pod.sh_while(&script, send)?;
    ensure!(
        seen == blob.sum,
        "it came with the sum {seen}, not {}",
        blob.sum
    );
    let back = format!("{}-back", blob.path);
    let receive = || -> Result<u64> {
        let mut stream = accept(&listener)?;
        Ok(io::copy(&mut stream, &mut File::create(&back)?)?)
    };
    let received = pod.sh_while(&format!("nc {gateway} {port} < /blob"), receive);
    let sum = host(&format!("sha256sum < {back}; rm -f {back}"));
    received?;
    let sum = sum?;
    ensure!(
        sum == blob.sum,
        "it came back with the sum {sum}, not {}",
        blob.sum
    );
    Ok(())
}

/// What an HTTP server answers.
fn fetch(server: SocketAddr, path: &str) -> Result<String> {
    let deadline = Duration::from_secs(30);
    let mut stream = TcpStream::connect_timeout(&server, deadline)
        .with_context(|| format!("cannot connect to {server}"))?;
    stream.set_read_timeout(Some(deadline))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Two pods on a bridge with jumbo frames and both families, one of them with a second interface,
/// routes of all kinds and a port of the host.
pub(super) fn bridge_of_two_pods(ctr: &Ctr) -> Result<()> {
    let blob = Blob::new(ctr)?;
    let jumbo = Bridge::new("jumbo0", 9000, &["10.77.0.0/24", "fd00:77::/64"]);
    let narrow = Bridge::new("narrow0", 1450, &["10.78.0.0/24", "fd00:78::/64"]);
    let (first, second) = (Netns::new(ctr, "a")?, Netns::new(ctr, "b")?);
    let made = jumbo.add(&first, "eth0")?;
    narrow.add(&first, "net1")?;
    jumbo.add(&second, "eth0")?;
    let forward = format!(
        "{{\"cniVersion\":\"0.4.0\",\"name\":\"jumbo0\",\"type\":\"portmap\",\"snat\":true,\
         \"runtimeConfig\":{{\"portMappings\":[{{\"hostPort\":8077,\"containerPort\":80,\
         \"protocol\":\"tcp\"}}]}},\"prevResult\":{made}}}"
    );
    plugin("ADD", "portmap", &first, "eth0", &forward)?;
    for route in [
        "blackhole 203.0.113.0/24",
        "198.51.100.0/24 via 10.77.0.1 metric 77 mtu 1300",
        "192.0.2.7 dev net1 scope link",
        "192.0.2.128/25 via 192.0.2.250 dev net1 onlink",
        "blackhole 2001:db8:1::/48",
        "2001:db8:2::/48 via fd00:78::1 metric 55",
    ] {
        first.ip(&format!("route add {route}"))?;
    }
    // As the plugin `sbr` has it: what is sent from the second interface's address goes out there.
    let second_address = address(&first, "net1", "-4")?;
    for change in [
        "route add default via 10.78.0.1 dev net1 table 77",
        &format!("rule add from {second_address} lookup 77 priority 500"),
        // A rule of the kernel's own can move.
        "rule add lookup local priority 10",
        "rule delete lookup local priority 0",
        "-6 rule add to fd00:79::/64 prohibit priority 600",
    ] {
        first.ip(change)?;
    }
    first.ip("neighbour add 10.77.0.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent")?;

    let shown = |netns: &Netns| -> Result<Vec<String>> {
        let all = ["route show", "-6 route show", "rule show", "-6 rule show"];
        all.iter().map(|what| netns.ip(what)).collect()
    };
    let before = shown(&first)?;
    let a = Pod::start(ctr, &first)?;
    let b = Pod::start(ctr, &second)?;
    let checked = looks_as_made(&a, &first)
        .and_then(|()| talks_to_all(&a, &b, [&first, &second], &blob))
        .and_then(|()| if ctr.is_husk() { counted(&a) } else { Ok(()) })
        .and_then(|()| {
            plugin("DEL", "portmap", &first, "eth0", &forward)?;
            let after = shown(&first)?;
            ensure!(
                before == after,
                "the namespace was {before:?} and is {after:?}"
            );
            a.end()?;
            b.end()
        });
    checked?;
    let left = host(&format!("ip netns exec {} tc qdisc show", first.name))?;
    ensure!(!left.contains("clsact"), "left in the namespace: {left}");
    let links = first.ip("-o link show")?;
    ensure!(!links.contains("husk"), "left in the namespace: {links}");
    Ok(())
}

/// The container has what its namespace has.
fn looks_as_made(pod: &Pod<'_>, netns: &Netns) -> Result<()> {
    let mut seen =
        pod.sh("ip -o address; ip -o link; ip route; ip -6 route; ip neigh; ls /sys/class/net")?;
    // Some versions put two spaces between words.
    while seen.contains("  ") {
        seen = seen.replace("  ", " ");
    }
    let mac = |interface: &str| netns_file(netns, interface, "address");
    let addresses = [
        ("eth0", address(netns, "eth0", "-4")?),
        ("eth0", address(netns, "eth0", "-6")?),
        ("net1", address(netns, "net1", "-4")?),
        ("net1", address(netns, "net1", "-6")?),
    ];
    for (interface, address) in addresses {
        let length = if address.is_ipv4() { 24 } else { 64 };
        let line = format!("{address}/{length}");
        let has = |found: &&str| found.contains(interface) && found.contains(&line);
        ensure!(
            seen.lines().any(|found| has(&found)),
            "no {line} at {interface} in {seen}"
        );
    }
    for word in [
        mac("eth0")?.as_str(),
        mac("net1")?.as_str(),
        "mtu 9000",
        "mtu 1450",
        "blackhole 203.0.113.0/24",
        "198.51.100.0/24 via 10.77.0.1 dev eth0 metric 77",
        "192.0.2.7 dev net1 scope link",
        "192.0.2.128/25 via 192.0.2.250 dev net1 onlink",
        "2001:db8:1::/48",
        "2001:db8:2::/48 via fd00:78::1 dev net1 metric 55",
        "10.77.0.99 dev eth0 lladdr 02:00:00:00:00:99",
    ] {
        ensure!(seen.contains(word), "no {word:?} in {seen}");
    }
    let second = address(netns, "net1", "-4")?;
    let rules = pod.sh(&format!(
        "ip rule; ip -6 rule; ip route show table 77; ip route get 192.0.2.66 from {second}"
    ))?;
    let rules = rules.split_whitespace().collect::<Vec<_>>().join(" ");
    for words in [
        &format!("500: from {second} lookup 77"),
        "10: from all lookup local",
        "32766: from all lookup main",
        "600: from all to fd00:79::/64",
        "default via 10.78.0.1 dev net1",
        &format!("192.0.2.66 from {second} via 10.78.0.1 dev net1"),
    ] {
        ensure!(rules.contains(words), "no {words:?} in {rules}");
    }
    ensure!(
        !rules.starts_with("0:"),
        "the local table is asked first: {rules}"
    );
    let names: Vec<_> = seen.lines().rev().take(3).collect();
    ensure!(names == ["net1", "lo", "eth0"], "interfaces: {names:?}");
    Ok(())
}

/// The shim tells of what has come and gone by both interfaces. runc's tells of no network.
fn counted(pod: &Pod<'_>) -> Result<()> {
    let metrics = granted(Shim::of(&pod.id)?.stats())?;
    let names: Vec<_> = metrics
        .network
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    ensure!(names == ["eth0", "net1"], "it tells of {names:?}");
    for interface in &metrics.network {
        // To each of its gateways, in both families, and back.
        let (received, sent) = (interface.rx_bytes, interface.tx_bytes);
        ensure!(
            received.min(sent) > 2 * BLOB_BYTES && received.max(sent) < 10 * BLOB_BYTES,
            "{} has received {received} bytes and sent {sent}",
            interface.name
        );
        ensure!(
            interface.rx_packets > 0 && interface.tx_packets > 0,
            "no packet: {interface}"
        );
    }
    Ok(())
}

fn netns_file(netns: &Netns, interface: &str, file: &str) -> Result<String> {
    host(&format!(
        "ip netns exec {} cat /sys/class/net/{interface}/{file}",
        netns.name
    ))
}

fn talks_to_all(a: &Pod<'_>, b: &Pod<'_>, netns: [&Netns; 2], blob: &Blob) -> Result<()> {
    for gateway in ["10.77.0.1", "fd00:77::1", "10.78.0.1", "fd00:78::1"] {
        a.sh(&format!("ping -c 1 -w 30 {gateway}"))?;
        there_and_back(a, gateway.parse()?, blob).with_context(|| gateway.to_owned())?;
    }
    // As long as the bridge takes them, and longer.
    a.sh("ping -c 1 -w 30 -s 8900 10.77.0.1 && ping -c 1 -w 30 -s 20000 10.77.0.1")?;

    // Pods serve each other, in both families, and the host.
    a.sh(
        "mkdir /www && echo hello >/www/index.html && ln -s /blob /www/blob && httpd -p 80 -h /www",
    )?;
    let (v4, v6) = (
        address(netns[0], "eth0", "-4")?,
        address(netns[0], "eth0", "-6")?,
    );
    for server in [format!("{v4}"), format!("[{v6}]")] {
        // In a file first, so that a failure of wget's is one of the script.
        let script =
            format!("wget -q -T 120 -O /got http://{server}/blob && sha256sum < /got && rm /got");
        let seen = b.sh(&script)?;
        ensure!(
            seen == blob.sum,
            "from pod to pod it came with the sum {seen}"
        );
    }
    for server in [
        SocketAddr::new(v4, 80),
        SocketAddr::new(v6, 80),
        // The port of the host.
        SocketAddr::new("10.77.0.1".parse()?, 8077),
    ] {
        let page = fetch(server, "/index.html")?;
        ensure!(page.ends_with("hello\n"), "{server} answers {page:?}");
    }
    // Several containers of a pod have one localhost; so has one container.
    let local = a.sh("wget -q -T 30 -O - http://127.0.0.1/; wget -q -T 30 -O - http://[::1]/")?;
    ensure!(local == "hello\nhello", "localhost answers {local:?}");
    Ok(())
}

/// A pod with IPv6 only, with small packets.
pub(super) fn ipv6_only(ctr: &Ctr) -> Result<()> {
    let blob = Blob::new(ctr)?;
    let bridge = Bridge::new("six0", 1450, &["fd00:76::/64"]);
    let netns = Netns::new(ctr, "six")?;
    bridge.add(&netns, "eth0")?;
    let pod = Pod::start(ctr, &netns)?;
    let seen =
        pod.sh("ip -o -4 address show dev eth0; ip -6 route; cat /sys/class/net/eth0/mtu")?;
    ensure!(!seen.contains("inet "), "it has an IPv4 address: {seen}");
    ensure!(
        seen.contains("default via fd00:76::1"),
        "no way out: {seen}"
    );
    ensure!(seen.ends_with("1450"), "another MTU: {seen}");
    there_and_back(&pod, "fd00:76::1".parse()?, &blob)?;
    pod.end()
}

/// A namespace that is not there is named, and nothing is left.
pub(super) fn namespace_that_is_not_there(ctr: &Ctr) -> Result<()> {
    refused(ctr, "/run/netns/gone", "/run/netns/gone")
}

/// So is a file that is none.
pub(super) fn file_that_is_no_namespace(ctr: &Ctr) -> Result<()> {
    refused(ctr, "/etc/hostname", "network namespace")
}

fn refused(ctr: &Ctr, path: &str, word: &str) -> Result<()> {
    let flag = format!("network:{path}");
    let ended = ctr.run(&["--with-ns", &flag], &["true"])?;
    ctr.bury();
    ensure!(ended.status != 0, "it ran in {path}");
    ensure!(ended.stderr.contains(word), "not named: {}", ended.stderr);
    Ok(())
}

/// A second virtual machine in the same namespace is refused, and the first goes on; then the namespace
/// serves again.
pub(super) fn namespace_is_used_by_one_pod_at_a_time(ctr: &Ctr) -> Result<()> {
    let bridge = Bridge::new("once0", 1500, &["10.75.0.0/24", "fd00:75::/64"]);
    let netns = Netns::new(ctr, "once")?;
    bridge.add(&netns, "eth0")?;
    let flag = netns.flag();
    let pod = Pod::start(ctr, &netns)?;
    let second = ctr.run(&["--with-ns", &flag], &["true"])?;
    ctr.bury();
    ensure!(
        second.status != 0,
        "two virtual machines have one interface"
    );
    ensure!(
        second
            .stderr
            .contains("eth0 serves another virtual machine"),
        "not named: {}",
        second.stderr
    );
    pod.sh("ping -c 1 -w 30 10.75.0.1")?;
    pod.end()?;
    let again = ctr.spawn(
        &ctr.id,
        &["--with-ns", &flag],
        &["ping", "-c", "1", "-w", "30", "10.75.0.1"],
        false,
    )?;
    finish(again, None)?.success()?;
    Ok(())
}
