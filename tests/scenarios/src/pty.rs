//! A terminal of a scenario's own, with a program in it.

use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// For a text to appear that should come at once, in the testbed.
const TEXT_DEADLINE: Duration = Duration::from_secs(60);

/// For an answer to one resize, before another one is tried.
const RESIZE_DEADLINE: Duration = Duration::from_secs(10);

/// The heights that are tried: a size has to change to be told.
const RESIZE_ROWS: std::ops::Range<u16> = 44..52;

/// The user's side of a terminal.
pub(crate) struct Terminal {
    user: OwnedFd,
    child: Child,
    seen: String,
}

impl Terminal {
    /// Runs a program in a new session with a terminal of that size.
    pub(crate) fn run(rows: u16, columns: u16, program: &[&str]) -> Result<Self> {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .context("cannot make a terminal")?;
        grantpt(&user)?;
        unlockpt(&user)?;
        let name = ptsname(&user, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let inner = open(name, flags, Mode::empty()).context("cannot open the terminal")?;
        tcsetwinsize(&inner, size(rows, columns))?;
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(program)
            .stdin(inner.try_clone()?)
            .stdout(inner.try_clone()?)
            .stderr(inner)
            .spawn()
            .context("cannot run setsid")?;
        let seen = String::new();
        Ok(Self { user, child, seen })
    }

    /// As if the window were pulled to another size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        tcsetwinsize(&self.user, size(rows, columns)).context("cannot resize the terminal")
    }

    pub(crate) fn type_in(&self, text: &str) -> Result<()> {
        rustix::io::write(&self.user, text.as_bytes()).context("cannot type")?;
        Ok(())
    }

    /// Resizes until the program says what `answer` makes of the size. A client that looks at the
    /// size before it listens for changes misses one in between.
    pub(crate) fn resize_until(
        &mut self,
        columns: u16,
        answer: fn(u16, u16) -> String,
    ) -> Result<()> {
        for rows in RESIZE_ROWS {
            self.resize(rows, columns)?;
            let deadline = Instant::now() + RESIZE_DEADLINE;
            let text = answer(rows, columns);
            while !self.seen.contains(&text) && self.wait(deadline)? {
                if !self.read(deadline)? {
                    bail!("it ended without {text:?}: {:?}", self.seen);
                }
            }
            if self.seen.contains(&text) {
                return Ok(());
            }
        }
        bail!("it hears of no size; until then: {:?}", self.seen)
    }

    /// Waits until the text is on the screen.
    pub(crate) fn until(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + TEXT_DEADLINE;
        while !self.seen.contains(text) {
            if !self.read(deadline)? {
                bail!("it ended without {text:?}: {:?}", self.seen);
            }
        }
        Ok(())
    }

    /// Waits for the program's end and returns its status and all that was on the screen.
    pub(crate) fn end(mut self) -> Result<(i32, String)> {
        let deadline = Instant::now() + TEXT_DEADLINE;
        while self.read(deadline)? {}
        let status = self.child.wait().context("the program was lost")?;
        Ok((status.code().unwrap_or(-1), std::mem::take(&mut self.seen)))
    }

    /// Waits for something to read; `false` if nothing comes.
    fn wait(&self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        Ok(poll(&mut [PollFd::new(&self.user, PollFlags::IN)], Some(&left))? > 0)
    }

    /// Reads what there is; `false` at the end.
    fn read(&mut self, deadline: Instant) -> Result<bool> {
        if !self.wait(deadline)? {
            bail!("nothing for {TEXT_DEADLINE:?}; until then: {:?}", self.seen);
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(&self.user, &mut buffer) {
            Ok(count) => {
                let new = buffer.get(..count).unwrap_or_default();
                self.seen.push_str(&String::from_utf8_lossy(new));
                Ok(count > 0)
            }
            // Nobody has the other side open any more.
            Err(Errno::IO) => Ok(false),
            Err(error) => Err(error).context("cannot read the terminal"),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended already, unless the scenario failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
