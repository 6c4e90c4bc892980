//! One start taken apart: the kernel's trace of programs executed and of virtual CPUs leaving the
//! guest, joined with what the shim logs, all on one clock.

mod parse;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};

use self::parse::{Event, What};
use super::containers;
use crate::record::{Phase, Subject, Trace};

const TRACEFS: &str = "/sys/kernel/tracing";
const LOG: &str = "/var/log/containerd.log";

/// What is traced. All of it together slows a start by less than a per cent.
const EVENTS: [&str; 2] = ["sched/sched_process_exec", "kvm/kvm_exit"];

/// A start makes some thousand events of a hundred bytes.
const BUFFER_KIB: &str = "16384";

/// Where a phase ends.
enum At {
    /// A program of this name is executed, for the n-th time.
    Exec(&'static str, usize),
    /// A virtual CPU has left the guest for the last time.
    LastExit,
    /// A moment that the shim's log tells.
    Logged(&'static str),
    FirstByte,
    End,
}

/// A phase, and where it ends. One whose end is not in the trace is part of the next.
type Mark = (&'static str, At);

const HUSK: &[Mark] = &[
    ("ctr, containerd", At::Exec("containerd-shim-husk-v2", 0)),
    ("shim start", At::Exec("containerd-shim-husk-v2", 1)),
    ("shim serves, Create comes", At::Logged("asked")),
    ("pod's directory and files", At::Logged("prepared")),
    ("VMM is spawned", At::Exec("husk-vmm", 0)),
    ("VMM enters its jail", At::Logged("jailed")),
    ("KVM gets ready", At::Logged("kvm")),
    ("kernel and initrd are loaded", At::Logged("loaded")),
    ("devices and threads", At::Logged("built")),
    ("guest is entered", At::Logged("entered")),
    ("kernel and agent boot, hello", At::Logged("hello")),
    ("container is created", At::Logged("created")),
    ("containerd's Start comes", At::Logged("start")),
    ("container's exec", At::Logged("started")),
    ("first byte", At::FirstByte),
    ("container and guest end", At::LastExit),
    ("VMM and shim end", At::Exec("containerd-shim-husk-v2", 2)),
    ("shim delete, containerd, ctr", At::End),
];

const RUNC: &[Mark] = &[
    ("ctr, containerd", At::Exec("containerd-shim-runc-v2", 0)),
    ("shim start", At::Exec("containerd-shim-runc-v2", 1)),
    ("shim takes Create", At::Exec("runc", 0)),
    ("runc create", At::Exec("runc", 1)),
    ("runc start", At::Exec("echo", 0)),
    ("container runs, first byte", At::FirstByte),
    ("container ends", At::Exec("runc", 2)),
    (
        "runc delete, shim ends",
        At::Exec("containerd-shim-runc-v2", 2),
    ),
    ("shim delete, containerd, ctr", At::End),
];

const GVISOR: &[Mark] = &[
    ("ctr, containerd", At::Exec("containerd-shim-runc-v2", 0)),
    ("shim start", At::Exec("containerd-shim-runc-v2", 1)),
    ("shim takes Create", At::Exec("runsc", 0)),
    ("runsc create, sandbox boots", At::Exec("runsc", 2)),
    ("runsc start, container runs, first byte", At::FirstByte),
    (
        "container ends, runsc delete",
        At::Exec("containerd-shim-runc-v2", 2),
    ),
    ("shim delete, containerd, ctr", At::End),
];

/// What one traced start shows.
pub(super) struct Traced {
    pub(super) trace: Trace,
    /// From when the VMM is about to be spawned to the agent's hello, in seconds.
    pub(super) vmm_to_hello: Option<f64>,
    /// Exits of virtual CPUs, all of them.
    pub(super) exits: usize,
}

/// Runs `echo` in a new container under trace.
pub(super) fn start(subject: Subject, id: &str) -> Result<Traced> {
    let log_began = fs::metadata(LOG).map_or(0, |metadata| metadata.len());
    let tracing = Tracing::begin()?;
    let began = now()?;
    let ended = containers::run(subject, id, &[], &["echo", "hello"]);
    let text = tracing.end()?;
    let ended = ended?;
    let first_byte = ended.first_byte.context("echo said nothing")?;

    let mut events = parse::events(&text)?;
    events.retain(|event| event.at_s >= began);
    let log = fs::read(LOG).with_context(|| format!("cannot read {LOG}"))?;
    let log = log.get(usize::try_from(log_began)?..).unwrap_or_default();
    let logged = parse::log(&String::from_utf8_lossy(log), began);
    let points = Points {
        events: &events,
        logged: &logged,
        began,
        first_byte: first_byte.as_secs_f64(),
        end: ended.took.as_secs_f64(),
    };
    let marks = match subject {
        Subject::Husk => HUSK,
        Subject::Gvisor => GVISOR,
        Subject::Runc | Subject::Host => RUNC,
    };
    let phases = points.phases(marks);
    ensure!(phases.len() > 1, "the trace shows no phases");
    let prepared = points.find(&At::Logged("prepared"));
    let hello = points.find(&At::Logged("hello"));
    Ok(Traced {
        trace: Trace { subject, phases },
        vmm_to_hello: prepared
            .zip(hello)
            .map(|(prepared, hello)| hello - prepared),
        exits: events.iter().filter(|event| event.is_exit()).count(),
    })
}

/// What phases are made from; times in seconds on the monotonic clock, or since `began`.
struct Points<'a> {
    events: &'a [Event],
    logged: &'a HashMap<String, f64>,
    began: f64,
    first_byte: f64,
    end: f64,
}

impl Points<'_> {
    /// In the order of time, which need not be that of the marks: a container's first byte may
    /// come before its shim has heard that it runs.
    fn phases(&self, marks: &[Mark]) -> Vec<Phase> {
        let mut ends: Vec<(f64, String)> = Vec::new();
        let mut skipped: Vec<&str> = Vec::new();
        for (name, at) in marks {
            skipped.push(name);
            if let Some(to_s) = self.find(at) {
                ends.push((to_s, skipped.join(", ")));
                skipped.clear();
            }
        }
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut from_s = 0.0;
        let mut phases = Vec::new();
        for (to_s, name) in ends {
            phases.push(Phase {
                name,
                from_s,
                to_s,
                exits: self.exits(from_s, to_s),
            });
            from_s = to_s;
        }
        phases
    }

    /// Seconds since the command was given.
    fn find(&self, at: &At) -> Option<f64> {
        let mut events = self.events.iter();
        let event = match at {
            At::Exec(name, nth) => events.filter(|event| event.executes(name)).nth(*nth),
            At::LastExit => events.rfind(|event| event.is_exit()),
            At::Logged(point) => return self.logged.get(*point).copied(),
            At::FirstByte => return Some(self.first_byte),
            At::End => return Some(self.end),
        };
        event.map(|event| event.at_s - self.began)
    }

    fn exits(&self, from_s: f64, to_s: f64) -> Vec<(String, u64)> {
        let mut counts: HashMap<&str, u64> = HashMap::new();
        for event in self.events {
            let at_s = event.at_s - self.began;
            if let What::Exit(reason) = &event.what
                && (from_s..to_s).contains(&at_s)
            {
                let count = counts.entry(reason).or_default();
                *count = count.saturating_add(1);
            }
        }
        let mut counts: Vec<_> = counts
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        counts
    }
}

/// The kernel's tracing, on; off again when this goes.
struct Tracing;

impl Tracing {
    fn begin() -> Result<Self> {
        set("tracing_on", "0")?;
        set("trace_clock", "mono")?;
        set("buffer_size_kb", BUFFER_KIB)?;
        for event in EVENTS {
            set(&format!("events/{event}/enable"), "1")?;
        }
        // Opening it for writing empties it.
        set("trace", "")?;
        set("tracing_on", "1")?;
        Ok(Self)
    }

