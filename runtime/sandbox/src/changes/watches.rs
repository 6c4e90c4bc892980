//! Which directories are watched, and what their events mean for the guest.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::messages::change::Kind;
use husk_protocol::messages::{Change, Place};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// A volume with more directories is not watched: it is no configuration, and every change in it is
/// work for the host and the guest.
const DIRECTORIES_MAX: usize = 256;

/// Nor is one with more files, which take as long to look through.
const ENTRIES_MAX: usize = 64 * 1024;

/// What is heard of a file that is a volume.
const FILE_EVENTS: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB);

/// What is heard of a directory and what is in it.
const DIRECTORY_EVENTS: WatchFlags = FILE_EVENTS
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ONLYDIR);

/// Nothing that somebody has put into a volume leads out of it.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

/// Components of a volume's path below the share: container, `mounts`, number.
const VOLUME_DEPTH: usize = 3;

/// An event of inotify(7).
#[derive(Debug, Clone)]
pub(super) struct Event {
    watch: i32,
    what: ReadFlags,
    cookie: u32,
    name: Vec<u8>,
}

/// The watched directories, and files that are volumes.
#[derive(Debug)]
pub(super) struct Watches {
    share: PathBuf,
    inotify: Arc<OwnedFd>,
    /// Paths below the share by watch. One directory may be in several volumes.
    paths: HashMap<i32, Vec<PathBuf>>,
}

/// Why a volume is not watched.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("it has more than {DIRECTORIES_MAX} directories")]
    Directories,
    #[error("it has more than {ENTRIES_MAX} files")]
    Entries,
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
}

impl Event {
    pub(super) fn of(event: &inotify::Event<'_>) -> Self {
        Self {
            watch: event.wd(),
            what: event.events(),
            cookie: event.cookie(),
            name: event.file_name().map_or(&[][..], CStr::to_bytes).to_vec(),
        }
    }

    fn is_directory(&self) -> bool {
        self.what.contains(ReadFlags::ISDIR)
    }
}

impl Watches {
    pub(super) fn new(share: &Path, inotify: Arc<OwnedFd>) -> Self {
        Self {
            share: share.to_owned(),
            inotify,
            paths: HashMap::new(),
        }
    }

    /// Watches volumes, each wholly or not at all.
    pub(super) fn add(&mut self, volumes: &[PathBuf]) {
        for volume in volumes {
            self.add_or_leave(volume);
        }
    }

    /// Watches what is at and below a path. Answers with what was found below, as if made just now.
    fn add_or_leave(&mut self, path: &Path) -> Vec<Change> {
        match self.add_tree(path) {
            Ok(found) => found,
            Err(error) => {
                let volume = volume_of(path);
                self.leave(&volume);
                let error = crate::error::describe(&error);
                tracing::info!(
                    ?volume,
                    error,
                    "the guest's inotify does not hear of a volume"
                );
                Vec::new()
            }
        }
    }

