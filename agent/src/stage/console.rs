//! The process's three streams: pipes as given, or a terminal made inside the container.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::mounts::{bind_onto, open_name};
use super::{OrFail, Step};
use crate::oci::Process;
use crate::plan::{self, Report};
use crate::sys;

/// Makes the three descriptors the process's standard streams.
pub(super) fn set_streams(streams: &[OwnedFd; 3]) -> Step {
    let step = || "set up the standard streams".to_owned();
    let [stdin, stdout, stderr] = streams;
    rustix::stdio::dup2_stdin(stdin).or_fail(step)?;
    rustix::stdio::dup2_stdout(stdout).or_fail(step)?;
    rustix::stdio::dup2_stderr(stderr).or_fail(step)
}

/// Makes a terminal in the container's own devpts, hands its master side to the agent and its
/// slave side to the process, as the controlling terminal and, for a container's init, as
/// /dev/console.
pub(super) fn attach(channel: BorrowedFd<'_>, process: &Process, name_console: bool) -> Step {
    let step = || "make a terminal".to_owned();
    let master = open_master().or_fail(step)?;
    rustix::pty::unlockpt(&master).or_fail(step)?;
    // Asked of the master itself: a name like /dev/pts/0 would be the image's to redirect.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).or_fail(step)?;
    if let Some(size) = process.console_size {
        let size = Winsize {
            ws_row: size.height,
            ws_col: size.width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size).or_fail(step)?;
    }
    let owner = Some(Uid::from_raw(process.user.uid));
    rustix::fs::fchown(&slave, owner, None::<Gid>).or_fail(step)?;
    if name_console {
        let step = || "bind the terminal on /dev/console".to_owned();
        bind_console(slave.as_fd()).or_fail(step)?;
    }
    plan::send(channel, &Report::Console, &[master.as_fd()])
        .or_fail(|| "hand the terminal to the agent".into())?;
    rustix::process::ioctl_tiocsctty(&slave).or_fail(step)?;
    let copy = || slave.try_clone().or_fail(step);
    set_streams(&[copy()?, copy()?, copy()?])
}

fn open_master() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()) {
        Ok(master) => Ok(master),
        Err(_) => Ok(rustix::fs::open("/dev/ptmx", flags, Mode::empty())?),
    }
}

/// A link in that place would lead to where the image likes, and is refused by the kernel.
fn bind_console(slave: BorrowedFd<'_>) -> io::Result<()> {
    let console = Path::new("/dev/console");
    if std::fs::symlink_metadata(console).is_err() {
        File::create_new(console)?;
    }
    bind_onto(slave, open_name(console)?.as_fd())
}

/// Marks every descriptor but the standard streams, so that none of the stage's survives.
pub(super) fn close_on_exec() -> Step {
    sys::close_on_exec_from(super::FIRST_FREE_FD.unsigned_abs())
        .or_fail(|| "mark descriptors close-on-exec".into())
}
