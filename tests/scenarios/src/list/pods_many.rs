//! Many pods, and pods that are not left to live in peace. Through CRI.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use husk_cri::messages::PodSandboxConfig;
use husk_cri::{Pod, WebSocket, container, pod};

use super::pods::{MIB, PROTOCOL};
use super::pods_whole::HOST;
use crate::ctr::Ctr;
use crate::host::{self, Appearing};
use crate::kubelet::Kubelet;
use crate::leftovers::Machine;

/// How many pods run at once.
const AT_ONCE: usize = 20;

/// Pods that are made, reach each other, and go, all at once.
pub(super) fn at_once(ctr: &Ctr) -> Result<()> {
    // It starts containerd, if it does not run.
    let kubelet = Kubelet::new(ctr)?;
    let pods = all(AT_ONCE, |which| run(ctr, which))?;
    let mut programs = host::Process::all()?;
    programs.retain(|process| process.is("husk-vmm"));
    let machines = if ctr.is_husk() { AT_ONCE } else { 0 };
    ensure!(
        programs.len() == machines,
        "{} virtual machines",
        programs.len()
    );
    for (which, (_, id)) in pods.iter().enumerate() {
        let (next, _) = &pods[(which + 1) % pods.len()];
        let address = kubelet.addresses(next)?[0];
        kubelet.shell(id, &format!("ping -c 1 -w 60 {address}"))?;
    }
    all(AT_ONCE, |which| {
        let kubelet = Kubelet::new(ctr)?;
        kubelet.cri.stop_pod(&pods[which].0.id)?;
        kubelet.cri.remove_pod(&pods[which].0.id)
    })?;
    Ok(())
}

/// A small pod with a container that has reached the host.
fn run(ctr: &Ctr, which: usize) -> Result<(Pod, String)> {
    let kubelet = Kubelet::new(ctr)?;
    let mut config = pod(&format!("{}-{which}", kubelet.name));
    let linux = config.linux.mut_or_insert_default();
    linux
        .resources
        .mut_or_insert_default()
        .memory_limit_in_bytes = 32 * MIB;
    let pod = kubelet.run(config)?;
    let id = kubelet.start(&pod, container("a", &["sleep", "10000"]))?;
    kubelet.shell(&id, &format!("ping -c 1 -w 60 {HOST}"))?;
    Ok((pod, id))
}

/// Does something many times at once.
fn all<T: Send>(count: usize, what: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let what = &what;
        let threads: Vec<_> = (0..count)
            .map(|which| scope.spawn(move || what(which).with_context(|| format!("pod {which}"))))
            .collect();
        let done = threads.into_iter().map(|thread| match thread.join() {
            Ok(done) => done,
            Err(_) => bail!("a thread has panicked"),
        });
        done.collect()
    })
}

/// How far a pod has come when something is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Run,
    ContainerCreated,
    ContainerStarted,
    Exec,
    ContainerStopped,
    Stopped,
}

/// The machine or the shim is killed when a pod has come so far; then the pod can be stopped and
/// removed, and nothing is left.
pub(super) fn killed_at_each_step(ctr: &Ctr) -> Result<()> {
    for victim in ["husk-vmm", "containerd-shim-husk-v2"] {
        for step in [
            Step::Run,
            Step::ContainerCreated,
            Step::ContainerStarted,
            Step::Exec,
            Step::ContainerStopped,
            Step::Stopped,
        ] {
            let before = Machine::look()?;
            killed_at(ctr, victim, step)
                .and_then(|()| before.unchanged())
                .with_context(|| format!("{victim} killed at {step:?}"))?;
        }
    }
    Ok(())
}

