//! Processes by pidfd: a pid alone may mean another process by the time it is used.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use crate::readiness;

/// A child of this process.
#[derive(Debug)]
pub(crate) struct Child {
    pidfd: Arc<OwnedFd>,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It is gone, but somebody else has taken its status.
    Unknown,
}

impl Child {
    /// A child that has not been waited for.
    pub(crate) fn from_pid(pid: Pid) -> io::Result<Self> {
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self::from_pidfd(pidfd))
    }

    /// The child behind a pidfd.
    pub(crate) fn from_pidfd(pidfd: OwnedFd) -> Self {
        Self {
            pidfd: Arc::new(pidfd),
        }
    }

    /// Sends SIGKILL; a child that has ended is no error.
    pub(crate) fn kill(&self) {
        // ESRCH is the one way this can fail on a child of ours.
        let _ = rustix::process::pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Waits until the child has ended, and reaps it.
    pub(crate) async fn wait(&self) -> Ending {
        loop {
            if let Some(ending) = self.reap() {
                return ending;
            }
            // A pidfd becomes readable as its process ends.
            let Ok(watched) = readiness::watch(Arc::clone(&self.pidfd), Interest::READABLE) else {
                return Ending::Unknown;
            };
            if watched.readable().await.is_err() {
                return Ending::Unknown;
            }
        }
    }

    /// Reaps the child if it has ended.
    fn reap(&self) -> Option<Ending> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(None) => None,
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Code(code),
                (None, Some(signal)) => Ending::Signal(signal),
                (None, None) => Ending::Unknown,
            }),
            Err(Errno::INTR) => None,
            Err(_) => Some(Ending::Unknown),
        }
    }
}

impl Clone for Child {
    fn clone(&self) -> Self {
        Self {
            pidfd: Arc::clone(&self.pidfd),
        }
    }
}

/// What tells a process from another one that gets its pid later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// proc_pid_stat(5), `starttime`.
    started_at_ticks: u64,
}

impl Identity {
    /// That of a process which exists.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started_at_ticks = start_time(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in stat"))?;
        Ok(Self {
            pid,
            started_at_ticks,
        })
    }

    /// A pidfd of the very process, if it still exists.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // Read after the pidfd was opened: if this is the recorded process, the pid has never been
        // anybody else's since, and the pidfd is its.
        match Self::of(self.pid) {
            Ok(found) if found == *self => Ok(Some(pidfd)),
            _ => Ok(None),
        }
    }
}

/// Kills a process that need not be a child and waits until it has ended. Answers whether it has.
pub(crate) fn kill_and_wait(pidfd: &OwnedFd, deadline: Duration) -> io::Result<bool> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(Errno::SRCH) => return Ok(true),
        Err(errno) => return Err(errno.into()),
    }
    let timeout = Timespec::try_from(deadline).map_err(io::Error::other)?;
    loop {
        let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut watched, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The start time in the text of `/proc/PID/stat`. The command's name, in parentheses, may hold
/// anything: what counts is what follows the last parenthesis.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name
        .split_ascii_whitespace()
        .nth(START_TIME_FIELD - FIELD_AFTER_NAME)?
        .parse()
        .ok()
}

/// proc_pid_stat(5) counts from 1.
const START_TIME_FIELD: usize = 22;
/// The field that follows the command's name: the state.
const FIELD_AFTER_NAME: usize = 3;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn name_with_parentheses_does_not_confuse() {
        let fields: Vec<_> = (FIELD_AFTER_NAME..=START_TIME_FIELD)
            .map(|n| n.to_string())
            .collect();
        let stat = format!("7 (a) 1 2 (b)) {}", fields.join(" "));
        assert_eq!(start_time(&stat), Some(22));
    }

    #[test]
    fn garbled_stat_has_no_start_time() {
        for stat in [
            "",
            "7 (a",
            "7 (a) S 1",
            "7 (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x",
        ] {
            assert_eq!(start_time(stat), None, "{stat}");
        }
    }

    #[test]
    fn process_of_another_age_is_not_opened() {
        let mut identity = Identity::of(std::process::id().cast_signed()).unwrap();
        assert!(identity.open().unwrap().is_some());
        identity.started_at_ticks += 1;
        assert!(identity.open().unwrap().is_none());
    }

    #[test]
    fn killed_process_has_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = Identity::of(child.id().cast_signed()).unwrap();
        let pidfd = identity.open().unwrap().unwrap();
        assert!(kill_and_wait(&pidfd, Duration::from_secs(60)).unwrap());
        child.wait().unwrap();
        assert!(identity.open().unwrap().is_none());
    }

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "reaped by what is tested")]
    async fn endings_are_told_apart() {
        for (script, expected) in [
            ("exit 3", Ending::Code(3)),
            ("kill -9 $$", Ending::Signal(9)),
        ] {
            let spawned = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_raw(spawned.id().cast_signed()).unwrap();
            assert_eq!(
                Child::from_pid(pid).unwrap().wait().await,
                expected,
                "{script}"
            );
        }
    }
}
