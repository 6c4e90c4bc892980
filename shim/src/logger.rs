//! Log drivers: programs that take a process's output, named by a `binary://` URI.
//!
//! # Protocol
//! As containerd's own shim has it (core/runtime/v2/README.md, "Logging"): the program finds the
//! process's standard output at descriptor 3, its standard error at 4, and at 5 a pipe that it
//! closes once it is ready; nothing runs before that. Its arguments are the URI's query, key and
//! value in turn, and its environment is `CONTAINER_ID` and `CONTAINER_NAMESPACE`. Both streams end
//! as the process does, and then the program has some time to end by itself.
//!
//! A child gets numbered descriptors without unsafe code by a detour: this program runs itself
//! with the three as standard streams ([`become_logger`]), copies them to the next free numbers,
//! which are 3, 4 and 5, and becomes the log driver.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// The first argument with which this program becomes a log driver. Nobody types it.
pub(crate) const BECOME: &str = "become-logger";

/// How long a log driver may take to be ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long one may take to end by itself once its input has ended, as runc's shim grants it.
const END_DEADLINE: Duration = Duration::from_secs(12);

/// The same after SIGTERM.
const TERMINATE_DEADLINE: Duration = Duration::from_secs(2);

/// What a message about a failed start begins with: ASCII's "negative acknowledge". A log driver
/// that writes into the pipe instead of closing it has no reason to write that.
const FAILED: u8 = 0x15;

/// Longest message about a failed start.
const MESSAGE_BYTES_MAX: u64 = 4096;

/// The numbers at which a log driver finds its descriptors.
const DESCRIPTORS: [i32; 3] = [3, 4, 5];

/// Where a process's output goes, and who that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoggerUri {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
}

/// What a URI is that names no program.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UriError {
    #[error("{0:?} is not an absolute path")]
    Relative(String),
    #[error("{0:?} has a % that is followed by no two hexadecimal digits")]
    Escape(String),
    #[error("{0:?} is not UTF-8 once its escapes are resolved")]
    NotUtf8(String),
}

/// Whose output it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) namespace: &'a str,
    /// The container's id, or the exec's.
    pub(crate) id: &'a str,
}

/// Why a log driver does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggerError {
    #[error("cannot start the log driver {program:?}")]
    Start { program: PathBuf, source: io::Error },
    #[error("the log driver {program:?} does not run: {text}")]
    NotRunning { program: PathBuf, text: String },
    #[error("the log driver {program:?} was not ready within {READY_DEADLINE:?}")]
    NotReady { program: PathBuf },
}

/// A log driver that is ready. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Logger {
    program: PathBuf,
    child: Child,
}

/// What a process writes to, for its log driver to read.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

impl LoggerUri {
    /// Parses what follows `binary://`.
    pub(crate) fn parse(text: &str) -> Result<Self, UriError> {
        let (path, query) = text.split_once('?').unwrap_or((text, ""));
        let path = unescape(path)?;
        if !path.starts_with('/') {
            return Err(UriError::Relative(path));
        }
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let pair = pair.replace('+', " ");
            let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
            let key = unescape(key)?;
            // Of a key that comes again, the first value counts, as with runc's shim.
            if pairs.iter().all(|(known, _)| *known != key) {
                pairs.push((key, unescape(value)?));
            }
        }
        Ok(Self {
            program: path.into(),
            arguments: pairs
                .into_iter()
                .flat_map(|(key, value)| [key, value])
                .collect(),
        })
    }
}

/// Resolves `%XX`.
pub(crate) fn unescape(text: &str) -> Result<String, UriError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(UriError::Escape(text.to_owned()));
        };
        // Two hexadecimal digits are a byte.
        bytes.push(u8::try_from(high * 16 + low).unwrap_or(u8::MAX));
    }
    String::from_utf8(bytes).map_err(|_| UriError::NotUtf8(text.to_owned()))
}

