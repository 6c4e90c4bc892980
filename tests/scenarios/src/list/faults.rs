//! Something is killed, or missing; what it leaves must go away.

use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::Status;

use crate::ctr::{Ctr, Ended, finish};
use crate::events::Events;
use crate::fifo::{Fifos, Place};
use crate::host::{self, DEADLINE};
use crate::shim::{Shim, Streams, granted};

/// What is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Shim,
    Vmm,
    Containerd,
}

impl Victim {
    fn kill(self, id: &str) -> Result<()> {
        let processes = match self {
            Self::Shim => host::shims(id)?,
            Self::Vmm => host::vmms()?,
            Self::Containerd => vec![host::containerd()?],
        };
        ensure!(!processes.is_empty(), "there is nothing to kill");
        processes.iter().try_for_each(host::Process::kill)
    }

    /// Whether it is there at a moment of a start.
    fn lives_at(self, moment: &str) -> bool {
        !matches!(self, Self::Vmm) || !["", "vmm.log"].contains(&moment)
    }
}

/// Files of Husk that appear one after the other as a container starts.
const MOMENTS: [&str; 5] = [
    // The shim has begun to make the pod.
    "",
    // The VMM is about to be spawned.
    "vmm.log",
    // The VMM is jailed and its machine built or about to be.
    "vmm.pid",
    // The guest is up, and the container's root is about to be mounted.
    "layout/{id}",
    // It is being mounted, and given to the guest.
    "staging/{id}/rootfs",
];

pub(super) fn shim_killed_while_running(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    ctr.detach(&[], &["sleep", "1000"])?;
    Victim::Shim.kill(&ctr.id)?;
    events.until(&["/tasks/exit", &ctr.id])?;
    events.until(&["/tasks/delete", &ctr.id])?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    Ok(())
}

pub(super) fn vmm_killed_while_running(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    ctr.detach(&[], &["sleep", "1000"])?;
    Victim::Vmm.kill(&ctr.id)?;
    let exit = events.until(&["/tasks/exit", &ctr.id])?;
    ensure!(exit.contains("137"), "the exit event says {exit}");
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    Ok(())
}

/// A container lives on while containerd is away, and is the same one afterwards.
pub(super) fn containerd_killed_while_running(ctr: &Ctr) -> Result<()> {
    ctr.detach(
        &[],
        &["sh", "-c", "echo still here > /here; exec sleep 1000"],
    )?;
    Victim::Containerd.kill(&ctr.id)?;
    host::start_containerd()?;
    let listed = ctr.ctr(&["task", "ls"])?.success()?;
    let line = listed.lines().find(|line| line.starts_with(&ctr.id));
    let line = line.context("task ls lacks it")?;
    ensure!(line.ends_with("RUNNING"), "task ls says {line:?}");
    let exec = ["task", "exec", "--exec-id", "e1", &ctr.id, "cat", "/here"];
    let said = ctr.ctr(&exec)?.success()?;
    ensure!(said == "still here", "it says {said:?}");
    let events = Events::listen()?;
    ctr.ctr(&["task", "kill", "--signal", "SIGKILL", &ctr.id])?
        .success()?;
    events.until(&["/tasks/exit", &ctr.id])?;
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    Ok(())
}

/// What ends while containerd is away has ended as it should when it is back, and what happens then is
/// told.
pub(super) fn ends_while_containerd_is_away(ctr: &Ctr) -> Result<()> {
    let script = "trap 'exit 7' TERM; sleep 1000 & while :; do wait; done";
    ctr.detach(&[], &["sh", "-c", script])?;
    let id = ctr.id.as_str();
    let shim = Shim::of(id)?;
    let place = Place::make("away")?;
    let (fifos, lasting) = Fifos::make(&place, "lasts")?;
    let _reader = fifos.stdout.reader()?;
    let none = Streams::default();
    let start = |exec: &str, streams: &Streams, script: &str| -> Result<()> {
        granted(shim.exec(exec, streams, &["sh", "-c", script]))?;
        granted(shim.start(exec))?;
        Ok(())
    };
    without_containerd(id, || {
        let status = shim.run("whole", &none, &["sh", "-c", "exit 3"])?;
        ensure!(status == 3, "a whole exec ended with {status}");
        start("ended", &none, "exit 4")?;
        granted(shim.wait("ended"))?;
        start("lasts", &lasting, "read line; exit 5")
    })?;

    let events = Events::listen()?;
    ensure!(
        state(ctr)?.is_some_and(|state| state == "RUNNING"),
        "it is lost"
    );
    let ended = granted(shim.state("ended"))?;
    ensure!(
        ended.status() == Status::STOPPED && ended.exit_status() == 4,
        "of the exec that has ended it says {ended:?}"
    );
    granted(shim.delete("ended"))?;
    fifos.stdin.writer()?.write(b"\n")?;
    let exit = events.until(&["/tasks/exit", "lasts"])?;
    ensure!(exit.contains("\"exit_status\":5"), "the event says {exit}");
    drop(events);

    let status = without_containerd(id, || {
        granted(shim.kill("", 15, false))?;
        Ok(granted(shim.wait(""))?.exit_status())
    })?;
    ensure!(status == 7, "it ended with {status}");
    let events = Events::listen()?;
    // containerd buries at once what it finds stopped (some versions do), or leaves that to its users.
    if let Some(state) = state(ctr)? {
        ensure!(state == "STOPPED", "it is {state}");
        ctr.remove_task(7)?;
        events.until(&["/tasks/delete", id])?;
    }
    ctr.ctr(&["container", "rm", id])?.success()?;
    Ok(())
}