    /// All that was traced.
    fn end(self) -> Result<String> {
        set("tracing_on", "0")?;
        let path = place("trace");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = set("tracing_on", "0");
        for event in EVENTS {
            let _ = set(&format!("events/{event}/enable"), "0");
        }
    }
}

fn place(name: &str) -> PathBuf {
    Path::new(TRACEFS).join(name)
}

fn set(name: &str, value: &str) -> Result<()> {
    let path = place(name);
    fs::write(&path, value).with_context(|| format!("cannot write to {}", path.display()))
}

/// Seconds on the monotonic clock.
fn now() -> Result<f64> {
    let time = clock_gettime(ClockId::Monotonic);
    let since = std::time::Duration::new(
        u64::try_from(time.tv_sec).context("a time before all time")?,
        u32::try_from(time.tv_nsec)?,
    );
    Ok(since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at_s: f64, what: What) -> Event {
        Event { at_s, what }
    }

    fn exec(at_s: f64, path: &str) -> Event {
        event(at_s, What::Exec(path.to_owned()))
    }

    const MARKS: &[Mark] = &[
        ("before", At::Exec("a", 0)),
        ("never seen", At::Exec("no-such", 0)),
        ("between", At::Exec("a", 1)),
        ("after", At::End),
    ];

    fn phases(events: &[Event]) -> Vec<Phase> {
        let points = Points {
            events,
            logged: &HashMap::new(),
            began: 100.0,
            first_byte: 3.0,
            end: 4.0,
        };
        points.phases(MARKS)
    }

    #[test]
    fn phase_whose_end_is_not_in_the_trace_is_part_of_the_next() {
        let phases = phases(&[exec(101.0, "/bin/a"), exec(102.0, "/usr/bin/a")]);
        let names: Vec<_> = phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["before", "never seen, between", "after"]);
        assert_eq!((phases[1].from_s, phases[1].to_s), (1.0, 2.0));
    }

    #[test]
    fn phases_are_in_the_order_of_time() {
        let points = Points {
            events: &[exec(102.0, "/bin/a")],
            logged: &HashMap::new(),
            began: 100.0,
            first_byte: 1.0,
            end: 4.0,
        };
        let phases = points.phases(&[
            ("second", At::Exec("a", 0)),
            ("first", At::FirstByte),
            ("third", At::End),
        ]);
        let names: Vec<_> = phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["first", "second", "third"]);
    }

    #[test]
    fn empty_trace_is_one_phase() {
        assert_eq!(phases(&[]).len(), 1);
    }

    #[test]
    fn exits_count_for_the_phase_they_happen_in() {
        let exit = |at_s, reason: &str| event(at_s, What::Exit(reason.to_owned()));
        let phases = phases(&[
            exec(101.0, "/bin/a"),
            exit(101.1, "hlt"),
            exit(101.2, "npf"),
            exit(101.3, "npf"),
            exec(102.0, "/bin/a"),
            exit(102.5, "io"),
        ]);
        let counts = [("npf".to_owned(), 2), ("hlt".to_owned(), 1)];
        assert_eq!(phases[1].exits, counts);
        assert_eq!(phases[2].exits, [("io".to_owned(), 1)]);
        assert!(phases[0].exits.is_empty());
    }
}
