//! Whole lives of pods, through CRI.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cri::messages::{LinuxContainerResources, PodSandboxConfig, PortMapping};
use husk_cri::{Pod, WebSocket, container, pod};

use super::pods::{MIB, PodCgroup, mount, set_map};
use super::pods_network::{PORT_PROTOCOL, ask, body};
use crate::ctr::Ctr;
use crate::kubelet::Kubelet;

/// The bridge's own address, at which the host is reached.
pub(super) const HOST: &str = "10.88.0.1";

/// Of the host, given to the pod's port 80.
const HOST_PORT: u16 = 8099;

/// For an answer through the testbed's network.
const DEADLINE: Duration = Duration::from_secs(60);

/// Volumes as the kubelet makes them; removed with this.
struct Volumes {
    base: PathBuf,
}

impl Volumes {
    fn make(name: &str) -> Result<Self> {
        let volumes = Self {
            base: Path::new("/var/tmp").join(name),
        };
        for directory in [volumes.memory(), volumes.map()] {
            fs::create_dir_all(directory)?;
        }
        let options = ["-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs"];
        let mount = Command::new("mount")
            .args(options)
            .arg(volumes.memory())
            .status()?;
        ensure!(mount.success(), "cannot mount");
        set_map(&volumes.map(), "one")?;
        Ok(volumes)
    }

    fn memory(&self) -> PathBuf {
        self.base.join("volumes/kubernetes.io~empty-dir/memory")
    }

