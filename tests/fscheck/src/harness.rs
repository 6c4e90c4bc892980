//! Runs checks, and what they are written with.

use std::fmt::{Debug, Display};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::{env, fs as std_fs, thread};

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::{process::Gid, process::Uid};

/// One check.
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) run: fn() -> Outcome,
}

/// What a check came to.
pub(crate) type Outcome = Result<(), Problem>;

/// Why a check is not ok.
pub(crate) enum Problem {
    Failed(String),
    Skipped(String),
}

/// How results are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Lines,
    Json,
}

/// An ordinary user; and another one.
pub(crate) const ALICE: u32 = 65533;
pub(crate) const BOB: u32 = 65532;
/// A group that neither is in by default.
pub(crate) const CLUB: u32 = 65500;

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        Self::Failed(format!("expected success, got {}", name_of(errno)))
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Failed(format!("expected success, got {error}"))
    }
}

/// Runs checks below one directory.
pub(crate) struct Runner {
    base: PathBuf,
    format: Format,
    only: Option<String>,
}

impl Runner {
    pub(crate) fn new(directory: &Path, format: Format, only: Option<String>) -> io::Result<Self> {
        let base = directory
            .canonicalize()?
            .join(format!("fscheck-{}", std::process::id()));
        std_fs::create_dir(&base)?;
        Ok(Self { base, format, only })
    }

    /// Runs `checks`. Returns how many failed.
    pub(crate) fn run(&self, checks: &[&[Check]]) -> io::Result<usize> {
        process::umask(Mode::empty());
        fs::chmod(&self.base, Mode::from_raw_mode(0o755))?;
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        for check in checks.iter().copied().flatten() {
            if self
                .only
                .as_ref()
                .is_some_and(|only| !check.name.contains(only.as_str()))
            {
                continue;
            }
            let outcome = self.run_one(check)?;
            match &outcome {
                Ok(()) => passed += 1,
                Err(Problem::Failed(_)) => failed += 1,
                Err(Problem::Skipped(_)) => skipped += 1,
            }
            self.report(check.name, &outcome)?;
        }
        env::set_current_dir("/")?;
        std_fs::remove_dir_all(&self.base)?;
        if self.format == Format::Lines {
            writeln!(
                io::stdout(),
                "{passed} passed, {failed} failed, {skipped} skipped"
            )?;
        }
        Ok(failed)
    }

    fn run_one(&self, check: &Check) -> io::Result<Outcome> {
        let place = self.base.join(check.name);
        std_fs::create_dir(&place)?;
        fs::chmod(&place, Mode::from_raw_mode(0o777))?;
        env::set_current_dir(&place)?;
        let outcome = (check.run)();
        process::umask(Mode::empty());
        env::set_current_dir(&self.base)?;
        // What a check leaves behind that can't be deleted is a failure of its own.
        match std_fs::remove_dir_all(&place) {
            Err(error) if outcome.is_ok() => Ok(Err(Problem::Failed(format!(
                "expected to clean up, got {error}"
            )))),
            _ => Ok(outcome),
        }
    }

    fn report(&self, name: &str, outcome: &Outcome) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match (self.format, outcome) {
            (Format::Lines, Ok(())) => writeln!(out, "ok {name}"),
            (Format::Lines, Err(Problem::Failed(what))) => writeln!(out, "FAILED {name}: {what}"),
            (Format::Lines, Err(Problem::Skipped(why))) => writeln!(out, "skipped {name}: {why}"),
            (Format::Json, outcome) => {
                let (result, detail) = match outcome {
                    Ok(()) => ("ok", ""),
                    Err(Problem::Failed(what)) => ("failed", what.as_str()),
                    Err(Problem::Skipped(why)) => ("skipped", why.as_str()),
                };
                // A detail has no control characters: quotes and backslashes are all there is.
                let detail = detail.replace('\\', "\\\\").replace('"', "\\\"");
                writeln!(
                    out,
                    r#"{{"name":"{name}","result":"{result}","detail":"{detail}"}}"#
                )
            }
        }
    }
}

/// Fails unless the two are equal.
#[expect(
    clippy::needless_pass_by_value,
    reason = "callers read better without a reference"
)]
pub(crate) fn equal<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> Outcome {
    if got == expected {
        return Ok(());
    }
    fail(format!("{what}: expected {expected:?}, got {got:?}"))
}

/// Fails unless `condition` holds.
pub(crate) fn holds(what: &str, condition: bool) -> Outcome {
    if condition {
        return Ok(());
    }
    fail(format!("expected that {what}"))
}