impl Logger {
    /// Starts a log driver and waits until it is ready.
    pub(crate) async fn start(
        uri: &LoggerUri,
        owner: Owner<'_>,
    ) -> Result<(Self, Inputs), LoggerError> {
        let failed = |source| LoggerError::Start {
            program: uri.program.clone(),
            source,
        };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()));
        let ((stdout, stdout_input), (stderr, stderr_input)) = (pipe()?, pipe()?);
        let (ready, ready_writer) = pipe()?;
        for input in [&stdout_input, &stderr_input] {
            // The VMM writes to them and never waits.
            rustix::io::ioctl_fionbio(input, true).map_err(|errno| failed(errno.into()))?;
        }
        let ourselves = std::env::current_exe().map_err(failed)?;
        let child = Command::new(ourselves)
            .arg(BECOME)
            .arg(&uri.program)
            .args(&uri.arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(stdout)
            .stdout(stderr)
            .stderr(ready_writer)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        // Dropped, and so killed, if it is not ready.
        let logger = Self {
            program: uri.program.clone(),
            child,
        };
        let ready = Receiver::from_owned_fd(ready).map_err(failed)?;
        let Ok(text) = timeout(READY_DEADLINE, hear_ready(ready)).await else {
            return Err(LoggerError::NotReady {
                program: logger.program.clone(),
            });
        };
        match text.map_err(failed)? {
            None => Ok((
                logger,
                Inputs {
                    stdout: stdout_input,
                    stderr: stderr_input,
                },
            )),
            Some(text) => Err(LoggerError::NotRunning {
                program: logger.program.clone(),
                text,
            }),
        }
    }

    /// Waits for the end of a log driver whose inputs have ended; one that takes too long is asked
    /// to end, and then made to.
    pub(crate) async fn finish(mut self) {
        let program = self.program.clone();
        let ended = match timeout(END_DEADLINE, self.child.wait()).await {
            Ok(ended) => ended,
            Err(_) => {
                tracing::warn!(
                    ?program,
                    "the log driver is told to end: it goes on {END_DEADLINE:?} after its input's end"
                );
                self.terminate().await
            }
        };
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(?program, "the log driver ended with {status}"),
            Err(error) => tracing::warn!(?program, %error, "the log driver was lost"),
        }
    }

    async fn terminate(&mut self) -> io::Result<ExitStatus> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            // It has not been reaped, so the pid is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        if let Ok(ended) = timeout(TERMINATE_DEADLINE, self.child.wait()).await {
            return ended;
        }
        self.child.start_kill()?;
        self.child.wait().await
    }
}

/// Waits for the pipe's end or for any byte in it. Returns what went wrong, if it says so.
async fn hear_ready(mut ready: Receiver) -> io::Result<Option<String>> {
    let mut first = [0];
    if ready.read(&mut first).await? == 0 || first != [FAILED] {
        return Ok(None);
    }
    let mut text = Vec::new();
    ready.take(MESSAGE_BYTES_MAX).read_to_end(&mut text).await?;
    Ok(Some(String::from_utf8_lossy(&text).into_owned()))
}

/// Becomes the program of the arguments, with our standard streams as its descriptors 3, 4 and 5.
/// Returns only if that fails, having said so through the pipe.
pub(crate) fn become_logger(mut arguments: impl Iterator<Item = OsString>) -> io::Error {
    let Some(program) = arguments.next() else {
        return io::Error::other("no program is named");
    };
    let [_stdout, _stderr, ready] = match descriptors() {
        Ok(descriptors) => descriptors,
        Err(error) => {
            say_failed(rustix::stdio::stderr(), &error);
            return error;
        }
    };
    let error = std::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .exec();
    // The standard streams are gone by now.
    say_failed(&ready, &error);
    error
}

fn say_failed(ready: impl AsFd, error: &io::Error) {
    let mut message = vec![FAILED];
    message.extend_from_slice(error.to_string().as_bytes());
    // There is nobody else to tell.
    let _ = rustix::io::write(ready, &message);
}

/// Copies the standard streams to the numbers of the protocol, to be inherited.
fn descriptors() -> io::Result<[OwnedFd; 3]> {
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    let [stdin, stdout, stderr] = streams.map(rustix::io::dup);
    let copies = [stdin?, stdout?, stderr?];
    for (copy, number) in copies.iter().zip(DESCRIPTORS) {
        if copy.as_raw_fd() != number {
            return Err(io::Error::other(format!(
                "descriptor {number} is in use by somebody else"
            )));
        }
    }
    Ok(copies)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn uris_that_name_no_program_are_refused() {
        for (text, wanted) in [
            ("", "\"\" is not an absolute path"),
            ("host/bin/log", "\"host/bin/log\" is not an absolute path"),
            (
                "/bin/l%4",
                "\"/bin/l%4\" has a % that is followed by no two hexadecimal digits",
            ),
            (
                "/bin/log?a=%zz",
                "\"%zz\" has a % that is followed by no two hexadecimal digits",
            ),
            (
                "/bin/%ff",
                "\"/bin/%ff\" is not UTF-8 once its escapes are resolved",
            ),
        ] {
            let error = LoggerUri::parse(text).unwrap_err();
            assert_eq!(error.to_string(), wanted, "{text}");
        }
    }

    #[test]
    fn arguments_are_keys_and_values_in_turn() {
        let uri = LoggerUri::parse("/usr/bin/my%20log?id=a%2Bb&dir=x+y&flag&id=other&&e=").unwrap();
        assert_eq!(uri.program, PathBuf::from("/usr/bin/my log"));
        assert_eq!(
            uri.arguments,
            ["id", "a+b", "dir", "x y", "flag", "", "e", ""]
        );
        assert!(LoggerUri::parse("/bin/log").unwrap().arguments.is_empty());
    }

    #[tokio::test]
    async fn ready_is_the_pipe_s_end_or_any_byte_but_one() {
        for (said, wanted) in [
            (b"".as_slice(), None),
            (b"ready", None),
            (b"\x15no such file", Some("no such file")),
        ] {
            let (reader, writer) = io::pipe().unwrap();
            let mut writer = writer;
            writer.write_all(said).unwrap();
            drop(writer);
            let ready = Receiver::from_owned_fd(reader.into()).unwrap();
            assert_eq!(hear_ready(ready).await.unwrap().as_deref(), wanted);
        }
    }
}
