//! Many containers at once.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::containerd;
use super::containers;
use crate::record::Subject;

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let runtimes = containers::runtimes()?;
    containerd::move_to_memory()?;
    for (measure, count, rounds) in [
        ("starts_10", 10, bench.plan.choose(3, 1)),
        ("starts_50", 50, 1),
    ] {
        for subject in &runtimes {
            // Fifty of gVisor take longer than all the rest.
            if *subject == Subject::Gvisor && (count > 10 || bench.plan.is_quick) {
                continue;
            }
            for round in 0..rounds {
                let prefix = format!("many-{}-{count}-{round}", subject.name());
                let took = at_once(*subject, &prefix, count);
                bench.sample_or_failure(measure, *subject, took)?;
            }
        }
    }
    Ok(())
}

/// A machine that says nothing for long is taken for one that stands still.
const TOLD_OF_EACH: usize = 10;

/// Seconds until the last of them has ended, if all have succeeded.
fn at_once(subject: Subject, prefix: &str, count: u32) -> Result<f64> {
    let ids: Vec<_> = (0..count).map(|n| format!("{prefix}-{n:02}")).collect();
    let began = Instant::now();
    let mut started = Vec::new();
    for id in &ids {
        started.push(containers::start(subject, id, &[], &["true"]));
    }
    let mut failures = Vec::new();
    for (ended, running) in started.into_iter().enumerate() {
        if ended > 0 && ended.is_multiple_of(TOLD_OF_EACH) {
            eprintln!("bench: {ended} of {count} have ended");
        }
        if let Err(error) = running.and_then(super::command::Running::finish) {
            failures.push(error);
        }
    }
    let took = began.elapsed().as_secs_f64();
    if let Some(first) = failures.first() {
        ids.iter().for_each(|id| containers::bury(id));
        let first = format!("{first:#}");
        return Err(anyhow::anyhow!(first))
            .with_context(|| format!("{} of {count} failed; one of them", failures.len()));
    }
    ensure!(took > 0.0, "no time has passed");
    Ok(took)
}
