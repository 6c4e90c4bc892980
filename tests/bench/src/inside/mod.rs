//! What runs in the testbed: it runs containers, and takes the time.

mod command;
mod concurrent;
mod containerd;
mod containers;
mod files;
mod memory;
mod network;
mod pods;
mod processes;
mod sizes;
mod smaps;
mod starts;
mod trace;
mod work;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::record::{Record, Subject, Writer};

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) is_quick: bool,
}

impl Plan {
    /// One number for a full run and one for a quick one.
    fn choose<T>(self, full: T, quick: T) -> T {
        if self.is_quick { quick } else { full }
    }
}

/// Takes the measures of some suites and appends what it finds to a file. A suite that fails does
/// not keep the next from being tried.
pub(crate) fn measure(suites: &[PathBuf], out: &Path, plan: Plan) -> Result<()> {
    let writer =
        Writer::append(out).with_context(|| format!("cannot write to {}", out.display()))?;
    let mut bench = Bench { plan, writer };
    ensure!(!suites.is_empty(), "no suite is named");
    let mut failed = Vec::new();
    for suite in suites {
        if let Err(error) = run(suite, &mut bench) {
            failed.push(format!("{}: {error:#}", suite.display()));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

fn run(suite: &Path, bench: &mut Bench) -> Result<()> {
    match suite.to_str() {
        Some("starts") => starts::measure(bench),
        Some("cold") => starts::measure_cold(bench),
        Some("concurrent") => concurrent::measure(bench),
        Some("memory") => memory::measure(bench),
        Some("files") => files::measure(bench),
        Some("network") => network::measure(bench),
        Some("pods") => pods::measure(bench),
        Some("sizes") => sizes::measure(bench),
        _ => bail!("no such suite"),
    }
}

/// Where measures go.
struct Bench {
    plan: Plan,
    writer: Writer,
}

impl Bench {
    /// Takes a value.
    fn sample(&mut self, measure: &str, subject: Subject, value: f64) -> Result<()> {
        eprintln!("bench: {measure} {subject} {value:.3}");
        self.write(&Record::Sample {
            measure: measure.to_owned(),
            subject,
            value,
        })
    }

    /// Takes what came of measuring: a value, or why there is none. Only a record that can't be
    /// written is an error, since the other measures may still go well.
    fn sample_or_failure(
        &mut self,
        measure: &str,
        subject: Subject,
        value: Result<f64>,
    ) -> Result<()> {
        match value {
            Ok(value) => self.sample(measure, subject, value),
            Err(error) => self.failure(measure, subject, &error),
        }
    }

    fn failure(&mut self, measure: &str, subject: Subject, error: &anyhow::Error) -> Result<()> {
        let why = format!("{error:#}");
        eprintln!("bench: {measure} {subject}: {why}");
        self.write(&Record::Failure {
            measure: measure.to_owned(),
            subject,
            why,
        })
    }

    fn write(&mut self, record: &Record) -> Result<()> {
        self.writer.write(record).context("cannot write a record")
    }
}
