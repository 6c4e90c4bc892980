//! What `ctr task` tells of a container, and does with it.

use std::io::Read;

use anyhow::{Context, Result, ensure};

use crate::ctr::{Ctr, finish};

/// Plenty for a shell, and far below what the machine and the guest have.
const MEMORY_LIMIT: &str = "33554432";

/// The figures, the processes and the state are the container's own.
pub(super) fn figures_processes_and_pause(ctr: &Ctr) -> Result<()> {
    let id = ctr.id.as_str();
    ctr.detach(&["--memory-limit", MEMORY_LIMIT], &["sleep", "1000"])?;
    let script = "echo here; exec sleep 1000";
    let exec = ["task", "exec", "--exec-id", "e1", id, "sh", "-c", script];
    let mut exec = ctr.spawn_ctr(&exec, false)?;
    let mut said = [0; 5];
    exec.stdout
        .as_mut()
        .context("the exec has no output")?
        .read_exact(&mut said)
        .context("the exec says nothing")?;

    let processes = ctr.ctr(&["task", "ps", id])?.success()?;
    ensure!(
        processes.lines().count() == 3 && processes.contains("e1"),
        "task ps says {processes:?}"
    );

    let figures = ctr.ctr(&["task", "metrics", id])?.success()?;
    let figure = |name: &str| {
        let mut lines = figures.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
        value
            .and_then(|value| value.parse::<u64>().ok())
            .with_context(|| format!("task metrics has no {name}: {figures}"))
    };
    ensure!(figure("pids.current ")? == 2, "{figures}");
    ensure!(figure("cpu.usage_usec ")? > 0, "{figures}");
    ensure!(figure("memory.usage ")? > 0, "{figures}");
    ensure!(
        figure("memory.usage_limit ")?.to_string() == MEMORY_LIMIT,
        "{figures}"
    );

    ctr.ctr(&["task", "pause", id])?.success()?;
    ensure!(state(ctr)? == "PAUSED", "paused, it is {}", state(ctr)?);
    ctr.ctr(&["task", "resume", id])?.success()?;
    ensure!(state(ctr)? == "RUNNING", "resumed, it is {}", state(ctr)?);

    ctr.ctr(&["task", "kill", "--signal", "SIGKILL", "--all", id])?
        .success()?;
    let exec = finish(exec, None)?;
    ensure!(exec.status == 137, "the exec ended with {}", exec.status);
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", id])?.success()?;
    Ok(())
}

fn state(ctr: &Ctr) -> Result<String> {
    let listed = ctr.ctr(&["task", "ls"])?.success()?;
    let line = listed.lines().find(|line| line.starts_with(&ctr.id));
    let word = line.and_then(|line| line.split_whitespace().last());
    Ok(word.context("task ls lacks it")?.to_owned())
}
