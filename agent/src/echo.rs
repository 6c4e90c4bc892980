//! Tells inotify in the guest of what the host has changed in the share.
//!
//! Linux tells watchers of what its own system calls do. So what the host has done is done here once
//! more, in the name of a group whose requests the host's file server says yes to without doing
//! anything (see `husk_virtiofs`). The kernel then tells everybody in the guest who watches.
//!
//! What is something else by now is passed over: another change follows that says so.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use husk_protocol::messages::change::Kind;
use husk_protocol::messages::{Change, EchoChangesRequest, Place};
use nix::unistd::{Gid, setfsgid, truncate};
use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};

/// What an echo repeats, by its group's distance from the request's.
#[derive(Debug, Clone, Copy)]
enum Echo {
    Made = 0,
    GoneFile = 1,
    GoneDirectory = 2,
    Touched = 3,
}

/// The most that one request may tell of.
const CHANGES_MAX: usize = 1024;

/// Why nothing is told.
#[derive(Debug, thiserror::Error)]
pub enum EchoError {
    /// More than the host may ask for.
    #[error("{0} changes are more than {CHANGES_MAX}")]
    TooMany(usize),
    /// A group that processes may have.
    #[error("{0} can't be the group of echoes")]
    Group(u32),
    /// The share is not there.
    #[error("cannot open the share")]
    Share(#[source] io::Error),
}

/// Groups up to here are for people and programs.
const GROUP_MIN: u32 = 1 << 31;

/// Makes the echoes of a request, in its order. Blocks for as long as the host takes.
///
/// # Errors
/// [`EchoError`], before anything is done.
pub fn echo(share: &Path, request: &EchoChangesRequest) -> Result<(), EchoError> {
    let count = request.changes.len();
    if count > CHANGES_MAX {
        return Err(EchoError::TooMany(count));
    }
    // The last must not be the one that means "none".
    if !(GROUP_MIN..u32::MAX - 4).contains(&request.group) {
        return Err(EchoError::Group(request.group));
    }
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let share = fs::openat(CWD, share, directory, Mode::empty())
        .map_err(|errno| EchoError::Share(errno.into()))?;
    let echoes = Echoes {
        share,
        group: request.group,
    };
    for change in &request.changes {
        // Whatever fails is not as the host has left it any more.
        let _ = echoes.repeat(change);
    }
    Ok(())
}

struct Echoes {
    share: OwnedFd,
    group: u32,
}

impl Echoes {
    fn repeat(&self, change: &Change) -> io::Result<()> {
        match change.kind.enum_value_or_default() {
            Kind::MADE => self.make(&change.place, change.is_directory),
            Kind::REMOVED => self.remove(&change.place, change.is_directory),
            Kind::RENAMED => self.rename(change),
            Kind::WRITTEN => self.write(&change.place),
            Kind::CLOSED => self.close(&change.place),
            Kind::ATTRIBUTES => self.change_mode(&change.place),
        }
    }

