//! Memory: what pods take from the host, and what they give back.
//!
//! A pod's processes are its shim and all that descend from it: the VMM, gVisor's sandbox, the
//! container's own. Shared pages count in parts (PSS), so that figures of many pods add up.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::containers::{self, Container};
use super::processes::Process;
use super::sizes::to_mib;
use super::smaps::{self, Usage};
use super::work;
use crate::record::Subject;

/// How many pods are looked at, and which measure that is.
const CROWDS: [(usize, &str); 3] = [(1, "pss_pod_1"), (10, "pss_pod_10"), (50, "pss_pod_50")];

/// Where the host would begin to swap, if it could.
const AVAILABLE_BYTES_MIN: u64 = 384 * 1024 * 1024;

/// What a container takes and frees.
const HELD_MIB: &str = "256";

/// A guest tells of free pages after two seconds at most, and nobody tells this program of it.
const SETTLING: Duration = Duration::from_secs(6);

const CONFIG: &str = "/etc/husk/config.toml";

/// Enough for what is held, and for the guest's own.
const HOLDING_CONFIG: &str = "[vm]\nmemory_mib = 768\n";

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let runtimes = containers::runtimes()?;
    for subject in &runtimes {
        crowds(bench, *subject)?;
    }
    let directory = work::install()?;
    for subject in &runtimes {
        let given_back = match subject {
            Subject::Husk => with_config(|| give_back(*subject, &directory)),
            _ => give_back(*subject, &directory),
        };
        match given_back {
            Ok((used, kept)) => {
                bench.sample("memory_used", *subject, used)?;
                bench.sample("memory_kept", *subject, kept)?;
            }
            Err(error) => bench.failure("memory_kept", *subject, &error)?,
        }
    }
    Ok(())
}

/// Idle pods, more and more of them.
fn crowds(bench: &mut Bench, subject: Subject) -> Result<()> {
    let mut pods = Vec::new();
    for (count, measure) in CROWDS {
        // A quick run has no time for the most.
        if count > 10 && bench.plan.is_quick {
            break;
        }
        if let Err(error) = grow(&mut pods, subject, count) {
            let error = error.context(format!("{} of {count} pods", pods.len()));
            return bench.failure(measure, subject, &error);
        }
        let usage = usage()?;
        let each = to_mib(usage.pss_bytes) / f64::from(u32::try_from(count)?);
        bench.sample(measure, subject, each)?;
        if count == 1 {
            let host = usage.pss_bytes.saturating_sub(usage.guest_pss_bytes);
            bench.sample("pss_host", subject, to_mib(host))?;
            if subject == Subject::Husk {
                ensure!(usage.guest_rss_bytes > 0, "no guest RAM is seen");
                bench.sample("guest_idle_memory", subject, to_mib(usage.guest_rss_bytes))?;
            }
        }
    }
    for pod in pods {
        pod.kill_and_delete()?;
    }
    Ok(())
}

fn grow(pods: &mut Vec<Container>, subject: Subject, count: usize) -> Result<()> {
    while pods.len() < count {
        let available = smaps::available_bytes()?;
        ensure!(
            available >= AVAILABLE_BYTES_MIN,
            "no more fit: {:.0} MiB are left",
            to_mib(available)
        );
        let id = format!("idle-{}-{:02}", subject.name(), pods.len());
        pods.push(Container::idle(subject, &id)?);
    }
    Ok(())
}

/// Of all pods there are.
fn usage() -> Result<Usage> {
    let all = Process::all()?;
    let mut members: Vec<i32> = Vec::new();
    // A child's number may be lower than its parent's, so until no more are found.
    loop {
        let found: Vec<i32> = all
            .iter()
            .filter(|process| !members.contains(&process.pid))
            .filter(|process| {
                process.name == "containerd-shim" || members.contains(&process.parent)
            })
            .map(|process| process.pid)
            .collect();
        if found.is_empty() {
            break;
        }
        members.extend(found);
    }
    ensure!(!members.is_empty(), "there is no shim");
    let mut sum = Usage::default();
    for pid in members {
        // One that ends meanwhile has no memory any more.
        if let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps")) {
            let usage = Usage::parse(&text).with_context(|| format!("/proc/{pid}/smaps"))?;
            sum = sum.plus(usage);
        }
    }
    Ok(sum)
}

/// MiB more than before, while memory is held, and after it was freed.
fn give_back(subject: Subject, directory: &Path) -> Result<(f64, f64)> {
    let id = format!("hold-{}", subject.name());
    let mount = containers::mount_words(directory);
    let flags = ["--mount", &mount];
    let words = ["/bench/husk-workload", "hold", HELD_MIB];
    let mut running = containers::start_with_input(subject, &id, &flags, &words)?;
    let mut steps = || {
        running.wait_for_line("ready")?;
        let before = usage()?.pss_bytes;
        running.say("\n")?;
        running.wait_for_line("held")?;
        let held = usage()?.pss_bytes;
        running.say("\n")?;
        running.wait_for_line("freed")?;
        std::thread::sleep(SETTLING);
        let freed = usage()?.pss_bytes;
        let above = |bytes: u64| to_mib(bytes.saturating_sub(before));
        Ok((above(held), above(freed)))
    };
    let measured = steps();
    running.end_input();
    let ended = running.finish();
    if measured.is_err() || ended.is_err() {
        containers::bury(&id);
    }
    ended?;
    measured
}

/// Does something while Husk's pods have more memory.
fn with_config<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let path = Path::new(CONFIG);
    ensure!(!path.exists(), "{CONFIG} is there already");
    fs::create_dir_all(path.parent().context("no directory")?)?;
    fs::write(path, HOLDING_CONFIG).with_context(|| format!("cannot write {CONFIG}"))?;
    let done = work();
    fs::remove_file(path).with_context(|| format!("cannot remove {CONFIG}"))?;
    done
}
