//! Locks of whole files (`flock`) and of open file descriptions (OFD).

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::fs::{self, FlockOperation, OFlags};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    flock_excludes_other_descriptors,
    flock_is_shared_and_upgraded,
    flock_ends_with_its_descriptor,
    ofd_locks_exclude_ranges,
    ofd_lock_is_told,
    locks_reach_other_processes,
    waiting_lock_is_granted,
);

fn ofd(
    file: impl AsFd,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    length: i64,
) -> Result<libc::flock, Errno> {
    let mut lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: 0,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: `lock` is a `struct flock` of ours, to be read and written.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(lock)
}

fn flock_excludes_other_descriptors() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDWR)?, open("f", OFlags::RDWR)?);
    fs::flock(&one, FlockOperation::LockExclusive)?;
    let second = fs::flock(&two, FlockOperation::NonBlockingLockExclusive);
    refused("a second lock", second, Errno::AGAIN)?;
    let shared = fs::flock(&two, FlockOperation::NonBlockingLockShared);
    refused("a shared lock", shared, Errno::AGAIN)?;
    fs::flock(&one, FlockOperation::Unlock)?;
    Ok(fs::flock(&two, FlockOperation::NonBlockingLockExclusive)?)
}

fn flock_is_shared_and_upgraded() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDONLY)?, open("f", OFlags::RDONLY)?);
    fs::flock(&one, FlockOperation::NonBlockingLockShared)?;
    fs::flock(&two, FlockOperation::NonBlockingLockShared)?;
    let upgrade = fs::flock(&one, FlockOperation::NonBlockingLockExclusive);
    refused("upgrade", upgrade, Errno::AGAIN)?;
    drop(two);
    Ok(fs::flock(&one, FlockOperation::NonBlockingLockExclusive)?)
}

fn flock_ends_with_its_descriptor() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDWR)?, open("f", OFlags::RDWR)?);
    let copy = rustix::io::dup(&one)?;
    fs::flock(&one, FlockOperation::LockExclusive)?;
    drop(one);
    let early = fs::flock(&two, FlockOperation::NonBlockingLockExclusive);
    refused("while a copy is open", early, Errno::AGAIN)?;
    drop(copy);
    Ok(fs::flock(&two, FlockOperation::NonBlockingLockExclusive)?)
}

fn ofd_locks_exclude_ranges() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDWR)?, open("f", OFlags::RDWR)?);
    ofd(&one, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 100)?;
    let overlap = ofd(&two, libc::F_OFD_SETLK, libc::F_WRLCK, 50, 100);
    refused("an overlapping lock", overlap.map(drop), Errno::AGAIN)?;
    ofd(&two, libc::F_OFD_SETLK, libc::F_WRLCK, 100, 100)?;
    ofd(&one, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 60)?;
    ofd(&two, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 60)?;
    let rest = ofd(&two, libc::F_OFD_SETLK, libc::F_RDLCK, 60, 1);
    refused("what is left of it", rest.map(drop), Errno::AGAIN)?;
    drop(one);
    ofd(&two, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0).map(drop)?;
    Ok(())
}

fn ofd_lock_is_told() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDWR)?, open("f", OFlags::RDWR)?);
    ofd(&one, libc::F_OFD_SETLK, libc::F_RDLCK, 10, 20)?;
    let found = ofd(&two, libc::F_OFD_GETLK, libc::F_WRLCK, 0, 0)?;
    equal("start and length", (found.l_start, found.l_len), (10, 20))?;
    equal("type", i32::from(found.l_type), libc::F_RDLCK)?;
    let found = ofd(&two, libc::F_OFD_GETLK, libc::F_RDLCK, 0, 0)?;
    equal("no conflict", i32::from(found.l_type), libc::F_UNLCK)
}

fn locks_reach_other_processes() -> Outcome {
    create("f", 0o644)?;
    let file = open("f", OFlags::RDWR)?;
    let ask = || -> Result<Option<i32>, Problem> {
        let program = std::env::current_exe()?;
        Ok(Command::new(program)
            .arg("--try-locks")
            .arg("f")
            .status()?
            .code())
    };
    equal("without locks", ask()?, Some(0))?;
    fs::flock(&file, FlockOperation::LockExclusive)?;
    equal("with flock", ask()?, Some(1))?;
    fs::flock(&file, FlockOperation::Unlock)?;
    ofd(&file, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)?;
    equal("with an OFD lock", ask()?, Some(2))
}

/// What [`locks_reach_other_processes`] asks another process: bit 0 is set if `flock` is refused,
/// bit 1 if an OFD lock is. 4 is an error.
pub(crate) fn try_locks(path: &Path) -> ExitCode {
    let Ok(file) = fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, mode(0)) else {
        return ExitCode::from(4);
    };
    let flock = fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    let range = ofd(&file, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0).map(drop);
    match (flock, range) {
        (Ok(()), Ok(())) => ExitCode::from(0),
        (Err(Errno::AGAIN), Ok(())) => ExitCode::from(1),
        (Ok(()), Err(Errno::AGAIN)) => ExitCode::from(2),
        (Err(Errno::AGAIN), Err(Errno::AGAIN)) => ExitCode::from(3),
        _ => ExitCode::from(4),
    }
}

fn waiting_lock_is_granted() -> Outcome {
    create("f", 0o644)?;
    let (one, two) = (open("f", OFlags::RDWR)?, open("f", OFlags::RDWR)?);
    fs::flock(&one, FlockOperation::LockExclusive)?;
    ofd(&one, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| -> Result<(), Errno> {
            fs::flock(&two, FlockOperation::LockExclusive)?;
            ofd(&two, libc::F_OFD_SETLKW, libc::F_WRLCK, 0, 0).map(drop)
        });
        // Both are given up while the other side waits for the first, or before it does.
        fs::flock(&one, FlockOperation::Unlock)?;
        ofd(&one, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0)?;
        match waiter.join() {
            Ok(result) => Ok(result?),
            Err(_) => fail("expected no panic, got one"),
        }
    })
}
