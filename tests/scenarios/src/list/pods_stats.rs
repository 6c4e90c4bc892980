//! What the kubelet is told that a pod uses, through CRI.

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_cri::messages::{ContainerStats, LinuxPodSandboxStats};
use husk_cri::{Pod, container, pod};

use super::pods::PodCgroup;
use super::pods_whole::HOST;
use crate::ctr::Ctr;
use crate::kubelet::Kubelet;

/// What the pod receives, and what it sends.
const RECEIVED_BYTES: u64 = 6 * 1024 * 1024;
const SENT_BYTES: u64 = 2 * 1024 * 1024;

/// What the container keeps in memory.
const HELD_BYTES: u64 = 12 * 1024 * 1024;

/// The pod's limit, and what a virtual machine may have beside it.
const LIMIT_BYTES: u64 = 96 * 1024 * 1024;
const OVERHEAD_BYTES: u64 = 160 * 1024 * 1024;

/// For a connection to come, and to say something.
const DEADLINE: Duration = Duration::from_secs(100);

/// CPU, memory and network are as much as the pod has used, whichever call asks.
pub(super) fn stats(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    // Without one containerd has no figures of a pod.
    let cgroup = PodCgroup::make("/husk-test/pod-stats")?;
    let mut config = pod(&kubelet.name);
    let linux = config.linux.mut_or_insert_default();
    cgroup.0.clone_into(&mut linux.cgroup_parent);
    let limits = linux.resources.mut_or_insert_default();
    limits.memory_limit_in_bytes = LIMIT_BYTES.cast_signed();
    kubelet.with_pod(config, |kubelet, pod| {
        let busy = kubelet.start(pod, container("busy", &["sleep", "10000"]))?;
        let idle = kubelet.start(pod, container("idle", &["sleep", "10000"]))?;
        let before = of_pod(kubelet, pod)?;
        let busy_before = kubelet.cri.container_stats(&busy)?;

        kubelet.shell(
            &busy,
            &format!("head -c {HELD_BYTES} /dev/zero > /dev/shm/held"),
        )?;
        kubelet.shell(&busy, "n=0; while [ $n -lt 30000 ]; do n=$((n + 1)); done")?;
        transfer(kubelet, &busy)?;

        let after = of_pod(kubelet, pod)?;
        let traffic = |stats: &LinuxPodSandboxStats| {
            let usage = &stats.network.default_interface;
            (usage.rx_bytes.value, usage.tx_bytes.value)
        };
        let ((rx_before, tx_before), (rx, tx)) = (traffic(&before), traffic(&after));
        within("received", rx - rx_before, RECEIVED_BYTES)?;
        within("sent", tx - tx_before, SENT_BYTES)?;
        let interface = &after.network.default_interface;
        let errors = interface.rx_errors.value + interface.tx_errors.value;
        ensure!(
            interface.name == "eth0" && errors == 0,
            "{} has {errors} errors",
            interface.name
        );
        let cpu = |stats: &LinuxPodSandboxStats| stats.cpu.usage_core_nano_seconds.value;
        ensure!(cpu(&after) > cpu(&before), "the pod has used no CPU");
        let memory = after.memory.working_set_bytes.value;
        ensure!(
            (HELD_BYTES..LIMIT_BYTES + OVERHEAD_BYTES).contains(&memory),
            "the pod uses {memory} bytes"
        );
        let processes = after.process.process_count.value;
        ensure!(processes == 2, "the pod has {processes} processes");

        let one = kubelet.cri.container_stats(&busy)?;
        let used = cpu_of(&one) - cpu_of(&busy_before);
        ensure!(used > 1_000_000, "a loop has taken {used} ns");
        let all = kubelet.cri.all_container_stats(&pod.id)?;
        for among in [&all, &after.containers] {
            ensure!(among.len() == 2, "{} containers", among.len());
            let [busy, idle] = [find(among, &busy)?, find(among, &idle)?];
            ensure!(
                cpu_of(busy) >= used && memory_of(busy) >= HELD_BYTES,
                "the busy one: {busy}"
            );
            ensure!(
                memory_of(busy) <= LIMIT_BYTES && (1..=HELD_BYTES).contains(&memory_of(idle)),
                "the busy one: {busy}, the idle one: {idle}"
            );
        }
        if ctr.is_husk() {
            // The containers' memory is in the machine's.
            ensure!(
                memory > memory_of(&one),
                "the pod uses less than its container"
            );
        }
        Ok(())
    })
}

fn cpu_of(stats: &ContainerStats) -> u64 {
    stats.cpu.usage_core_nano_seconds.value
}

fn memory_of(stats: &ContainerStats) -> u64 {
    stats.memory.working_set_bytes.value
}

fn find<'a>(all: &'a [ContainerStats], id: &str) -> Result<&'a ContainerStats> {
    let found = all.iter().find(|one| one.attributes.id == id);
    found.with_context(|| format!("{id} is not among them"))
}

/// The figures of the pod, which both calls have to know.
fn of_pod(kubelet: &Kubelet, pod: &Pod) -> Result<LinuxPodSandboxStats> {
    let all = kubelet.cri.all_pod_stats()?;
    ensure!(
        all.iter().any(|one| one.attributes.id == pod.id),
        "the list of all pods lacks it"
    );
    let stats = kubelet.cri.pod_stats(&pod.id)?;
    stats.linux.into_option().context("no figures of Linux")
}

/// Headers, and packets that were sent again or say that others have come, are a part of it.
fn within(what: &str, counted: u64, bytes: u64) -> Result<()> {
    ensure!(
        (bytes..bytes + bytes / 2).contains(&counted),
        "{what}: {counted} bytes are counted of {bytes}"
    );
    Ok(())
}

/// Sends to the container, and has it send.
fn transfer(kubelet: &Kubelet, container: &str) -> Result<()> {
    let listener = TcpListener::bind((HOST, 0))?;
    let port = listener.local_addr()?.port();
    let script = format!("nc -w 60 {HOST} {port} < /dev/null | wc -c");
    let (got, sent) = beside(
        &listener,
        || {
            Ok(io::copy(
                &mut io::repeat(7).take(RECEIVED_BYTES),
                &mut accept(&listener)?,
            )?)
        },
        || kubelet.shell(container, &script),
    )?;
    ensure!(got == sent.to_string(), "it has got {got} of {sent}");
    let script = format!("head -c {SENT_BYTES} /dev/zero | nc -w 60 {HOST} {port}");
    let (_, got) = beside(
        &listener,
        || Ok(io::copy(&mut accept(&listener)?, &mut io::sink())?),
        || kubelet.shell(container, &script),
    )?;
    ensure!(got == SENT_BYTES, "{got} bytes have come");
    Ok(())
}

/// The host's part on a thread of its own, and the container's.
fn beside<T: Send, U>(
    listener: &TcpListener,
    host: impl FnOnce() -> Result<T> + Send,
    inside: impl FnOnce() -> Result<U>,
) -> Result<(U, T)> {
    thread::scope(|scope| {
        let host = scope.spawn(host);
        let inside = inside();
        if inside.is_err() {
            // Nobody else may come.
            drop(TcpStream::connect(listener.local_addr()?));
        }
        match host.join() {
            Ok(done) => Ok((inside?, done?)),
            Err(_) => bail!("the host's part panicked"),
        }
    })
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream)
}
