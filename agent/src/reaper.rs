//! The one place where processes end.
//!
//! PID 1 inherits every orphan, so all children are collected, and the exits of those that
//! somebody watches are told. A process is a child before its pid is known here: exits that nobody
//! watches are kept while a launch is under way, and only then.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::process::WaitOptions;
use rustix::time::{ClockId, clock_gettime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + signal.
    pub status: u32,
    /// CLOCK_REALTIME in nanoseconds.
    pub at_ns: u64,
}

/// Collects children.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<i32, watch::Sender<Option<Exit>>>,
    /// Exits so far.
    recorded: u64,
    /// How many there were as each launch under way began.
    launches: Vec<u64>,
    /// Exits that may belong to a launch under way, with their number. Pids come again: an exit from
    /// before a launch is none of its.
    unclaimed: HashMap<i32, (u64, Exit)>,
}

/// A launch under way; see [`Reaper::expect`].
#[derive(Debug)]
pub struct Expectation {
    reaper: Arc<Reaper>,
    since: u64,
}

impl Reaper {
    /// Collects children from now on. Must be called in the runtime, once a process.
    pub fn start() -> io::Result<Arc<Reaper>> {
        let reaper = Arc::new(Reaper::default());
        let mut children = signal(SignalKind::child())?;
        let task = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                task.collect();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    /// Keeps exits of processes not yet known, until the expectation is dropped.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        let mut table = self.lock();
        let since = table.recorded;
        table.launches.push(since);
        drop(table);
        Expectation {
            reaper: Arc::clone(self),
            since,
        }
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(collected)) => collected,
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    eprintln!("husk-agent: cannot collect children: {error}");
                    return;
                }
            };
            // Any signal: real-time ones have numbers and no names.
            let signal = |number: i32| SIGNAL_STATUS.saturating_add(number.unsigned_abs());
            let code = status.exit_status().map(|code| code.unsigned_abs() & 0xff);
            let Some(status) = code.or_else(|| status.terminating_signal().map(signal)) else {
                continue;
            };
            self.record(
                pid.as_raw_nonzero().get(),
                Exit {
                    status,
                    at_ns: realtime_ns(),
                },
            );
        }
    }

    fn record(&self, pid: i32, exit: Exit) {
        let mut table = self.lock();
        let number = table.recorded;
        table.recorded += 1;
        if let Some(watcher) = table.watched.remove(&pid) {
            watcher.send_replace(Some(exit));
        } else if !table.launches.is_empty() {
            table.unclaimed.insert(pid, (number, exit));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Added to the number of the signal that ended a process.
pub const SIGNAL_STATUS: u32 = 128;

impl Expectation {
    /// Watches a child that was born since the expectation, whether it has ended already or not.
    pub fn claim(&self, pid: i32) -> watch::Receiver<Option<Exit>> {
        let mut table = self.reaper.lock();
        let exit = table
            .unclaimed
            .remove(&pid)
            .and_then(|(number, exit)| (number >= self.since).then_some(exit));
        let (sender, receiver) = watch::channel(exit);
        if exit.is_none() {
            table.watched.insert(pid, sender);
        }
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        let own = table.launches.iter().position(|since| *since == self.since);
        if let Some(own) = own {
            table.launches.swap_remove(own);
        }
        match table.launches.iter().min().copied() {
            Some(oldest) => table.unclaimed.retain(|_, (number, _)| *number >= oldest),
            None => table.unclaimed.clear(),
        }
    }
}

/// CLOCK_REALTIME in nanoseconds.
pub fn realtime_ns() -> u64 {
    clock_ns(ClockId::Realtime)
}

/// A clock in nanoseconds.
pub fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let rest = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        status: 7,
        at_ns: 1,
    };

    #[test]
    fn exit_before_the_claim_is_kept() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        reaper.record(5, EXIT);
        assert_eq!(*expectation.claim(5).borrow(), Some(EXIT));
    }

    #[test]
    fn exit_after_the_claim_is_told() {
        let reaper = Arc::new(Reaper::default());
        let watch = reaper.expect().claim(5);
        assert_eq!(*watch.borrow(), None);
        reaper.record(5, EXIT);
        assert_eq!(*watch.borrow(), Some(EXIT));
    }

    #[test]
    fn orphan_is_forgotten() {
        let reaper = Arc::new(Reaper::default());
        reaper.record(5, EXIT);
        assert_eq!(*reaper.expect().claim(5).borrow(), None);
    }

    #[test]
    fn exit_from_before_a_launch_is_none_of_its() {
        let reaper = Arc::new(Reaper::default());
        let earlier = reaper.expect();
        reaper.record(5, EXIT);
        let later = reaper.expect();
        assert_eq!(*later.claim(5).borrow(), None);

        reaper.record(6, EXIT);
        drop(earlier);
        assert_eq!(*later.claim(6).borrow(), Some(EXIT));
    }

    #[test]
    fn leftovers_end_with_the_last_launch() {
        let reaper = Arc::new(Reaper::default());
        let first = reaper.expect();
        drop(reaper.expect());
        reaper.record(5, EXIT);
        drop(first);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
