//! Containers one at a time: start, exec, kill; warm and cold.

use std::fs;

use anyhow::{Context, Result};

use super::Bench;
use super::containerd;
use super::containers::{self, Container};
use super::trace;
use crate::record::{Record, Subject};

/// Runs that are not counted: they fill caches.
const WARM_UPS: u32 = 2;

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let runtimes = containers::runtimes()?;
    containerd::move_to_memory()?;
    warm_starts(bench, &runtimes)?;
    for subject in &runtimes {
        traced_starts(bench, *subject)?;
        execs(bench, *subject)?;
        kills(bench, *subject)?;
    }
    Ok(())
}

/// The runtimes take turns, so that what drifts drifts for all of them.
fn warm_starts(bench: &mut Bench, runtimes: &[Subject]) -> Result<()> {
    let rounds = WARM_UPS + bench.plan.choose(15, 7);
    for round in 0..rounds {
        for subject in runtimes {
            let id = format!("start-{}-{round:02}", subject.name());
            let ended = containers::run(*subject, &id, &[], &["echo", "hello"]);
            if round < WARM_UPS && ended.is_ok() {
                continue;
            }
            let (total, first) = split(ended);
            bench.sample_or_failure("start_total", *subject, total)?;
            bench.sample_or_failure("start_first_byte", *subject, first)?;
        }
    }
    Ok(())
}

/// The page cache, directory entries and inodes are dropped before each: files come from the disk.
/// For a machine with an ordinary clock; the other kind jumps while a disk works.
pub(super) fn measure_cold(bench: &mut Bench) -> Result<()> {
    let runtimes = containers::runtimes()?;
    for round in 0..bench.plan.choose(3, 1) {
        for subject in &runtimes {
            rustix::fs::sync();
            fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop caches")?;
            let id = format!("cold-{}-{round:02}", subject.name());
            let ended = containers::run(*subject, &id, &[], &["echo", "hello"]);
            let (total, first) = split(ended);
            bench.sample_or_failure("start_total_cold", *subject, total)?;
            bench.sample_or_failure("start_first_byte_cold", *subject, first)?;
        }
    }
    Ok(())
}

/// Seconds to the end, and to the first byte.
fn split(ended: Result<super::command::Ended>) -> (Result<f64>, Result<f64>) {
    match ended {
        Ok(ended) => (
            Ok(ended.took.as_secs_f64()),
            ended
                .first_byte
                .map(|first| first.as_secs_f64())
                .context("echo said nothing"),
        ),
        Err(error) => {
            let again = anyhow::anyhow!("{error:#}");
            (Err(error), Err(again))
        }
    }
}

/// Apart from those that are timed, since tracing takes time as well.
fn traced_starts(bench: &mut Bench, subject: Subject) -> Result<()> {
    for round in 0..TRACES {
        let id = format!("trace-{}-{round}", subject.name());
        let traced = match trace::start(subject, &id) {
            Ok(traced) => traced,
            Err(error) => return bench.failure("vmm_to_hello", subject, &error),
        };
        if subject == Subject::Husk {
            let hello = traced.vmm_to_hello;
            let hello = hello.context("the shim's log does not say when the agent said hello");
            bench.sample_or_failure("vmm_to_hello", subject, hello)?;
            let exits = u32::try_from(traced.exits)?;
            bench.sample("start_exits", subject, f64::from(exits))?;
        }
        if round + 1 == TRACES {
            bench.write(&Record::Trace(traced.trace))?;
        }
    }
    Ok(())
}

/// The last one is told in full: the first finds tracing not set up.
const TRACES: u32 = 3;

fn execs(bench: &mut Bench, subject: Subject) -> Result<()> {
    let rounds = WARM_UPS + bench.plan.choose(15, 7);
    let container = match Container::idle(subject, &format!("exec-{}", subject.name())) {
        Ok(container) => container,
        Err(error) => return bench.failure("exec_true", subject, &error),
    };
    for round in 0..rounds {
        let ended = container.exec(&format!("e{round:02}"), &["true"]);
        if round < WARM_UPS && ended.is_ok() {
            continue;
        }
        let took = ended.map(|ended| ended.took.as_secs_f64());
        bench.sample_or_failure("exec_true", subject, took)?;
    }
    Ok(())
}

fn kills(bench: &mut Bench, subject: Subject) -> Result<()> {
    for round in 0..bench.plan.choose(9, 5) {
        let id = format!("kill-{}-{round:02}", subject.name());
        let took = Container::idle(subject, &id)
            .and_then(Container::kill_and_delete)
            .map(|ended| ended.took.as_secs_f64());
        bench.sample_or_failure("kill_delete", subject, took)?;
    }
    Ok(())
}
