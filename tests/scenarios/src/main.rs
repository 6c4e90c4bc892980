//! Scenarios a user meets, through `ctr`, against Husk and runc with the same code.
//!
//! Runs as root where containerd runs: in the testbed. A scenario that runc fails is wrong. After
//! each one the machine is compared with what it was before: processes, mounts, cgroups, sockets
//! and files of a runtime that are left fail the scenario.
//!
//! ```text
//! husk-scenarios [--tier core|whole|full] [--runtime NAME]... [--only WORD]... [--skip NAME]...
//!                [--shard I/N] [--again NAME] [--results FILE --version VERSION]
//! husk-scenarios table|second-tries|summary FILE...
//! ```
//!
//! `--only` takes a word of a scenario's name, `--shard` every Nth of what there is to run;
//! `--results` appends what came of them to a file, from which `table` makes a table,
//! `second-tries` a list of what to try again, and `summary` a verdict. What that file tells of
//! already is not run: so a new machine goes on where one stood still. `--again` is the second try
//! of one.
#![forbid(unsafe_code)]

mod ctr;
mod docker;
mod events;
mod fifo;
mod guest;
mod host;
mod kubelet;
mod leftovers;
mod list;
mod pty;
mod shim;
mod spec;
mod table;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use ctr::Ctr;
use leftovers::Machine;
use list::{Scenario, Tier};
use table::{Line, Outcome};

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
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((first, files)) if first == "table" => {
            print!("{}", table::markdown(&read_results(files)?));
            Ok(true)
        }
        Some((first, files)) if first == "second-tries" => {
            print!("{}", table::second_tries(&read_results(files)?));
            Ok(true)
        }
        Some((first, files)) if first == "summary" => {
            let summary = table::summary(&read_results(files)?);
            print!("{}", summary.text);
            Ok(summary.is_good)
        }
        _ => run_all(&Selection::parse(arguments)?),
    }
}

/// What the command line asks for.
struct Selection {
    runtimes: Vec<String>,
    tier: Tier,
    /// Words of names; none: all.
    only: Vec<String>,
    skipped: Vec<String>,
    /// The one that is tried a second time.
    again: Option<String>,
    /// Which part of how many.
    shard: (usize, usize),
    results: Option<PathBuf>,
    /// What the results say of containerd.
    version: String,
}

impl Selection {
    fn parse(arguments: Vec<String>) -> Result<Self> {
        let mut selection = Self {
            runtimes: Vec::new(),
            tier: Tier::Whole,
            only: Vec::new(),
            skipped: Vec::new(),
            again: None,
            shard: (1, 1),
            results: None,
            version: String::new(),
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let value = arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))?;
            match argument.as_str() {
                "--runtime" => selection.runtimes.push(value),
                "--only" => selection.only.push(value),
                "--again" => selection.again = Some(value),
                "--skip" => selection.skipped.push(value),
                "--tier" => {
                    selection.tier =
                        Tier::named(&value).with_context(|| format!("no tier is {value:?}"))?;
                }
                "--shard" => {
                    selection.shard =
                        parse_shard(&value).with_context(|| format!("no shard is {value:?}"))?;
                }
                "--results" => selection.results = Some(value.into()),
                "--version" => selection.version = value,
                _ => bail!("unknown argument {argument:?}"),
            }
        }
        if selection.runtimes.is_empty() {
            selection.runtimes.extend(RUNTIMES.map(str::to_owned));
        }
        Ok(selection)
    }

    /// What is to be run, in its order.
    fn scenarios(&self) -> Vec<(&str, &'static Scenario)> {
        let is_named = |name: &str| match &self.again {
            Some(again) => again == name,
            None => {
                self.only.is_empty() || self.only.iter().any(|word| name.contains(word.as_str()))
            }
        };
        let mut chosen = Vec::new();
        for runtime in &self.runtimes {
            for scenario in list::ALL {
                let is_asked_for = is_named(scenario.name)
                    && scenario.tier <= self.tier
                    && scenario.is_for(&self.version)
                    && !self.skipped.iter().any(|name| name == scenario.name);
                if is_asked_for && (!scenario.is_husk_only || runtime.contains("husk")) {
                    chosen.push((runtime.as_str(), scenario));
                }
            }
        }
        let (which, of) = self.shard;
        chosen.into_iter().skip(which - 1).step_by(of).collect()
    }

    /// What the file of results tells already.
    fn earlier(&self) -> Result<Vec<Line>> {
        match &self.results {
            Some(path) if path.exists() => read_results(&[path.display().to_string()]),
            _ => Ok(Vec::new()),
        }
    }

    fn record(&self, line: &Line) -> Result<()> {
        let Some(path) = &self.results else {
            return Ok(());
        };
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .and_then(|mut file| file.write_all(line.write().as_bytes()))
            .with_context(|| format!("cannot write {path:?}"))
    }
}

