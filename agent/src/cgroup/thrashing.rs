//! Ends what a memory limit would otherwise leave thrashing.
//!
//! A cgroup at its limit is not out of memory to the kernel as long as pages can be taken from it. The
//! pages of the very programs that run in it can: each is progress, though the next instruction
//! reads it back. On a host most of those pages count as another cgroup's, that has read the file
//! before; in a guest the container itself has read them all, so that it may go on like this for
//! ever.
//!
//! So the kernel is asked to tell of stalls (PSI). Where all processes of a cgroup have spent much
//! of a while waiting for memory, the cgroup is at its limit, and nearly all it has is memory that
//! can't be taken away, the limit is lowered below that for a moment. The kernel then has no choice:
//! it kills what it always would, counts it, and tells of it, as if it had come to that by itself.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::Interest;
use tokio::task::AbortHandle;

/// Three seconds out of ten in which no process of the cgroup got anywhere for want of memory, in
/// the kernel's words. Ten seconds are the longest that it looks back. A program that did nothing
/// but read its own pages was seen to wait for half of the time, and to work on it in the other.
const TRIGGER: &[u8] = b"full 3000000 10000000\0";

/// A watch over a cgroup; ends with the last copy.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Held while the limit is changed.
    limit: Arc<Mutex<()>>,
    task: Mutex<Option<AbortHandle>>,
}

impl Watch {
    /// Changes the limit, while nobody else does.
    pub(super) fn changing_limit<T>(&self, change: impl FnOnce() -> T) -> T {
        let _held = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        change()
    }

    /// Begins to watch, if there is a limit and no watch yet. Without PSI there is none, and
    /// nothing to be done about it.
    pub(super) fn begin(&self, path: &Path) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.is_some() || limit_of(path).is_none() {
            return;
        }
        let (path, limit) = (path.to_owned(), Arc::clone(&self.limit));
        let watch = async move {
            let name = path.display().to_string();
            if let Err(error) = watch(path, limit).await {
                eprintln!("husk-agent: {name}: thrashing is not seen: {error}");
            }
        };
        *task = Some(tokio::spawn(watch).abort_handle());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let task = self.task.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = task.take() {
            task.abort();
        }
    }
}

async fn watch(path: PathBuf, limit: Arc<Mutex<()>>) -> io::Result<()> {
    let mut pressure = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path.join("memory.pressure"))?;
    pressure.write_all(TRIGGER)?;
    let stalls = crate::sys::register(pressure.into(), Interest::PRIORITY)?;
    loop {
        stalls.ready(Interest::PRIORITY).await?.clear_ready();
        if !path.exists() {
            // The kernel tells of a cgroup's end in the same way.
            return Ok(());
        }
        let (path, limit) = (path.clone(), Arc::clone(&limit));
        let relieved = tokio::task::spawn_blocking(move || {
            let _held = limit.lock().unwrap_or_else(PoisonError::into_inner);
            relieve(&path)
        });
        match relieved.await.map_err(io::Error::other)? {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Has the kernel kill a process if the cgroup is as the header says.
fn relieve(path: &Path) -> io::Result<()> {
    let Some(limit) = limit_of(path) else {
        return Ok(());
    };
    let usage = fs::read_to_string(path.join("memory.current"))?;
    let usage = usage.trim_end().parse().unwrap_or(0);
    let stat = Stat::parse(&fs::read_to_string(path.join("memory.stat"))?);
    let Some(too_low) = stat.limit_to_kill_at(usage, limit) else {
        return Ok(());
    };
    let file = path.join("memory.max");
    eprintln!(
        "husk-agent: {}: thrashing at {usage} of {limit} bytes, so it is out of memory",
        path.display()
    );
    let lowered = write(&file, too_low);
    write(&file, limit)?;
    lowered
}

/// The limit; none is none.
fn limit_of(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path.join("memory.max")).ok()?;
    text.trim_end().parse().ok()
}

fn write(file: &Path, limit: u64) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(file)?;
    file.write_all(limit.to_string().as_bytes())
}

/// What counts of memory.stat.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Stat {
    anon: u64,
    shmem: u64,
    active_file: u64,
    inactive_file: u64,
}

impl Stat {
    fn parse(text: &str) -> Stat {
        let value = |key: &str| {
            let mut lines = text.lines();
            let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        Stat {
            anon: value("anon"),
            shmem: value("shmem"),
            active_file: value("active_file"),
            inactive_file: value("inactive_file"),
        }
    }

    /// A limit that can't be met by anything but a kill; none if the cgroup is not at its limit, or
    /// holds more than a little that can be taken away.
    fn limit_to_kill_at(self, usage: u64, limit: u64) -> Option<u64> {
        let is_at_limit = usage >= limit - limit / NEAR_LIMIT;
        let files = self.active_file.saturating_add(self.inactive_file);
        // What the kernel holds for the cgroup comes on top: page tables, stacks.
        let kept = self.anon.saturating_add(self.shmem);
        (is_at_limit && files <= limit / FEW_FILES && kept > 0).then_some(kept.min(limit))
    }
}

/// This part of the limit may be free.
const NEAR_LIMIT: u64 = 16;

/// This part of the limit may be pages of files: more than that is a cache at work.
const FEW_FILES: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn stat(anon: u64, files: u64) -> Stat {
        Stat {
            anon,
            active_file: files / 2,
            inactive_file: files - files / 2,
            ..Stat::default()
        }
    }

    #[test]
    fn nonsense_is_no_reason_to_kill() {
        for text in ["", "anon", "anon x\nactive_file -1\n", "anonymous 5\n"] {
            let stat = Stat::parse(text);
            assert_eq!(stat, Stat::default(), "{text}");
            assert_eq!(stat.limit_to_kill_at(MIB, MIB), None);
        }
        let stat = Stat {
            anon: u64::MAX,
            shmem: u64::MAX,
            ..Stat::default()
        };
        assert_eq!(stat.limit_to_kill_at(u64::MAX, u64::MAX), Some(u64::MAX));
        assert_eq!(stat.limit_to_kill_at(0, 0), Some(0));
    }

    #[test]
    fn room_below_the_limit_is_no_reason_to_kill() {
        assert_eq!(stat(20 * MIB, 0).limit_to_kill_at(20 * MIB, 32 * MIB), None);
    }

    #[test]
    fn cache_at_work_is_no_reason_to_kill() {
        assert_eq!(
            stat(8 * MIB, 24 * MIB).limit_to_kill_at(32 * MIB, 32 * MIB),
            None
        );
    }

    #[test]
    fn memory_that_can_not_be_taken_away_is_above_the_lowered_limit() {
        let text = "anon 30000000\nfile 900\nshmem 1000\nactive_file 200\ninactive_file 100\n";
        let limit = Stat::parse(text).limit_to_kill_at(32 * MIB, 32 * MIB);
        assert_eq!(limit, Some(30_001_000));
    }
}
