//! What is set on a process from outside: resource limits, what the OOM killer thinks of it, and
//! its scheduling. The agent has every right to; the process may have none, in a user namespace say.

use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::CpuSet;

use crate::oci::{CpuAffinity, IoPriority, Process, Scheduler};
use crate::plan::Failure;
use crate::sys::{self, SchedulingAttributes};

/// A process's attributes, checked.
#[derive(Debug)]
pub struct Attributes {
    limits: Vec<(String, Resource, Rlimit)>,
    oom_score_adj: Option<i32>,
    scheduling: Option<SchedulingAttributes>,
    io_priority: Option<u32>,
    affinity: Option<CpuSet>,
}

impl Attributes {
    /// Takes them from a process of a spec. Only a process that enters a container that is there
    /// (`is_exec`) has an affinity of its own.
    pub fn parse(process: &Process, is_exec: bool) -> Result<Attributes, Failure> {
        let affinity = process.exec_cpu_affinity.as_ref().filter(|_| is_exec);
        Ok(Attributes {
            limits: process
                .rlimits
                .iter()
                .map(limit)
                .collect::<Result<_, _>>()?,
            oom_score_adj: process.oom_score_adj.map(oom_score).transpose()?,
            scheduling: process.scheduler.as_ref().map(scheduling).transpose()?,
            io_priority: process.io_priority.as_ref().map(io_priority).transpose()?,
            affinity: affinity.map_or(Ok(None), last_affinity)?,
        })
    }

    /// Sets the limits of a process that is root still: to limit a user takes a further right.
    pub fn apply_limits(&self, pid: Pid) -> Result<(), Failure> {
        for (name, resource, value) in &self.limits {
            rustix::process::prlimit(Some(pid), *resource, *value).map_err(failed(&format!(
                "set {name} to {}:{}",
                text_of(value.current),
                text_of(value.maximum)
            )))?;
        }
        if let Some(score) = self.oom_score_adj {
            let path = format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero());
            std::fs::write(path, score.to_string())
                .map_err(failed(&format!("set oom_score_adj to {score}")))?;
        }
        Ok(())
    }

    /// Sets how a process that is ready to run is scheduled.
    pub fn apply_scheduling(&self, pid: Pid) -> Result<(), Failure> {
        let number = pid.as_raw_nonzero().get();
        if let Some(priority) = self.io_priority {
            sys::set_io_priority(number, priority)
                .map_err(failed("set the I/O priority (process.ioPriority)"))?;
        }
        if let Some(affinity) = &self.affinity {
            rustix::thread::sched_setaffinity(Some(pid), affinity)
                .map_err(failed("set the CPUs (process.execCPUAffinity.final)"))?;
        }
        if let Some(scheduling) = &self.scheduling {
            sys::set_scheduling(number, scheduling)
                .map_err(failed("set the scheduling (process.scheduler)"))?;
        }
        Ok(())
    }
}

fn refusal(text: String) -> Failure {
    Failure {
        text,
        is_request_at_fault: true,
    }
}

/// What the kernel refuses here was asked for by the spec.
fn failed<E: Into<std::io::Error>>(step: &str) -> impl FnOnce(E) -> Failure {
    let step = step.to_owned();
    move |error| refusal(format!("cannot {step}: {}", error.into()))
}

fn text_of(limit: Option<u64>) -> String {
    limit.map_or("unlimited".to_owned(), |value| value.to_string())
}

fn limit(limit: &crate::oci::Rlimit) -> Result<(String, Resource, Rlimit), Failure> {
    let resource = resource_named(&limit.kind)?;
    let value = |value| (value != u64::MAX).then_some(value);
    let new = Rlimit {
        current: value(limit.soft),
        maximum: value(limit.hard),
    };
    if limit.soft > limit.hard {
        return Err(refusal(format!(
            "process.rlimits: {} has a soft limit of {} above its hard limit of {}",
            limit.kind, limit.soft, limit.hard
        )));
    }
    Ok((limit.kind.clone(), resource, new))
}