    fn add_tree(&mut self, path: &Path) -> Result<Vec<Change>, WatchError> {
        let mut found: Vec<Change> = Vec::new();
        let mut unread = vec![path.to_owned()];
        while let Some(path) = unread.pop() {
            let directory = match self.watch(&path) {
                Ok(Some(directory)) => directory,
                // Gone again, or a file that is a volume.
                Ok(None) => continue,
                Err(error) => return Err(error),
            };
            if self.count_beside(&path) > DIRECTORIES_MAX {
                return Err(WatchError::Directories);
            }
            // Read after it is watched: what comes later is heard of.
            let entries = Dir::read_from(&directory).map_err(step("read a directory"))?;
            for entry in entries {
                let entry = entry.map_err(step("read a directory"))?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                if found.len() == ENTRIES_MAX {
                    return Err(WatchError::Entries);
                }
                let path = path.join(OsStr::from_bytes(name));
                // Where the file system does not say what it is, the attempt to watch it does.
                if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
                    unread.push(path.clone());
                }
                found.push(Change {
                    is_directory: entry.file_type() == FileType::Directory,
                    ..change(Kind::MADE, &path)
                });
            }
        }
        Ok(found)
    }

    /// Watches one path: a directory, which is opened, or a file that is a volume.
    fn watch(&mut self, path: &Path) -> Result<Option<OwnedFd>, WatchError> {
        let share =
            rustix::fs::open(&self.share, PLACE, Mode::empty()).map_err(step("open the share"))?;
        let open = |flags| rustix::fs::openat2(&share, path, flags, Mode::empty(), RESOLVE);
        let (file, events) = match open(OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC) {
            Ok(directory) => (directory, DIRECTORY_EVENTS),
            Err(Errno::NOTDIR) if is_volume(path) => {
                let file = open(OFlags::PATH | OFlags::CLOEXEC).map_err(step("open a file"))?;
                (file, FILE_EVENTS)
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(step("open a directory")(errno)),
        };
        let place = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let watch = inotify::add_watch(&self.inotify, place, events).map_err(step("watch"))?;
        let paths = self.paths.entry(watch).or_default();
        if !paths.iter().any(|known| known == path) {
            paths.push(path.to_owned());
        }
        Ok(events.contains(WatchFlags::ONLYDIR).then_some(file))
    }

    /// How many paths of the same volume are watched.
    fn count_beside(&self, path: &Path) -> usize {
        let volume = volume_of(path);
        let all = self.paths.values().flatten();
        all.filter(|path| path.starts_with(&volume)).count()
    }

    /// Watches nothing at and below a path any more.
    pub(super) fn leave(&mut self, place: &Path) {
        let inotify = &self.inotify;
        self.paths.retain(|watch, paths| {
            paths.retain(|path| !path.starts_with(place));
            if paths.is_empty() {
                // The directory may be gone, and its watch with it.
                let _ = inotify::remove_watch(inotify, *watch);
            }
            !paths.is_empty()
        });
    }

    /// What events mean. Directories that have come are watched, and what is in them told of.
    pub(super) fn changes(&mut self, events: Vec<Event>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut events = events.into_iter().peekable();
        while let Some(event) = events.next() {
            if event.what.contains(ReadFlags::QUEUE_OVERFLOW) {
                tracing::info!("too many changes of volumes at once: some are not told");
                changes.extend(
                    self.volumes()
                        .map(|volume| change(Kind::ATTRIBUTES, &volume)),
                );
            } else if event.what.contains(ReadFlags::IGNORED) {
                self.paths.remove(&event.watch);
            } else if event.what.contains(ReadFlags::MOVED_FROM) {
                let goes_on = |next: &Event| {
                    next.what.contains(ReadFlags::MOVED_TO) && next.cookie == event.cookie
                };
                let next = events.next_if(goes_on);
                self.moved(&event, next.as_ref(), &mut changes);
            } else {
                self.changed(&event, &mut changes);
            }
        }
        without_repeats(changes)
    }

    fn volumes(&self) -> impl Iterator<Item = PathBuf> {
        let all = self.paths.values().flatten();
        all.filter(|path| is_volume(path)).cloned()
    }

    /// Where an event was.
    fn places(&self, event: &Event) -> Vec<PathBuf> {
        let paths = self.paths.get(&event.watch);
        let paths = paths.into_iter().flatten();
        let name = OsStr::from_bytes(&event.name);
        match event.name.is_empty() {
            // Of the watched directory itself: the one above it hears of that as well, but of none
            // that is a volume.
            true => paths.filter(|path| is_volume(path)).cloned().collect(),
            false => paths.map(|path| path.join(name)).collect(),
        }
    }

    fn changed(&mut self, event: &Event, changes: &mut Vec<Change>) {
        let kind = match event.what {
            what if what.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) => Kind::MADE,
            what if what.contains(ReadFlags::DELETE) => Kind::REMOVED,
            what if what.contains(ReadFlags::MODIFY) => Kind::WRITTEN,
            what if what.contains(ReadFlags::CLOSE_WRITE) => Kind::CLOSED,
            what if what.contains(ReadFlags::ATTRIB) => Kind::ATTRIBUTES,
            _ => return,
        };
        for place in self.places(event) {
            changes.push(Change {
                is_directory: event.is_directory(),
                ..change(kind, &place)
            });
            if kind == Kind::MADE && event.is_directory() {
                changes.extend(self.add_or_leave(&place));
            }
        }
    }

    /// A name has become another one, or has left what is watched.
    fn moved(&mut self, from: &Event, to: Option<&Event>, changes: &mut Vec<Change>) {
        let mut new = to.map_or_else(Vec::new, |to| self.places(to));
        for old in self.places(from) {
            let is_directory = from.is_directory();
            // A volume is a file system of its own to the guest's containers.
            let same = new.iter().position(|new| volume_of(new) == volume_of(&old));
            match same.map(|index| new.swap_remove(index)) {
                Some(new) => {
                    changes.push(Change {
                        renamed_to: Some(place(&new)).into(),
                        is_directory,
                        ..change(Kind::RENAMED, &old)
                    });
                    if is_directory {
                        self.leave(&old);
                        self.add_or_leave(&new);
                    }
                }
                None => {
                    changes.push(Change {
                        is_directory,
                        ..change(Kind::REMOVED, &old)
                    });
                    if is_directory {
                        self.leave(&old);
                    }
                }
            }
        }
        for place in new {
            changes.push(Change {
                is_directory: from.is_directory(),
                ..change(Kind::MADE, &place)
            });
            if from.is_directory() {
                changes.extend(self.add_or_leave(&place));
            }
        }
    }
}

const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn step(step: &'static str) -> impl Fn(Errno) -> WatchError {
    move |errno| WatchError::Step {
        step,
        source: errno.into(),
    }
}

/// The volume that a path is in.
fn volume_of(path: &Path) -> PathBuf {
    path.components().take(VOLUME_DEPTH).collect()
}

fn is_volume(path: &Path) -> bool {
    path.components().count() == VOLUME_DEPTH
}

fn place(path: &Path) -> Place {
    let bytes = |part: Option<&OsStr>| part.map_or(&[][..], OsStr::as_bytes).to_vec();
    Place {
        directory: bytes(path.parent().map(Path::as_os_str)),
        name: bytes(path.file_name()),
        ..Place::default()
    }
}

fn change(kind: Kind, path: &Path) -> Change {
    Change {
        kind: kind.into(),
        place: Some(place(path)).into(),
        ..Change::default()
    }
}

/// Of changes of one file's contents and attributes that follow one another, one of each is enough.
fn without_repeats(changes: Vec<Change>) -> Vec<Change> {
    let mut kept: Vec<Change> = Vec::new();
    for change in changes {
        let is_repeat = |earlier: &Change| *earlier == change;
        let same_file = kept
            .iter()
            .rev()
            .take_while(|earlier| earlier.place == change.place);
        if !same_file.take(REPEATS_MAX).any(is_repeat) {
            kept.push(change);
        }
    }
    kept
}

/// WRITTEN, CLOSED and ATTRIBUTES.
const REPEATS_MAX: usize = 3;

#[cfg(test)]
mod tests;
