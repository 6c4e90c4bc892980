//! Running a command, and when it said its first word and ended.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How long any one command may take. The testbed is slow, and fifty containers are many.
pub(super) const DEADLINE: Duration = Duration::from_secs(300);

/// The most of a command's output that is kept.
const OUTPUT_BYTES_MAX: u64 = 1024 * 1024;

/// A command that runs.
pub(super) struct Running {
    /// When it was started.
    pub(super) began: Instant,
    child: Child,
    pidfd: OwnedFd,
    stderr: File,
    what: String,
}

/// How a command ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) took: Duration,
    /// Until the first byte of its output.
    pub(super) first_byte: Option<Duration>,
    pub(super) stdout: String,
}

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        Self::start_with(command, Stdio::null())
    }

    /// One that is told something.
    pub(super) fn start_with_input(command: &mut Command) -> Result<Self> {
        Self::start_with(command, Stdio::piped())
    }

    fn start_with(command: &mut Command, stdin: Stdio) -> Result<Self> {
        let what = describe(command);
        // Not a pipe: whoever inherits it may hold it beyond the command's end.
        let stderr = memfd_create("stderr", MemfdFlags::CLOEXEC).context("no file for errors")?;
        let stderr = File::from(stderr);
        command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone()?);
        let began = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {what}"))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(pid.context("a process without a pid")?, PidfdFlags::empty())
            .context("cannot watch a process")?;
        Ok(Self {
            began,
            child,
            pidfd,
            stderr,
            what,
        })
    }

    /// Waits for the end, which must be a success.
    pub(super) fn finish(mut self) -> Result<Ended> {
        let deadline = self.began + DEADLINE;
        let stdout = self.child.stdout.take().context("a stream is taken")?;
        let (first_byte, stdout) = self.collect(stdout, deadline)?;
        let has_ended = wait(self.pidfd.as_fd(), deadline)?;
        let took = self.began.elapsed();
        if !has_ended {
            return self.give_up();
        }
        let status = self.child.wait().context("a process was lost")?;
        let stderr = read_all(&mut self.stderr);
        ensure!(
            status.success(),
            "{} ({} ended with {status})",
            stderr.trim(),
            self.what
        );
        Ok(Ended {
            took,
            first_byte,
            stdout,
        })
    }

    /// Reads lines until one is `word`.
    pub(super) fn wait_for_line(&mut self, word: &str) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut line = Vec::new();
        let stdout = self.child.stdout.as_mut().context("a stream is taken")?;
        loop {
            ensure!(
                wait(stdout.as_fd(), deadline)?,
                "{} did not say {word:?} in time",
                self.what
            );
            let mut byte = [0];
            if stdout.read(&mut byte)? == 0 {
                bail!("{} ended without saying {word:?}", self.what);
            }
            if byte != *b"\n" {
                line.extend(byte);
            } else if line == word.as_bytes() {
                return Ok(());
            } else {
                line.clear();
            }
        }
    }

    pub(super) fn say(&mut self, words: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("it has no input")?;
        stdin
            .write_all(words.as_bytes())
            .with_context(|| format!("{} does not listen", self.what))
    }

    pub(super) fn end_input(&mut self) {
        self.child.stdin = None;
    }

    /// The output up to its end, and when it began.
    fn collect(
        &mut self,
        mut stdout: ChildStdout,
        deadline: Instant,
    ) -> Result<(Option<Duration>, String)> {
        let mut first_byte = None;
        let mut all = Vec::new();
        let mut chunk = [0; 4096];
        // Its end is that of the last process that holds it, which may outlive the command.
        while wait_either(stdout.as_fd(), self.pidfd.as_fd(), deadline)? {
            let count = stdout.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            first_byte.get_or_insert_with(|| self.began.elapsed());
            all.extend(chunk.iter().take(count));
            ensure!(
                u64::try_from(all.len())? <= OUTPUT_BYTES_MAX,
                "{} says too much",
                self.what
            );
        }
        Ok((first_byte, String::from_utf8_lossy(&all).into_owned()))
    }

    /// Ends it for taking too long.
    fn give_up(mut self) -> Result<Ended> {
        let _ = self.child.kill();
        let _ = self.child.wait();
        bail!("{} took more than {} s", self.what, DEADLINE.as_secs())
    }
}

/// Runs a command to its end, which must be a success.
pub(super) fn run(command: &mut Command) -> Result<Ended> {
    Running::start(command)?.finish()
}

fn describe(command: &Command) -> String {
    let program = command.get_program();
    let words = std::iter::once(program).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn read_all(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = file.rewind();
    let _ = file.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn left_until(deadline: Instant) -> Result<Timespec> {
    let left = deadline.saturating_duration_since(Instant::now());
    Ok(Timespec::try_from(left)?)
}

/// Waits until there is something to read; `false` if the deadline comes first.
fn wait(fd: BorrowedFd<'_>, deadline: Instant) -> Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&left_until(deadline)?))? > 0)
}

/// Waits until the stream can be read; `false` if the process ends or the deadline comes first.
fn wait_either(stream: BorrowedFd<'_>, end: BorrowedFd<'_>, deadline: Instant) -> Result<bool> {
    let mut fds = [
        PollFd::from_borrowed_fd(stream, PollFlags::IN),
        PollFd::from_borrowed_fd(end, PollFlags::IN),
    ];
    poll(&mut fds, Some(&left_until(deadline)?))?;
    Ok(fds
        .first()
        .is_some_and(|stream| !stream.revents().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn command_that_fails_is_an_error_with_its_words() {
        let error = run(&mut sh("echo no such thing >&2; exit 3")).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("no such thing") && error.contains('3'),
            "{error}"
        );
        assert!(run(&mut Command::new("/no/such/program")).is_err());
    }

    #[test]
    fn end_without_the_awaited_line_is_an_error() {
        let mut running = Running::start(&mut sh("echo almost")).unwrap();
        assert!(running.wait_for_line("ready").is_err());
    }

    #[test]
    fn first_byte_and_all_output_are_taken() {
        let ended = run(&mut sh("printf a; printf bc")).unwrap();
        assert_eq!(ended.stdout, "abc");
        assert!(ended.first_byte.unwrap() <= ended.took);
        assert_eq!(run(&mut sh(":")).unwrap().first_byte, None);
    }

    #[test]
    fn stream_held_by_somebody_else_does_not_delay_the_end() {
        let ended = run(&mut sh("sleep 60 & echo started")).unwrap();
        assert_eq!(ended.stdout, "started\n");
        assert!(ended.took < Duration::from_secs(30));
    }

    #[test]
    fn awaited_line_is_found_among_others() {
        let mut running = Running::start(&mut sh("echo one; echo two; read x || :")).unwrap();
        running.wait_for_line("two").unwrap();
        running.finish().unwrap();
    }
}
