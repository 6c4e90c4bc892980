//! Pods that CRI asks the shim for, by containerd's Sandbox API.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cri::messages::PodSandboxState;
use husk_cri::{Pod, container, pod};

use crate::ctr::Ctr;
use crate::host;
use crate::kubelet::Kubelet;
use crate::list::pods::{MIB, PodCgroup, holds_all};

/// The runtime handler whose pods the shim makes.
const HANDLER: &str = "husk-sandboxer";

/// Where containerd keeps the bundles of such pods.
const BUNDLES: &str = "/run/containerd-cri/state/io.containerd.sandbox.controller.v1.shim/k8s.io";

/// For containerd to have cleaned up after a shim. The testbed is some twenty times slower than metal.
const BURIAL_DEADLINE: Duration = Duration::from_secs(120);

/// Two containers share what pods share, while containerd restarts and after it; and the pod ends when it
/// is stopped, or when its machine or its shim is killed.
pub(super) fn sandboxer_shim(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let cgroup = PodCgroup::make("/husk-test/pod-sandboxer")?;
    let mut config = pod(&kubelet.name);
    config.dns_config.mut_or_insert_default().servers = vec!["192.0.2.53".to_owned()];
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = cgroup.0.to_owned();
    let sysctl = ("net.core.somaxconn".to_owned(), "1234".to_owned());
    linux.sysctls.insert(sysctl.0, sysctl.1);
    let limits = linux.resources.mut_or_insert_default();
    limits.memory_limit_in_bytes = 80 * MIB;
    kubelet.with_pod_of(HANDLER, config, |kubelet, pod| {
        ensure!(
            Path::new(BUNDLES).join(&pod.id).exists(),
            "the pod is not of the Sandbox API"
        );
        let script = "echo a > /dev/shm/word; echo from a | nc -l -p 8080; exec sleep 1000";
        let a = kubelet.start(pod, container("a", &["sh", "-c", script]))?;
        let b = kubelet.start(pod, container("b", &["sleep", "1000"]))?;
        shared(kubelet, &a, &b)?;
        holds_all(&cgroup.directory())?;

        kubelet.restart_containerd()?;
        is_ready(kubelet, pod, true)?;
        ensure!(
            kubelet.shell(&a, "cat /dev/shm/word")? == "a",
            "a is another"
        );
        let c = kubelet.start(pod, container("c", &["cat", "/dev/shm/word"]))?;
        ensure!(kubelet.stopped(&c)? == 0, "c failed");

        kubelet.cri.stop_pod(&pod.id)?;
        kubelet.cri.stop_pod(&pod.id)?;
        is_ready(kubelet, pod, false)?;
        let status = kubelet.cri.container_status(&b)?.exit_code;
        ensure!(status == 137, "b ended with {status}");
        Ok(())
    })?;

    for victim in ["husk-vmm", "containerd-shim-husk-v2"] {
        killed(&mut kubelet, victim).with_context(|| format!("{victim} killed"))?;
    }
    Ok(())
}

/// What the containers of one pod have in common, and what CRI's server puts into those of its own.
fn shared(kubelet: &Kubelet, a: &str, b: &str) -> Result<()> {
    let namespaces = "for kind in ipc uts net; do readlink /proc/self/ns/$kind; done";
    let (of_a, of_b) = (kubelet.shell(a, namespaces)?, kubelet.shell(b, namespaces)?);
    ensure!(of_a == of_b, "not shared: {of_a} and {of_b}");

    let script = "cat /dev/shm/word; hostname; cat /etc/hostname /etc/resolv.conf
        df -k /dev/shm | tail -1 | { read name size rest; echo $size; }
        cat /proc/sys/net/core/somaxconn
        nc 127.0.0.1 8080 < /dev/null
        ping -c 1 -W 60 10.88.0.1 > /dev/null && echo reached";
    let said = kubelet.shell(b, script)?;
    let name = &kubelet.name;
    let wanted = format!("a\n{name}\n{name}\nnameserver 192.0.2.53\n65536\n1234\nfrom a\nreached");
    ensure!(said == wanted, "it said {said:?}");
    let hosts = kubelet.shell(b, "cat /etc/hosts")?;
    let of_host = fs::read_to_string("/etc/hosts")?;
    ensure!(hosts == of_host.trim_end(), "its hosts are {hosts:?}");

    let total = kubelet.shell(b, "grep MemTotal /proc/meminfo")?;
    let total_kib: u32 = total
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .with_context(|| format!("it said {total:?}"))?;
    ensure!(
        (80 << 10..=144 << 10).contains(&total_kib),
        "it has {total_kib} KiB"
    );
    Ok(())
}

fn is_ready(kubelet: &Kubelet, pod: &Pod, expected: bool) -> Result<()> {
    let state = kubelet.cri.pod_status(&pod.id)?.state;
    let wanted = match expected {
        true => PodSandboxState::SANDBOX_READY,
        false => PodSandboxState::SANDBOX_NOTREADY,
    };
    ensure!(state == wanted.into(), "the pod is {state:?}");
    Ok(())
}

/// The pod is told to have ended, takes no more containers, and can be removed.
fn killed(kubelet: &mut Kubelet, victim: &str) -> Result<()> {
    let config = pod(&kubelet.name);
    kubelet.with_pod_of(HANDLER, config, |kubelet, pod| {
        let id = kubelet.start(pod, container("a", &["sleep", "1000"]))?;
        let processes = host::Process::all()?;
        let process = processes.iter().find(|process| process.is(victim));
        process.context("nobody to kill")?.kill()?;
        if victim == "husk-vmm" {
            kubelet.pod_stopped(&pod.id)?;
        } else {
            // containerd asks a dead shim, and tells the kubelet what came of it, until it has buried it.
            ensure!(kubelet.stopped(&id)? != 0, "the container is well");
            let deadline = Instant::now() + BURIAL_DEADLINE;
            let bundle = Path::new(BUNDLES).join(&pod.id);
            let is_buried = host::path_becomes(&bundle, false, deadline)?;
            ensure!(is_buried, "the shim is not buried");
            kubelet.cri.stop_pod(&pod.id)?;
        }
        is_ready(kubelet, pod, false)?;
        let late = kubelet.start(pod, container("b", &["true"]));
        ensure!(late.is_err(), "it takes a container");
        Ok(())
    })
}
