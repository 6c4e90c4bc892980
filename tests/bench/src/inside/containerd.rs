//! containerd with its files in memory.
//!
//! The clock of the deterministic testbed counts instructions; while nothing but a disk has work,
//! it jumps to the next timer. How often that happens depends on the machine below, so that what
//! goes to a disk makes figures that don't repeat. Nothing of what is measured warm needs one.

use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::command;
use super::processes::Process;

/// Where containerd keeps images and snapshots.
const ROOT: &str = "/var/lib/containerd";

/// Where they are for the time of a measurement.
const MEMORY: &str = "/run/husk-bench/containerd";

const LOG: &str = "/var/log/containerd.log";

/// For containerd to end, and to be ready.
const DEADLINE: Duration = Duration::from_secs(120);

/// Copies containerd's files to memory and lets it start again there, for the rest of the
/// testbed's life.
pub(super) fn move_to_memory() -> Result<()> {
    stop()?;
    fs::create_dir_all(MEMORY).with_context(|| format!("cannot make {MEMORY}"))?;
    sh(&["mount", "-t", "tmpfs", "-o", "mode=711", "tmpfs", MEMORY])?;
    sh(&["cp", "-a", &format!("{ROOT}/."), MEMORY])?;
    sh(&["mount", "--bind", MEMORY, ROOT])?;
    start()
}

fn sh(words: &[&str]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no program")?;
    command::run(Command::new(program).args(arguments))?;
    Ok(())
}

fn stop() -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    for process in Process::all()? {
        if process.name == "containerd" && process.has_argument("containerd") {
            process.terminate()?;
            ensure!(process.ends_before(deadline)?, "containerd does not end");
        }
    }
    Ok(())
}

/// Starts it and waits until it is ready, as systemd would hear it (sd_notify(3)).
fn start() -> Result<()> {
    const SOCKET: &str = "/run/husk-bench/ready";
    let _ = fs::remove_file(SOCKET);
    let ready = UnixDatagram::bind(SOCKET).context("cannot make the socket for READY")?;
    ready.set_read_timeout(Some(DEADLINE))?;
    let log = OpenOptions::new().append(true).create(true).open(LOG)?;
    // In a session of its own, as a service: nothing that ends this program ends it.
    Command::new("setsid")
        .arg("containerd")
        .env("NOTIFY_SOCKET", SOCKET)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot run containerd")?;
    let mut buffer = [0; 4096];
    loop {
        let count = match ready.recv(&mut buffer) {
            Ok(count) => count,
            Err(error) => bail!("containerd is not ready: {error}"),
        };
        let said = buffer.get(..count).unwrap_or_default();
        if said
            .split(|byte| *byte == b'\n')
            .any(|word| word == b"READY=1")
        {
            return Ok(());
        }
    }
}
