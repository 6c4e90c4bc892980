//! `husk-cri`: CRI for scripts, in the testbed.
//!
//! ```text
//! husk-cri serve NAME                     runs a containerd with CRI until it is killed; prints its socket
//! husk-cri pod SOCKET HANDLER COMMAND...  one pod with one container, to the container's end; tells times
//! ```
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_cri::{Cri, Daemon, Events, container, pod};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["serve", name] => serve(name),
        ["pod", socket, handler, command @ ..] => run_pod(Path::new(socket), handler, command),
        _ => Err(anyhow::anyhow!(
            "usage: serve NAME | pod SOCKET HANDLER COMMAND..."
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-cri: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(name: &str) -> Result<()> {
    let mut daemon = Daemon::start(name)?;
    println!("{}", daemon.socket().display());
    std::io::stdout().flush()?;
    daemon.wait()
}

/// A pod's life; each step's milliseconds go to standard error, and the log to standard output.
fn run_pod(socket: &Path, handler: &str, command: &[&str]) -> Result<()> {
    let cri = Cri::connect(socket)?;
    let mut events = Events::listen(socket)?;
    let mut began = Instant::now();
    let mut tell = |step: &str| {
        eprintln!("{step} {} ms", began.elapsed().as_millis());
        began = Instant::now();
    };
    let name = format!("p{}", std::process::id());
    let config = pod(&name);
    let log = format!("{}/c.log", config.log_directory);
    let pod = cri.run_pod(handler, config)?;
    tell("run_pod");
    let ended = || -> Result<()> {
        let id = cri.create_container(&pod, container("c", command))?;
        tell("create_container");
        cri.start_container(&id)?;
        tell("start_container");
        events.stopped(&id, DEADLINE)?;
        tell("stopped");
        let status = cri.container_status(&id)?;
        eprintln!("exit_code {}", status.exit_code);
        Ok(())
    }();
    let log = std::fs::read_to_string(&log).with_context(|| format!("cannot read {log}"));
    cri.stop_pod(&pod.id)?;
    eprintln!("stop_pod");
    cri.remove_pod(&pod.id)?;
    eprintln!("remove_pod");
    ended?;
    print!("{}", log?);
    Ok(())
}

/// For the command to end.
const DEADLINE: Duration = Duration::from_secs(300);