/// Fails unless the result is this error.
#[expect(
    clippy::needless_pass_by_value,
    reason = "callers read better without a reference"
)]
pub(crate) fn refused<T>(what: &str, result: Result<T, Errno>, expected: Errno) -> Outcome {
    let got = match result {
        Err(errno) if errno == expected => return Ok(()),
        Err(errno) => name_of(errno),
        Ok(_) => "success".to_owned(),
    };
    fail(format!("{what}: expected {}, got {got}", name_of(expected)))
}

/// Fails.
pub(crate) fn fail(what: impl Display) -> Outcome {
    Err(Problem::Failed(what.to_string()))
}

/// Not possible here.
pub(crate) fn skip(why: impl Display) -> Outcome {
    Err(Problem::Skipped(why.to_string()))
}

/// Turns "this file system does not do that" into a skip.
pub(crate) fn supported<T>(what: &str, result: Result<T, Errno>) -> Result<T, Problem> {
    result.map_err(|errno| match errno {
        Errno::OPNOTSUPP | Errno::NOSYS => Problem::Skipped(format!("{what} is not supported")),
        errno => errno.into(),
    })
}

/// The symbol of an error, which reads the same everywhere.
fn name_of(errno: Errno) -> String {
    let names = [
        (Errno::ACCESS, "EACCES"),
        (Errno::AGAIN, "EAGAIN"),
        (Errno::BADF, "EBADF"),
        (Errno::BUSY, "EBUSY"),
        (Errno::EXIST, "EEXIST"),
        (Errno::FBIG, "EFBIG"),
        (Errno::INVAL, "EINVAL"),
        (Errno::IO, "EIO"),
        (Errno::ISDIR, "EISDIR"),
        (Errno::LOOP, "ELOOP"),
        (Errno::NAMETOOLONG, "ENAMETOOLONG"),
        (Errno::NODATA, "ENODATA"),
        (Errno::NODEV, "ENODEV"),
        (Errno::NOENT, "ENOENT"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::NOTDIR, "ENOTDIR"),
        (Errno::NOTEMPTY, "ENOTEMPTY"),
        (Errno::NOTTY, "ENOTTY"),
        (Errno::NXIO, "ENXIO"),
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::PERM, "EPERM"),
        (Errno::RANGE, "ERANGE"),
        (Errno::ROFS, "EROFS"),
        (Errno::STALE, "ESTALE"),
        (Errno::TXTBSY, "ETXTBSY"),
        (Errno::XDEV, "EXDEV"),
    ];
    let known = names.iter().find(|(known, _)| *known == errno);
    known.map_or_else(
        || format!("error {}", errno.raw_os_error()),
        |(_, name)| (*name).into(),
    )
}

/// Does `work` as another user, in a thread of its own, since a thread can have an identity.
pub(crate) fn as_user<T: Send>(
    uid: u32,
    groups: &[u32],
    work: impl FnOnce() -> Result<T, Problem> + Send,
) -> Result<T, Problem> {
    let change = || -> Result<(), Errno> {
        let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    };
    thread::scope(|scope| {
        let thread = scope.spawn(|| change().map_err(Problem::from).and_then(|()| work()));
        match thread.join() {
            Ok(result) => result,
            Err(_) => Err(Problem::Failed("expected no panic, got one".to_owned())),
        }
    })
}

/// A mode from its number.
pub(crate) fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits)
}

/// Opens a file.
pub(crate) fn open(name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    fs::open(name, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Makes an empty file with exactly this mode, if the umask is 0.
pub(crate) fn create(name: &str, bits: u32) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    fs::open(name, flags, mode(bits))
}

/// Makes a file with this content.
pub(crate) fn write_file(name: &str, content: &[u8]) -> Result<(), Problem> {
    Ok(std_fs::write(name, content)?)
}

/// Makes a directory with exactly this mode, if the umask is 0.
pub(crate) fn mkdir(name: &str, bits: u32) -> Result<(), Errno> {
    fs::mkdir(name, mode(bits))
}

/// Attributes of what has the name itself.
pub(crate) fn lstat(name: &str) -> Result<Stat, Errno> {
    fs::statat(CWD, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// Permission bits.
pub(crate) fn mode_of(name: &str) -> Result<u32, Errno> {
    Ok(lstat(name)?.st_mode & 0o7777)
}

/// Type of what has the name itself.
pub(crate) fn kind_of(name: &str) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(lstat(name)?.st_mode))
}

/// Fails unless `name` is not there.
pub(crate) fn is_gone(name: &str) -> Outcome {
    refused(&format!("lstat of {name}"), lstat(name), Errno::NOENT)
}

/// Changes the owner.
pub(crate) fn chown(name: &str, uid: u32, gid: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    fs::chownat(CWD, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

/// Content of a file.
pub(crate) fn content_of(name: &str) -> Result<Vec<u8>, Problem> {
    Ok(std_fs::read(name)?)
}