/// `I/N`, with I from 1 to N.
fn parse_shard(text: &str) -> Option<(usize, usize)> {
    let (which, of) = text.split_once('/')?;
    let (which, of) = (which.parse().ok()?, of.parse().ok()?);
    (1..=of).contains(&which).then_some((which, of))
}

fn run_all(selection: &Selection) -> Result<bool> {
    let scenarios = selection.scenarios();
    ensure!(!scenarios.is_empty(), "there is no such scenario");
    let earlier = selection.earlier()?;
    let (mut passed, mut failed) = (0, 0);
    for (runtime, scenario) in scenarios {
        let name = scenario.name;
        if let Some(line) = earlier.iter().find(|line| line.is_of(runtime, name)) {
            match &line.outcome {
                Outcome::Passed | Outcome::PassedAgain => passed += 1,
                Outcome::Failed(reason) => {
                    failed += 1;
                    println!("FAILED  {runtime} {name}, in an earlier machine: {reason}");
                }
            }
            continue;
        }
        selection.record(&Line::begun(&selection.version, runtime, name))?;
        let began = Instant::now();
        let before = Machine::look()?;
        let mut ctr = Ctr::new(runtime, name);
        let result = (scenario.run)(&mut ctr).and_then(|()| before.unchanged());
        let took = began.elapsed().as_secs_f32();
        let outcome = match result {
            Ok(()) => {
                passed += 1;
                println!("ok      {runtime} {name} ({took:.1} s)");
                match selection.again {
                    Some(_) => Outcome::PassedAgain,
                    None => Outcome::Passed,
                }
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {runtime} {name} ({took:.1} s): {error:#}");
                println!("        containerd's log, where it is more than chat:");
                for line in host::last_warnings() {
                    println!("        {line}");
                }
                ctr.bury();
                Outcome::failed(&format!("{error:#}"))
            }
        };
        selection.record(&Line {
            version: selection.version.clone(),
            runtime: runtime.to_owned(),
            scenario: name.to_owned(),
            outcome,
            seconds: took,
        })?;
    }
    kubelet::end();
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

fn read_results(files: &[String]) -> Result<Vec<Line>> {
    let mut texts = Vec::new();
    for file in files {
        texts.push(fs::read_to_string(file).with_context(|| format!("cannot read {file:?}"))?);
    }
    table::parse(texts.iter().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_that_is_none_is_refused() {
        for text in ["", "1", "0/2", "3/2", "a/2", "1/"] {
            assert_eq!(parse_shard(text), None, "{text:?}");
        }
        assert_eq!(parse_shard("2/3"), Some((2, 3)));
    }

    #[test]
    fn shards_together_are_the_whole() {
        let chosen = |shard: &str| {
            let arguments = ["--shard", shard].map(str::to_owned).to_vec();
            let selection = Selection::parse(arguments).unwrap();
            let scenarios = selection.scenarios();
            scenarios
                .iter()
                .map(|(runtime, scenario)| format!("{runtime} {}", scenario.name))
                .collect::<Vec<_>>()
        };
        let mut parts = [chosen("1/2"), chosen("2/2")].concat();
        let mut whole = chosen("1/1");
        parts.sort();
        whole.sort();
        assert_eq!(parts, whole);
    }
}
