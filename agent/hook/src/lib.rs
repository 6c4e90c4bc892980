//! One hook of the OCI runtime specification: a program that is told a container's state.
//!
//! Used on both sides: some hooks run on the host, others in the container. Needs no async runtime,
//! since the guest's launch stage has none, and blocks. A hook runs where the calling thread is.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{PipeReader, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, io};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};

/// A hook, as config.json has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hook {
    /// The program; absolute.
    pub path: PathBuf,
    /// Its name and arguments.
    pub args: Vec<String>,
    /// All of its environment, as `NAME=value`.
    pub env: Vec<String>,
    /// In seconds, greater than 0.
    pub timeout: Option<i64>,
}

/// How a hook ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// With status 0.
    Success,
    /// In any other way, after these last words.
    Failure(ExitStatus, String),
    /// It took longer than this, and was killed.
    TooLong(Duration, String),
}

impl Hook {
    /// Says what is wrong with it, where it can't be run.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn check(&self) -> Result<(), &'static str> {
        if !self.path.is_absolute() {
            return Err("the path must be absolute");
        }
        if self.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err("the timeout must be greater than zero");
        }
        if self
            .args
            .iter()
            .chain(&self.env)
            .any(|text| text.contains('\0'))
        {
            return Err("a string holds a zero byte");
        }
        let is_variable = |text: &String| text.find('=').is_some_and(|at| at > 0);
        if !self.env.iter().all(is_variable) {
            return Err("the environment must consist of NAME=value");
        }
        Ok(())
    }

    /// How long it may take.
    pub fn time_limit(&self) -> Duration {
        let seconds = self.timeout.and_then(|seconds| u64::try_from(seconds).ok());
        seconds.map_or(TIMEOUT_DEFAULT, |seconds| {
            Duration::from_secs(seconds).min(TIMEOUT_MAX)
        })
    }

    /// Runs it to its end with `state` as its standard input. What it leaves in the background is
    /// left alone, unless it took too long: then its process group is killed.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(&self, state: &[u8], directory: &Path) -> io::Result<Ending> {
        let timeout = self.time_limit();
        let deadline = Instant::now() + timeout;
        let (mut child, mut output) = self.spawn(state, directory)?;
        let waited = wait(&child, &mut output, deadline);
        if !matches!(waited, Ok(true))
            && let Some(group) = Pid::from_raw(child.id().cast_signed())
        {
            // It has not been reaped, so that the group is still its own.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let status = child.wait()?;
        output.read()?;
        Ok(match waited? {
            false => Ending::TooLong(timeout, output.words()),
            true if status.success() => Ending::Success,
            true => Ending::Failure(status, output.words()),
        })
    }

    fn spawn(&self, state: &[u8], directory: &Path) -> io::Result<(Child, Output)> {
        // Not a pipe: a hook that does not read it must not stop anybody.
        let mut stdin = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
        stdin.write_all(state)?;
        stdin.rewind()?;
        let (reader, writer) = io::pipe()?;
        let mut command = Command::new(&self.path);
        let mut args = self.args.iter();
        if let Some(name) = args.next() {
            command.arg0(name);
        }
        let env = self.env.iter();
        command
            .args(args)
            .env_clear()
            .envs(env.filter_map(|variable| variable.split_once('=')))
            .current_dir(directory)
            .process_group(0)
            .stdin(OwnedFd::from(stdin))
            .stdout(writer.try_clone()?)
            .stderr(Stdio::from(writer));
        let child = command.spawn()?;
        // With the command our own copies of the pipe's end are gone.
        drop(command);
        Ok((child, Output::new(reader)?))
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::Success => return f.write_str("success"),
            Self::Failure(status, words) => {
                match (status.code(), status.signal()) {
                    (Some(code), _) => write!(f, "exit status {code}")?,
                    (None, Some(signal)) => write!(f, "killed by signal {signal}")?,
                    (None, None) => f.write_str("it ended")?,
                }
                words
            }
            Self::TooLong(timeout, words) => {
                write!(f, "killed, as it ran past its timeout of {timeout:?}")?;
                words
            }
        };
        if words.is_empty() {
            return f.write_str(", without a word");
        }
        write!(f, ", last words: {words}")
    }
}

/// Waits for the end; `false` if it does not come in time.
fn wait(child: &Child, output: &mut Output, deadline: Instant) -> io::Result<bool> {
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut watched = vec![PollFd::new(&pidfd, PollFlags::IN)];
        // A hook that has closed its output may go on without.
        if !output.is_closed {
            watched.push(PollFd::new(&output.reader, PollFlags::IN));
        }
        match poll(&mut watched, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if watched.first().is_some_and(|end| !end.revents().is_empty()) {
            return Ok(true);
        }
        output.read()?;
    }
}

/// What a hook says, of which the end is kept.
struct Output {
    reader: PipeReader,
    tail: Vec<u8>,
    is_closed: bool,
}