fn resource_named(name: &str) -> Result<Resource, Failure> {
    Ok(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return Err(refusal(format!("process.rlimits: {name:?} is not a limit"))),
    })
}

fn oom_score(score: i32) -> Result<i32, Failure> {
    if OOM_SCORES.contains(&score) {
        return Ok(score);
    }
    Err(refusal(format!(
        "process.oomScoreAdj: {score} is not between -1000 and 1000"
    )))
}

/// linux/oom.h: OOM_SCORE_ADJ_MIN to OOM_SCORE_ADJ_MAX.
const OOM_SCORES: std::ops::RangeInclusive<i32> = -1000..=1000;

fn scheduling(scheduler: &Scheduler) -> Result<SchedulingAttributes, Failure> {
    let refuse = |text: String| Err(refusal(format!("process.scheduler: {text}")));
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => libc::SCHED_OTHER,
        "SCHED_FIFO" => libc::SCHED_FIFO,
        "SCHED_RR" => libc::SCHED_RR,
        "SCHED_BATCH" => libc::SCHED_BATCH,
        // A number that Linux keeps free, and refuses.
        "SCHED_ISO" => SCHED_ISO,
        "SCHED_IDLE" => libc::SCHED_IDLE,
        "SCHED_DEADLINE" => libc::SCHED_DEADLINE,
        other => return refuse(format!("{other:?} is not a policy")),
    };
    if !NICE.contains(&scheduler.nice) {
        return refuse(format!(
            "a nice of {} is not between -20 and 19",
            scheduler.nice
        ));
    }
    let is_realtime = matches!(policy, libc::SCHED_FIFO | libc::SCHED_RR);
    if scheduler.priority != 0 && !is_realtime {
        return refuse("a priority goes with SCHED_FIFO and SCHED_RR only".into());
    }
    let has_times = scheduler.runtime | scheduler.deadline | scheduler.period != 0;
    if has_times && policy != libc::SCHED_DEADLINE {
        return refuse("runtime, deadline and period go with SCHED_DEADLINE only".into());
    }
    let Ok(priority) = u32::try_from(scheduler.priority) else {
        return refuse(format!("the priority {} is negative", scheduler.priority));
    };
    let mut flags = 0;
    for name in &scheduler.flags {
        let Some((_, flag)) = SCHEDULER_FLAGS.iter().find(|(known, _)| known == name) else {
            return refuse(format!("{name:?} is not a flag"));
        };
        flags |= flag;
    }
    Ok(SchedulingAttributes {
        policy: policy.unsigned_abs(),
        flags,
        nice: scheduler.nice,
        priority,
        runtime_ns: scheduler.runtime,
        deadline_ns: scheduler.deadline,
        period_ns: scheduler.period,
    })
}

const NICE: std::ops::RangeInclusive<i32> = -20..=19;

/// linux/sched.h. Two have another name where the host has read the spec into types.
const SCHED_ISO: i32 = 4;
const SCHEDULER_FLAGS: [(&str, u64); 9] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_D_L_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

/// The number that ioprio_set takes.
fn io_priority(wanted: &IoPriority) -> Result<u32, Failure> {
    let class = match wanted.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => {
            return Err(refusal(format!(
                "process.ioPriority: {other:?} is not a class"
            )));
        }
    };
    match u32::try_from(wanted.priority) {
        Ok(priority @ 0..=7) => Ok(class << IOPRIO_CLASS_SHIFT | priority),
        _ => Err(refusal(format!(
            "process.ioPriority: the priority {} is not between 0 and 7",
            wanted.priority
        ))),
    }
}

/// linux/ioprio.h.
const IOPRIO_CLASS_SHIFT: u32 = 13;

/// The CPUs to run on until the process is in its container.
pub fn first_affinity(affinity: &CpuAffinity) -> Result<Option<CpuSet>, Failure> {
    cpu_set("process.execCPUAffinity.initial", &affinity.initial)
}

fn last_affinity(affinity: &CpuAffinity) -> Result<Option<CpuSet>, Failure> {
    // Checked here as well, so that a bad one is refused before anything is started.
    first_affinity(affinity)?;
    cpu_set("process.execCPUAffinity.final", &affinity.last)
}