    fn make(&self, place: &Place, is_directory: bool) -> io::Result<()> {
        let parent = self.directory(place)?;
        let name = name(place);
        // Looked at in passing: the kernel is not to know it yet.
        let look = || fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW);
        let kind = match self.as_echo(Echo::Touched, look) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            // It has gone, or has another name by now; that it was made is told all the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match is_directory {
                true => FileType::Directory,
                false => FileType::RegularFile,
            },
            Err(error) => return Err(error),
        };
        let mode = Mode::RUSR;
        self.as_echo(Echo::Made, || match kind {
            FileType::Directory => fs::mkdirat(&parent, name, mode),
            FileType::Symlink => fs::symlinkat("x", &parent, name),
            kind => fs::mknodat(&parent, name, kind, mode, 0),
        })
    }

    fn remove(&self, place: &Place, is_directory: bool) -> io::Result<()> {
        let parent = self.directory(place)?;
        let (echo, flags) = match is_directory {
            true => (Echo::GoneDirectory, AtFlags::REMOVEDIR),
            false => (Echo::GoneFile, AtFlags::empty()),
        };
        self.as_echo(echo, || fs::unlinkat(&parent, name(place), flags))
    }

    fn rename(&self, change: &Change) -> io::Result<()> {
        let (old, new) = (&change.place, &change.renamed_to);
        let (old_parent, new_parent) = (self.directory(old)?, self.directory(new)?);
        let echo = match change.is_directory {
            true => Echo::GoneDirectory,
            false => Echo::GoneFile,
        };
        self.as_echo(echo, || {
            fs::renameat(&old_parent, name(old), &new_parent, name(new))
        })
    }

    /// Setting the size is what the kernel tells as a change of contents.
    fn write(&self, place: &Place) -> io::Result<()> {
        let (file, size) = self.regular_file(place)?;
        self.as_echo(Echo::Touched, || {
            truncate(path_of(&file).as_str(), size).map_err(io::Error::from)
        })
    }

    fn close(&self, place: &Place) -> io::Result<()> {
        let (file, _) = self.regular_file(place)?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        self.as_echo(Echo::Touched, || {
            fs::open(path_of(&file), flags, Mode::empty()).map(drop)
        })
    }

    fn change_mode(&self, place: &Place) -> io::Result<()> {
        let file = self.open(place)?;
        let stat = fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(stat.st_mode);
        self.as_echo(Echo::Touched, || {
            fs::chmodat(CWD, path_of(&file), mode, AtFlags::empty())
        })
    }

    /// Calls the kernel in the name of an echo's group.
    fn as_echo<T, E: Into<io::Error>>(
        &self,
        echo: Echo,
        work: impl FnOnce() -> Result<T, E>,
    ) -> io::Result<T> {
        let _as_before = Group::enter(self.group + echo as u32);
        work().map_err(Into::into)
    }

    fn directory(&self, place: &Place) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = OsStr::from_bytes(&place.directory);
        Ok(fs::openat2(
            &self.share,
            directory,
            flags,
            Mode::empty(),
            RESOLVE,
        )?)
    }

    fn open(&self, place: &Place) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let parent = self.directory(place)?;
        let none = Mode::empty();
        Ok(fs::openat2(&parent, name(place), flags, none, RESOLVE)?)
    }

    /// A regular file, and its size.
    fn regular_file(&self, place: &Place) -> io::Result<(OwnedFd, i64)> {
        let file = self.open(place)?;
        let stat = fs::fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((file, stat.st_size)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Nothing that somebody in the guest has put there leads anywhere else.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);

fn name(place: &Place) -> &OsStr {
    OsStr::from_bytes(&place.name)
}

/// Another way to a file that is open by `O_PATH`.
fn path_of(file: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

/// This thread's group for files is another one while this lives.
struct Group {
    before: Gid,
}

impl Group {
    fn enter(group: u32) -> Self {
        let before = setfsgid(Gid::from_raw(group));
        Self { before }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        setfsgid(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(directory: &str, name: &str) -> Place {
        Place {
            directory: directory.into(),
            name: name.into(),
            ..Place::default()
        }
    }

    fn request(group: u32, changes: Vec<Change>) -> EchoChangesRequest {
        EchoChangesRequest {
            group,
            changes,
            ..EchoChangesRequest::default()
        }
    }

    #[test]
    fn groups_of_people_and_too_many_changes_are_refused() {
        let here = tempfile::tempdir().unwrap();
        for group in [0, 1000, GROUP_MIN - 1, u32::MAX - 4, u32::MAX] {
            let refused = echo(here.path(), &request(group, Vec::new())).unwrap_err();
            assert!(refused.to_string().contains(&group.to_string()));
        }
        let many = vec![Change::default(); CHANGES_MAX + 1];
        let refused = echo(here.path(), &request(GROUP_MIN, many)).unwrap_err();
        assert!(matches!(refused, EchoError::TooMany(_)));
    }

    #[test]
    fn places_outside_of_the_share_are_left_alone() {
        let here = tempfile::tempdir().unwrap();
        let share = here.path().join("share");
        std::fs::create_dir(&share).unwrap();
        std::fs::write(here.path().join("outside"), "").unwrap();
        std::os::unix::fs::symlink("..", share.join("up")).unwrap();
        let changes = ["..", "up", "/", "no"].map(|directory| Change {
            kind: Kind::REMOVED.into(),
            place: Some(place(directory, "outside")).into(),
            ..Change::default()
        });
        echo(&share, &request(GROUP_MIN, changes.into())).unwrap();
        assert!(here.path().join("outside").exists());
    }

    /// Where nobody takes them for echoes, they are what they repeat, and in that group's name.
    #[test]
    fn changes_are_repeated_in_the_name_of_their_group() {
        use std::os::unix::fs::MetadataExt;
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: not root");
            return;
        }
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir(here.path().join("sub")).unwrap();
        let file = here.path().join("sub/file");
        std::fs::write(&file, "contents").unwrap();
        let change = |kind: Kind, name: &str| Change {
            kind: kind.into(),
            place: Some(place("sub", name)).into(),
            renamed_to: Some(place("sub", "renamed")).into(),
            ..Change::default()
        };
        let all = vec![
            change(Kind::WRITTEN, "file"),
            change(Kind::CLOSED, "file"),
            change(Kind::ATTRIBUTES, "file"),
            change(Kind::RENAMED, "file"),
            // Not there any more.
            change(Kind::WRITTEN, "file"),
            change(Kind::MADE, "gone"),
        ];
        echo(here.path(), &request(GROUP_MIN, all)).unwrap();
        let renamed = here.path().join("sub/renamed");
        assert_eq!(std::fs::read(&renamed).unwrap(), b"contents");
        let made = std::fs::metadata(here.path().join("sub/gone")).unwrap();
        assert!(made.is_file() && made.gid() == GROUP_MIN);
        // And this thread is who it was.
        std::fs::write(here.path().join("mine"), "").unwrap();
        let mine = std::fs::metadata(here.path().join("mine")).unwrap();
        assert_eq!(mine.gid(), rustix::process::getegid().as_raw());
        let entered = Group::enter(GROUP_MIN);
        std::fs::write(here.path().join("echo"), "").unwrap();
        drop(entered);
        let theirs = std::fs::metadata(here.path().join("echo")).unwrap();
        assert_eq!(theirs.gid(), GROUP_MIN);
    }
}
