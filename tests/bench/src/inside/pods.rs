//! Pods, as a kubelet makes them: through CRI.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cri::{Cri, Daemon, Events};

use super::Bench;
use super::command;
use crate::record::Subject;

/// The handlers of that containerd.
const HANDLERS: [(Subject, &str); 2] = [(Subject::Runc, "runc"), (Subject::Husk, "husk")];

/// Runs that are not counted: they fill caches.
const WARM_UPS: u32 = 1;

/// For a container to end.
const DEADLINE: Duration = Duration::from_secs(300);

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    // Where that containerd keeps its files; see containerd.rs.
    command::run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/var/tmp"]))?;
    let daemon = Daemon::start("bench")?;
    let socket = daemon.socket();
    let cri = Cri::connect(&socket)?;
    let mut events = Events::listen(&socket)?;
    for round in 0..WARM_UPS + bench.plan.choose(7, 3) {
        for (subject, handler) in HANDLERS {
            let name = format!("pod-{handler}-{round:02}");
            let took = live(&cri, &mut events, handler, &name);
            if round < WARM_UPS && took.is_ok() {
                continue;
            }
            bench.sample_or_failure("pod_cri", subject, took)?;
        }
    }
    Ok(())
}

/// Seconds of a pod's whole life: made, one container run to its end, and removed.
fn live(cri: &Cri, events: &mut Events, handler: &str, name: &str) -> Result<f64> {
    let began = Instant::now();
    let pod = cri.run_pod(handler, husk_cri::pod(name))?;
    let status = run_container(cri, events, &pod);
    cri.stop_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    let took = began.elapsed().as_secs_f64();
    let status = status?;
    ensure!(status == 0, "the container ended with {status}");
    Ok(took)
}

fn run_container(cri: &Cri, events: &mut Events, pod: &husk_cri::Pod) -> Result<i32> {
    let id = cri.create_container(pod, husk_cri::container("c", &["true"]))?;
    cri.start_container(&id)?;
    events
        .stopped(&id, DEADLINE)
        .context("no event of its end")?;
    Ok(cri.container_status(&id)?.exit_code)
}