/// A list like `0-3,7`; an empty one is none.
fn cpu_set(name: &str, list: &str) -> Result<Option<CpuSet>, Failure> {
    if list.trim().is_empty() {
        return Ok(None);
    }
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok();
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last && last < CpuSet::MAX_CPU => {
                (first..=last).for_each(|cpu| set.set(cpu));
            }
            _ => return Err(refusal(format!("{name}: {list:?} is not a list of CPUs"))),
        }
    }
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(process: &str) -> Result<Attributes, Failure> {
        let process: Process = serde_json::from_str(process).unwrap();
        Attributes::parse(&process, true)
    }

    fn refused(process: &str) -> String {
        let failure = parse(process).unwrap_err();
        assert!(failure.is_request_at_fault);
        failure.text
    }

    #[test]
    fn limits_that_can_not_be_are_refused() {
        let unknown = refused(r#"{"rlimits":[{"type":"RLIMIT_LUCK","soft":1,"hard":1}]}"#);
        assert!(unknown.contains("RLIMIT_LUCK"), "{unknown}");
        let reversed = refused(r#"{"rlimits":[{"type":"RLIMIT_NOFILE","soft":2,"hard":1}]}"#);
        assert!(reversed.contains("RLIMIT_NOFILE"), "{reversed}");
    }

    #[test]
    fn oom_score_out_of_range_is_refused() {
        for score in [-1001, 1001] {
            refused(&format!(r#"{{"oomScoreAdj":{score}}}"#));
        }
    }

    #[test]
    fn schedulers_that_can_not_be_are_refused() {
        for (scheduler, word) in [
            (r#"{"policy":"SCHED_LUCK"}"#, "SCHED_LUCK"),
            (r#"{"policy":""}"#, "policy"),
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "20"),
            (r#"{"policy":"SCHED_OTHER","priority":1}"#, "priority"),
            (r#"{"policy":"SCHED_FIFO","priority":-1}"#, "-1"),
            (r#"{"policy":"SCHED_RR","runtime":1}"#, "SCHED_DEADLINE"),
            (
                r#"{"policy":"SCHED_OTHER","flags":["SCHED_FLAG_X"]}"#,
                "SCHED_FLAG_X",
            ),
        ] {
            let text = refused(&format!(r#"{{"scheduler":{scheduler}}}"#));
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn scheduler_is_understood() {
        let text = r#"{"scheduler":{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,"period":3,
            "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN"]}}"#;
        let scheduling = parse(text).unwrap().scheduling.unwrap();
        assert_eq!((scheduling.policy, scheduling.flags), (6, 5));
        let times = (
            scheduling.runtime_ns,
            scheduling.deadline_ns,
            scheduling.period_ns,
        );
        assert_eq!(times, (1, 2, 3));
    }

    #[test]
    fn io_priorities_that_can_not_be_are_refused() {
        refused(r#"{"ioPriority":{"class":"IOPRIO_CLASS_NONE","priority":1}}"#);
        refused(r#"{"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}}"#);
        refused(r#"{"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":-1}}"#);
    }

    #[test]
    fn io_priority_is_a_class_and_a_number() {
        let text = r#"{"ioPriority":{"class":"IOPRIO_CLASS_IDLE","priority":5}}"#;
        assert_eq!(parse(text).unwrap().io_priority, Some(0x6005));
    }

    #[test]
    fn lists_that_are_no_cpus_are_refused() {
        for list in ["a", "3-1", "1-", "-1", "1,,2", "0-99999999999", "1024"] {
            refused(&format!(r#"{{"execCPUAffinity":{{"initial":"{list}"}}}}"#));
            refused(&format!(r#"{{"execCPUAffinity":{{"final":"{list}"}}}}"#));
        }
    }

    #[test]
    fn list_of_cpus_is_read() {
        let set = cpu_set("x", "0-2, 7").unwrap().unwrap();
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|&cpu| set.is_set(cpu))
            .collect();
        assert_eq!(cpus, [0, 1, 2, 7]);
        assert!(cpu_set("x", "").unwrap().is_none());
    }
}
