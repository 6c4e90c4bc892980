//! What the guest may keep of the contents of a file that others change too.
//!
//! An open has to show what was written before it. The guest's pages of the file do, if the file is
//! what it was when it was opened the time before: size and times tell. A change within the same tick
//! of the clock that files are dated by would not tell, so that nothing is known of a file that has
//! changed just now. Who writes to a mapping of the host's changes the times only now and then.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Statx, StatxTimestamp};

/// No file system dates its files in coarser steps (FAT, modification).
const TICK_SECONDS: i64 = 2;

/// What is known of one file's contents.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    opened: Mutex<Option<Version>>,
}

/// What tells of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Contents {
    /// Whether a file that is being opened, and looks so now, is what it was at the open before.
    pub(crate) fn are_as_before(&self, stat: &Statx) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_secs().cast_signed());
        self.are_as_before_at(stat, now)
    }

    fn are_as_before_at(&self, stat: &Statx, now: i64) -> bool {
        let version = Version::of(stat);
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let are_same = *opened == Some(version);
        *opened = version.is_settled(now).then_some(version);
        are_same
    }
}

impl Version {
    fn of(stat: &Statx) -> Self {
        let time = |time: StatxTimestamp| (time.tv_sec, time.tv_nsec);
        Self {
            size: stat.stx_size,
            modified: time(stat.stx_mtime),
            changed: time(stat.stx_ctime),
        }
    }

    /// Whether a change from now on would be seen. A file from the future tells nothing.
    fn is_settled(&self, now: i64) -> bool {
        let last = self.modified.0.max(self.changed.0);
        last.saturating_add(TICK_SECONDS) < now
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn stat_of(path: &std::path::Path) -> Statx {
        let flags = rustix::fs::AtFlags::empty();
        let mask = rustix::fs::StatxFlags::BASIC_STATS;
        rustix::fs::statx(rustix::fs::CWD, path, flags, mask).unwrap()
    }

    #[test]
    fn file_is_as_before_until_it_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "one").unwrap();
        let contents = Contents::default();
        let stat = stat_of(&path);
        let later = stat.stx_mtime.tv_sec + 10;

        assert!(!contents.are_as_before_at(&stat, later), "never seen");
        assert!(contents.are_as_before_at(&stat, later));

        fs::write(&path, "more").unwrap();
        let stat = stat_of(&path);
        assert!(!contents.are_as_before_at(&stat, later), "it has changed");
        assert!(contents.are_as_before_at(&stat, later));
    }

    #[test]
    fn nothing_is_known_of_a_file_of_this_moment_or_of_the_future() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "one").unwrap();
        let stat = stat_of(&path);
        for now in [0, 1, -1000].map(|by| stat.stx_mtime.tv_sec + by) {
            let contents = Contents::default();
            for _ in 0..2 {
                assert!(!contents.are_as_before_at(&stat, now), "{now}");
            }
        }
    }
}
