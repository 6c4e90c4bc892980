//! Scenarios a user meets, through `ctr`, against Husk and runc with the same code.
//!
//! Runs as root where containerd runs: in the testbed. A scenario that runc fails is wrong. After
//! each one the machine is compared with what it was before: processes, mounts, cgroups, sockets
//! and files of a runtime that are left fail the scenario.
//!
//! ```text
//! husk-scenarios [--runtime NAME]... [--only WORD] [--skip WORD]...
//! ```
#![forbid(unsafe_code)]

mod ctr;
mod events;
mod host;
mod leftovers;
mod list;
mod pty;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use ctr::Ctr;
use leftovers::Machine;

/// The runtimes every scenario runs against.
const RUNTIMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.husk.v2"];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("husk-scenarios: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let mut runtimes = Vec::new();
    let mut only = String::new();
    let mut skipped = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--runtime" => runtimes.push(value),
            "--only" => only = value,
            "--skip" => skipped.push(value),
            _ => bail!("unknown argument {argument:?}"),
        }
    }
    if runtimes.is_empty() {
        runtimes.extend(RUNTIMES.map(str::to_owned));
    }
    let (mut passed, mut failed) = (0, 0);
    for runtime in &runtimes {
        for scenario in list::ALL {
            let name = scenario.name;
            let is_asked_for = name.contains(&only) && !skipped.iter().any(|word| name == word);
            if !is_asked_for || (scenario.is_husk_only && !runtime.contains("husk")) {
                continue;
            }
            let began = Instant::now();
            let before = Machine::look()?;
            let mut ctr = Ctr::new(runtime, name);
            let result = (scenario.run)(&mut ctr).and_then(|()| before.unchanged());
            let took = began.elapsed().as_secs_f32();
            match result {
                Ok(()) => {
                    passed += 1;
                    println!("ok      {runtime} {name} ({took:.1} s)");
                }
                Err(error) => {
                    failed += 1;
                    println!("FAILED  {runtime} {name} ({took:.1} s): {error:#}");
                    println!("        containerd's log, where it is more than chat:");
                    for line in host::last_warnings() {
                        println!("        {line}");
                    }
                    ctr.bury();
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0 && passed > 0)
}
