//! The processes of the machine.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A process that somebody else has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    /// At most 15 characters, as the kernel keeps it.
    pub(super) name: String,
    arguments: Vec<u8>,
}

impl Process {
    /// All there are.
    pub(super) fn all() -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc").context("cannot list /proc")? {
            let directory = entry?.path();
            let pid = directory.file_name().and_then(OsStr::to_str);
            let Some(pid) = pid.and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A process may end while it is looked at.
            let Ok(stat) = fs::read_to_string(directory.join("stat")) else {
                continue;
            };
            let (name, parent) = parse_stat(&stat)
                .with_context(|| format!("/proc/{pid}/stat has another form: {stat:?}"))?;
            all.push(Self {
                pid,
                parent,
                name: name.to_owned(),
                arguments: fs::read(directory.join("cmdline")).unwrap_or_default(),
            });
        }
        Ok(all)
    }

    /// Whether one of its arguments is this word.
    pub(super) fn has_argument(&self, word: &str) -> bool {
        let mut arguments = self.arguments.split(|byte| *byte == 0);
        arguments.any(|argument| argument == word.as_bytes())
    }

    pub(super) fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("no pid")?;
        kill_process(pid, Signal::TERM).with_context(|| format!("cannot end {}", self.name))
    }

    /// Waits for its end; `false` if it does not come in time.
    pub(super) fn ends_before(&self, deadline: Instant) -> Result<bool> {
        let pid = Pid::from_raw(self.pid).context("no pid")?;
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(true),
            Err(error) => return Err(error).context("cannot watch a process"),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::try_from(left)?))? > 0)
    }
}

/// Name and parent from `/proc/PID/stat`, where the name may hold anything.
fn parse_stat(stat: &str) -> Option<(&str, i32)> {
    let (_, rest) = stat.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let parent = rest.split_whitespace().nth(1)?;
    Some((name, parent.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_another_form_is_refused() {
        for bad in ["", "1 sh S 0", "1 (sh", "1 (sh) S", "1 (sh) S x 1"] {
            assert_eq!(parse_stat(bad), None, "{bad}");
        }
    }

    #[test]
    fn name_may_hold_parentheses_and_spaces() {
        assert_eq!(parse_stat("7 (a) (b) c) S 3 7 7"), Some(("a) (b) c", 3)));
    }
}
