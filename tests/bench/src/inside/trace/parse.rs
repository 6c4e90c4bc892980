//! Lines of the kernel's trace and of containerd's log.

use std::collections::HashMap;

use anyhow::{Context, Result};

/// The shim's line on a start, which tells the moments of its phases.
const POD_STARTED: &str = "pod started";

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    /// On the monotonic clock.
    pub(super) at_s: f64,
    pub(super) what: What,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum What {
    /// A program was executed.
    Exec(String),
    /// A virtual CPU left the guest, for a reason in KVM's words.
    Exit(String),
}

impl Event {
    /// Whether a program of that name is executed, wherever it lies.
    pub(super) fn executes(&self, name: &str) -> bool {
        match &self.what {
            What::Exec(path) => path.rsplit('/').next() == Some(name),
            _ => false,
        }
    }

    pub(super) fn is_exit(&self) -> bool {
        matches!(self.what, What::Exit(_))
    }
}

/// All events of a trace. A line of another form is an error: a trace that is half understood
/// tells nothing.
pub(super) fn events(text: &str) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let event = event(line).with_context(|| format!("a line of the trace: {line:?}"))?;
        events.push(event);
    }
    Ok(events)
}

/// `TASK-PID [CPU] FLAGS SECONDS: NAME: ARGUMENTS`, where TASK may hold spaces.
fn event(line: &str) -> Option<Event> {
    let mut words = line.split_whitespace();
    let at_s = words.by_ref().find_map(timestamp)?;
    let name = words.next()?.strip_suffix(':')?;
    let what = match name {
        "sched_process_exec" => {
            let (_, rest) = line.split_once("filename=")?;
            let (path, _) = rest.rsplit_once(" pid=")?;
            What::Exec(path.to_owned())
        }
        "kvm_exit" => {
            let reason = words.skip_while(|word| *word != "reason").nth(1)?;
            What::Exit(reason.to_owned())
        }
        _ => return None,
    };
    Some(Event { at_s, what })
}

/// `12.345678:`
fn timestamp(word: &str) -> Option<f64> {
    let number = word.strip_suffix(':')?;
    let is_time = number.contains('.') && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if is_time { number.parse().ok() } else { None }
}

/// The moments that the log of a start tells, in seconds since `began`: every `NAME_us=` of its
/// line, which is on the monotonic clock.
pub(super) fn log(text: &str, began: f64) -> HashMap<String, f64> {
    let mut moments = HashMap::new();
    for line in text.lines() {
        let Some((_, rest)) = line.split_once(POD_STARTED) else {
            continue;
        };
        for word in rest.split_whitespace() {
            let Some((name, value)) = word.split_once("_us=") else {
                continue;
            };
            if let Ok(value) = value.parse::<f64>() {
                let at_s = value / 1e6 - began;
                moments.insert(name.to_owned(), at_s);
            }
        }
    }
    // What lies before the beginning is a duration, or somebody else's.
    moments.retain(|_, at_s| *at_s >= 0.0);
    moments
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXEC: &str = "  tokio rt-[x]-985 [000] .....  26.500691: sched_process_exec: \
        filename=/usr/bin/a b pid=985 old_pid=985";
    const EXIT: &str = "  vcpu 0-994  [000] d..1.  26.671109: kvm_exit: vcpu 0 reason npf rip \
        0x1000123 info1 0x6";

    #[test]
    fn line_of_another_form_is_an_error() {
        let other_event = EXEC.replace("process_exec", "switch");
        let no_time = EXEC.replace("26.500691:", "soon:");
        let no_reason = EXIT.replace("reason", "why");
        let cut = &EXEC[..60];
        for bad in ["x", other_event.as_str(), &no_time, &no_reason, cut] {
            assert!(events(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_with_spaces_do_not_confuse() {
        let text = format!("# tracer: nop\n\n{EXEC}\n{EXIT}\n");
        let events = events(&text).unwrap();
        assert_eq!(events[0].at_s, 26.500_691);
        assert_eq!(events[0].what, What::Exec("/usr/bin/a b".to_owned()));
        assert!(events[0].executes("a b") && !events[0].executes("b"));
        assert_eq!(events[1].what, What::Exit("npf".to_owned()));
    }

    #[test]
    fn log_without_moments_has_none() {
        let words = "INFO pod started pod=x guest_ms=3 hello_us=soon kvm_us=";
        assert!(log(words, 0.0).is_empty());
        assert!(log("something else hello_us=3", 0.0).is_empty());
        assert!(log("pod started guest_own_us=300", 7.0).is_empty());
    }

    #[test]
    fn moments_are_seconds_since_the_beginning() {
        let moments = log("INFO shim: pod started hello_us=7250000 x=1", 7.0);
        assert!((moments["hello"] - 0.25).abs() < 1e-6);
    }
}