    fn map(&self) -> PathBuf {
        self.base.join("volumes/kubernetes.io~configmap/map")
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        // What is left is told of as a mount.
        let _ = Command::new("umount").arg(self.memory()).status();
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// All that a pod is for: containers before it and beside it, volumes, both families of addresses,
/// other pods, a port of the host, `exec`, a forwarded port, new limits, figures.
pub(super) fn whole_life(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let volumes = Volumes::make(&kubelet.name)?;
    // Without one containerd has no figures of a pod.
    let cgroup = PodCgroup::make("/husk-test/pod-whole")?;
    let mut config = pod(&kubelet.name);
    let linux = config.linux.mut_or_insert_default();
    cgroup.0.clone_into(&mut linux.cgroup_parent);
    let limits = config
        .linux
        .mut_or_insert_default()
        .resources
        .mut_or_insert_default();
    limits.memory_limit_in_bytes = 96 * MIB;
    let mut port = PortMapping::new();
    (port.container_port, port.host_port) = (80, HOST_PORT.into());
    config.port_mappings.push(port);
    kubelet.with_pod(config, |kubelet, a| {
        let with_volumes = |name: &str, script: &str| {
            let mut config = container(name, &["sh", "-c", script]);
            config.mounts = vec![
                mount("/memory", &volumes.memory(), false),
                mount("/map", &volumes.map(), true),
            ];
            config
        };
        let init = "echo made by init > /memory/index.html";
        let init = kubelet.start(a, with_volumes("init", init))?;
        ensure!(kubelet.stopped(&init)? == 0, "the init container failed");
        let serve = "httpd -p 80 -h /memory; exec sleep 1000";
        let web = kubelet.start(a, with_volumes("web", serve))?;
        let sidecar = "until wget -q -O /dev/null http://localhost/; do sleep 0.2; done
            cat /map/key >> /memory/index.html; exec sleep 1000";
        let sidecar = kubelet.start(a, with_volumes("sidecar", sidecar))?;
        kubelet.shell(
            &web,
            "until grep -q one /memory/index.html; do sleep 0.2; done",
        )?;
        let page = "made by init\none";

        let (husk, runc) = (other(kubelet, "b"), other(kubelet, "c"));
        kubelet.with_pod(husk, |kubelet, b| {
            kubelet.with_pod_of("runc", runc, |kubelet, c| {
                for other in [b, c] {
                    talk(kubelet, (a, &web, page), other)?;
                }
                Ok(())
            })
        })?;

        for address in [HOST.parse()?, kubelet.addresses(a)?[0]] {
            let port = if address == kubelet.addresses(a)?[0] {
                80
            } else {
                HOST_PORT
            };
            let got = fetch(SocketAddr::new(address, port))?;
            ensure!(got == page, "{address} port {port} answers {got:?}");
        }
        let mut stream = WebSocket::connect(&kubelet.cri.port_forward(&a.id, 80)?, PORT_PROTOCOL)?;
        ask(&mut stream, "/")?;
        let forwarded = String::from_utf8(body(stream.finish_port()?)?)?;
        ensure!(
            forwarded.trim_end() == page,
            "the port forwards {forwarded:?}"
        );

        let mut limits = LinuxContainerResources::new();
        limits.memory_limit_in_bytes = 40 * MIB;
        kubelet.cri.update(&sidecar, limits)?;
        let limit = kubelet.shell(&sidecar, "cat /sys/fs/cgroup/memory.max")?;
        ensure!(limit == (40 * MIB).to_string(), "the limit is {limit}");
        let traffic = kubelet
            .cri
            .pod_stats(&a.id)?
            .linux
            .network
            .default_interface
            .clone();
        let (rx, tx) = (traffic.rx_bytes.value, traffic.tx_bytes.value);
        ensure!(
            rx > 500 && tx > 500,
            "it has received {rx} and sent {tx} bytes"
        );
        Ok(())
    })
}

/// Another pod beside the first.
fn other(kubelet: &Kubelet, which: &str) -> PodSandboxConfig {
    let mut config = pod(&format!("{}-{which}", kubelet.name));
    let limits = config
        .linux
        .mut_or_insert_default()
        .resources
        .mut_or_insert_default();
    limits.memory_limit_in_bytes = 48 * MIB;
    config
}

/// A pod and another one ask each other, by all addresses that they have.
fn talk(kubelet: &Kubelet, (pod, web, page): (&Pod, &str, &str), other: &Pod) -> Result<()> {
    let serve = "mkdir /www; hostname > /www/index.html; httpd -p 80 -h /www; exec sleep 1000";
    let asker = kubelet.start(other, container("web", &["sh", "-c", serve]))?;
    kubelet.shell(
        &asker,
        "until wget -q -O /dev/null http://localhost/; do sleep 0.2; done",
    )?;
    for (from, to, wanted) in [
        (web, other, other.config.hostname.as_str()),
        (&asker, pod, page),
    ] {
        let addresses = kubelet.addresses(to)?;
        ensure!(addresses.len() == 2, "the pod has {addresses:?}");
        for address in addresses {
            let host = match address {
                IpAddr::V4(address) => address.to_string(),
                IpAddr::V6(address) => format!("[{address}]"),
            };
            let got = kubelet.shell(from, &format!("wget -q -T 30 -O - http://{host}/"))?;
            ensure!(got == wanted, "{host} answers {got:?}");
        }
    }
    Ok(())
}

/// What an HTTP server of a pod answers the host.
pub(super) fn fetch(server: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, DEADLINE)
        .with_context(|| format!("cannot connect to {server}"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8(body(answer)?)?.trim_end().to_owned())
}

/// A user that may not send raw packets pings, with the host's program: busybox has none for that.
pub(super) fn unprivileged_ping(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let script = format!(
            "cd /host; lib64/ld-linux-x86-64.so.2 --library-path lib/x86_64-linux-gnu \
                bin/ping -c 1 -w 30 {HOST}"
        );
        let mut config = container("a", &["sh", "-c", &script]);
        config.mounts = vec![mount("/host", Path::new("/usr"), true)];
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        security.run_as_user.mut_or_insert_default().value = 1000;
        let id = kubelet.start(pod, config)?;
        let status = kubelet.stopped(&id)?;
        let said = kubelet.log(pod, "a")?;
        ensure!(status == 0, "ping ended with {status}: {said}");
        Ok(())
    })
}