fn without_containerd<T>(id: &str, what: impl FnOnce() -> Result<T>) -> Result<T> {
    Victim::Containerd.kill(id)?;
    let done = what();
    host::start_containerd()?;
    done
}

/// What `ctr task ls` says of the scenario's task.
fn state(ctr: &Ctr) -> Result<Option<String>> {
    let listed = ctr.ctr(&["task", "ls"])?.success()?;
    let line = listed.lines().find(|line| line.starts_with(&ctr.id));
    let state = line.and_then(|line| line.split_whitespace().last());
    Ok(state.map(str::to_owned))
}

pub(super) fn shim_killed_while_starting(ctr: &Ctr) -> Result<()> {
    kill_at_each_moment(ctr, Victim::Shim)
}

pub(super) fn vmm_killed_while_starting(ctr: &Ctr) -> Result<()> {
    kill_at_each_moment(ctr, Victim::Vmm)
}

pub(super) fn containerd_killed_while_starting(ctr: &Ctr) -> Result<()> {
    kill_at_each_moment(ctr, Victim::Containerd)
}

fn kill_at_each_moment(ctr: &Ctr, victim: Victim) -> Result<()> {
    let before = crate::leftovers::Machine::look()?;
    let moments = MOMENTS.into_iter().filter(|moment| victim.lives_at(moment));
    for (number, moment) in moments.enumerate() {
        // What containerd has not forgotten of one container yet is nothing to the next.
        let name = format!("{victim:?}-killed-{number}").to_lowercase();
        let ctr = Ctr::new(ctr.runtime(), &name);
        let moment = moment.replace("{id}", &ctr.id);
        kill_at(&ctr, victim, &moment)
            .and_then(|()| {
                ctr.bury();
                before.unchanged()
            })
            .with_context(|| format!("{victim:?} killed at {moment:?}"))?;
    }
    Ok(())
}

fn kill_at(ctr: &Ctr, victim: Victim, moment: &str) -> Result<()> {
    let pod = PathBuf::from("/run/husk/default").join(&ctr.id);
    let child = ctr.spawn(&ctr.id, &[], &["sleep", "1000"], false)?;
    let reached = host::path_becomes(&pod.join(moment), true, Instant::now() + DEADLINE)?;
    if !reached {
        // It ends by itself, by the deadline of all commands at the latest.
        let Ended { status, stderr, .. } = finish(child, None)?;
        bail!("the moment did not come: ctr ended with {status}: {stderr}");
    }
    victim.kill(&ctr.id)?;
    if let Victim::Containerd = victim {
        host::start_containerd()?;
    }
    let ended = end_of(ctr, child, victim)?;
    ensure!(ended.status != 0, "ctr run succeeded");
    Ok(())
}

/// ctr has to end by itself when shim or VMM die. If containerd has come back before the container
/// ran, nobody will ever tell ctr.
fn end_of(ctr: &Ctr, mut child: Child, victim: Victim) -> Result<Ended> {
    if let Victim::Containerd = victim {
        let _ = child.kill();
        let _ = ctr.ctr(&["task", "kill", "--signal", "SIGKILL", &ctr.id])?;
    }
    finish(child, None)
}

/// A file of Husk's own that is missing is named, and the container's start fails at once.
pub(super) fn missing_guest_image(ctr: &Ctr) -> Result<()> {
    for name in ["vmlinux", "initrd.img"] {
        let path = PathBuf::from("/usr/local/share/husk").join(name);
        let hidden = path.with_extension("hidden");
        fs::rename(&path, &hidden).context("cannot hide the image")?;
        let ended = ctr.run(&[], &["true"]);
        fs::rename(&hidden, &path).context("cannot put the image back")?;
        let ended = ended?;
        ensure!(ended.status != 0, "it started without {name}");
        ensure!(ended.stderr.contains(name), "not named: {}", ended.stderr);
        ctr.bury();
    }
    Ok(())
}