fn killed_at(ctr: &Ctr, victim: &str, step: Step) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let pod = kubelet.run(pod(&kubelet.name))?;
    let (mut exec, mut running) = (None, None);
    if step >= Step::ContainerCreated {
        let id = kubelet
            .cri
            .create_container(&pod, container("a", &["sleep", "10000"]))?;
        if step >= Step::ContainerStarted {
            kubelet.cri.start_container(&id)?;
        }
        if step >= Step::Exec {
            let url = kubelet
                .cri
                .exec(&id, &["sh", "-c", "echo ready; sleep 10000"], false)?;
            let mut stream = WebSocket::connect(&url, PROTOCOL)?;
            stream.until("ready")?;
            exec = Some(stream);
        }
        if step >= Step::ContainerStopped {
            kubelet.cri.stop_container(&id, 0)?;
        } else if step >= Step::ContainerStarted {
            running = Some(id);
        }
    }
    if step >= Step::Stopped {
        kubelet.cri.stop_pod(&pod.id)?;
    }
    let mut processes = host::Process::all()?;
    processes.retain(|process| process.is(victim));
    // After a pod was stopped there may be none.
    ensure!(
        step == Step::Stopped || !processes.is_empty(),
        "nobody to kill"
    );
    for process in processes {
        process.kill()?;
    }
    // A container that runs, as far as containerd knows, is not removed.
    if let Some(id) = running {
        kubelet.stopped(&id)?;
    }
    drop(exec);
    kubelet.cri.stop_pod(&pod.id)?;
    kubelet.cri.remove_pod(&pod.id)
}

/// What a pod goes through, and the file of Husk's that marks the middle of it: below the pod's
/// directory, with the container's id for `{id}`.
const IN_THE_MIDDLE: [(Call, &str); 6] = [
    (Call::Run, ""),
    (Call::Run, "vmm.log"),
    (Call::Run, "vmm.pid"),
    (Call::Start, "layout/{id}"),
    (Call::Start, "staging/{id}/rootfs"),
    (Call::Stop, "vmm.pid"),
];

/// A call of the kubelet's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// Runs the pod: the file appears.
    Run,
    /// Starts a container in it: the file appears.
    Start,
    /// Stops the pod: the file goes.
    Stop,
}

/// containerd is killed in the middle of a call, and comes back; then the pod can be stopped and
/// removed, and nothing is left.
pub(super) fn containerd_killed(ctr: &Ctr) -> Result<()> {
    // It starts containerd, if it does not run.
    let mut kubelet = Kubelet::new(ctr)?;
    for (number, (call, moment)) in IN_THE_MIDDLE.into_iter().enumerate() {
        let before = Machine::look()?;
        let name = format!("{}-{number}", kubelet.name);
        containerd_killed_in(&mut kubelet, pod(&name), call, moment)
            .and_then(|()| {
                // What the kubelet does with whatever it finds.
                for id in kubelet.cri.pods()? {
                    kubelet.cri.stop_pod(&id)?;
                    kubelet.cri.remove_pod(&id)?;
                }
                before.unchanged()
            })
            .with_context(|| format!("containerd killed in {call:?} at {moment:?}"))?;
    }
    Ok(())
}

fn containerd_killed_in(
    kubelet: &mut Kubelet,
    config: PodSandboxConfig,
    call: Call,
    moment: &str,
) -> Result<()> {
    let pods = Path::new("/run/husk/k8s.io");
    fs::create_dir_all(pods)?;
    let appearing = Appearing::watch(pods)?;
    if call == Call::Run {
        return kubelet.killed_in(
            |kubelet| kubelet.run(config).map(drop),
            || {
                let id = appearing.next()?.pop().context("no name")?;
                comes(&pods.join(id).join(moment), true)
            },
        );
    }
    let pod = kubelet.run(config)?;
    let directory = pods.join(&pod.id);
    let id = kubelet
        .cri
        .create_container(&pod, container("a", &["sleep", "10000"]))?;
    let file = directory.join(moment.replace("{id}", &id));
    if call == Call::Start {
        return kubelet.killed_in(
            |kubelet| kubelet.cri.start_container(&id),
            || comes(&file, true),
        );
    }
    kubelet.cri.start_container(&id)?;
    kubelet.killed_in(
        |kubelet| kubelet.cri.stop_pod(&pod.id),
        || comes(&file, false),
    )
}

/// Waits until a file is there, or is not.
fn comes(path: &Path, wanted: bool) -> Result<()> {
    let reached = host::path_becomes(path, wanted, Instant::now() + host::DEADLINE)?;
    ensure!(reached, "the moment did not come");
    Ok(())
}