impl Output {
    fn new(reader: PipeReader) -> io::Result<Self> {
        let flags = fcntl_getfl(reader.as_fd())?;
        fcntl_setfl(reader.as_fd(), flags | OFlags::NONBLOCK)?;
        Ok(Self {
            reader,
            tail: Vec::new(),
            is_closed: false,
        })
    }

    /// Reads what is there, and little more than a full pipe: somebody may write for ever.
    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS_MAX {
            let length = match self.reader.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if length == 0 {
                self.is_closed = true;
                return Ok(());
            }
            self.tail
                .extend_from_slice(buffer.get(..length).unwrap_or_default());
            let surplus = self.tail.len().saturating_sub(TAIL_BYTES_MAX);
            self.tail.drain(..surplus);
        }
        Ok(())
    }

    fn words(&self) -> String {
        let words = String::from_utf8_lossy(&self.tail);
        words.trim().replace(char::is_control, " ")
    }
}

/// For a hook that names no timeout: the specification lets it take for ever, but no wait here does.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(600);

/// So that no sum of them overflows.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

const READ_BYTES: usize = 4096;

/// In a row.
const READS_MAX: u32 = 32;

/// How much of a hook's last words is told.
const TAIL_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn hook(value: Value) -> Hook {
        serde_json::from_value(value).unwrap()
    }

    fn script(script: &str, timeout: Option<i64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["the-name", "-c", script].map(str::to_owned).to_vec(),
            env: ["WORD=husk", "PATH=/usr/bin:/bin"]
                .map(str::to_owned)
                .to_vec(),
            timeout,
        }
    }

    fn run_script(text: &str, timeout: Option<i64>) -> Ending {
        let state = b"{\"id\":\"x\"}";
        script(text, timeout).run(state, Path::new("/tmp")).unwrap()
    }

    #[test]
    fn hooks_that_cannot_be_run_are_found_out() {
        for (value, complaint) in [
            (json!({ "path": "bin/true" }), "absolute"),
            (json!({ "path": "/bin/true", "timeout": 0 }), "timeout"),
            (json!({ "path": "/bin/true", "timeout": -1 }), "timeout"),
            (
                json!({ "path": "/bin/true", "env": ["NAME"] }),
                "NAME=value",
            ),
            (
                json!({ "path": "/bin/true", "env": ["=value"] }),
                "NAME=value",
            ),
            (json!({ "path": "/bin/true", "args": ["a\0b"] }), "zero"),
        ] {
            let reason = hook(value).check().unwrap_err();
            assert!(reason.contains(complaint), "{reason}");
        }
    }

    #[test]
    fn missing_program_is_an_error() {
        let missing = hook(json!({ "path": "/no/such" }));
        assert!(missing.run(b"", Path::new("/")).is_err());
    }

    #[test]
    fn failure_tells_status_and_last_words() {
        let said = run_script("yes | head -c 100000; echo the end >&2; exit 3", None).to_string();
        assert!(said.starts_with("exit status 3, last words: "), "{said}");
        assert!(said.ends_with("the end"), "{said}");
        assert!(said.len() < 2 * TAIL_BYTES_MAX);
        let said = run_script("kill -9 $$", None).to_string();
        assert_eq!(said, "killed by signal 9, without a word");
    }

    #[test]
    fn hook_that_takes_too_long_is_killed_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let lock = directory.path().join("lock");
        // Every child holds the lock.
        let text = format!("exec 9>{}; flock 9; sleep 30 & sleep 30", lock.display());
        let began = Instant::now();
        let ending = run_script(&text, Some(1));
        assert!(matches!(ending, Ending::TooLong(..)), "{ending:?}");
        let lock = File::open(&lock).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(began.elapsed() < Duration::from_secs(29));
    }

    #[test]
    fn hook_that_closes_its_output_is_waited_for() {
        let said = run_script("exec >&- 2>&-; sleep 0.2; exit 4", None).to_string();
        assert!(said.starts_with("exit status 4"), "{said}");
    }

    #[test]
    fn background_of_a_hook_does_not_hold_it_up() {
        let began = Instant::now();
        assert_eq!(run_script("sleep 20 & exit 0", None), Ending::Success);
        assert!(began.elapsed() < Duration::from_secs(19));
    }

    #[test]
    fn surroundings_are_as_the_spec_says() {
        let directory = tempfile::tempdir().unwrap();
        let state = "x".repeat(1_000_000);
        let ending = script("cat > state; echo $0 > name; env > env", None)
            .run(state.as_bytes(), directory.path())
            .unwrap();
        assert_eq!(ending, Ending::Success);
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("state"), state);
        assert_eq!(read("name"), "the-name\n");
        let env = read("env");
        assert!(env.contains("WORD=husk"), "{env}");
        assert!(!env.contains("CARGO"), "{env}");
    }

    #[test]
    fn hook_without_a_timeout_has_a_limit() {
        assert_eq!(hook(json!({ "path": "/a" })).time_limit(), TIMEOUT_DEFAULT);
        let ages = hook(json!({ "path": "/a", "timeout": i64::MAX }));
        assert_eq!(ages.time_limit(), TIMEOUT_MAX);
    }
}
