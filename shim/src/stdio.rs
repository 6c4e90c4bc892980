//! The files that containerd names for a process's stdin, stdout and stderr.
//!
//! They are FIFOs on which containerd's client holds the other ends, now, later, or never; or
//! standard output names a file or a log driver, which then takes both outputs, as with runc's
//! shim. The descriptors opened here go to the VMM, which moves the bytes; this process only keeps
//! the ends that must stay open while a client comes and goes.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use crate::logger::{Logger, LoggerError, LoggerUri, Owner, UriError, unescape};

/// The paths of one process, empty for `/dev/null`, as in containerd's requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// The ends that the process itself is connected to.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// What only keeps the process's streams alive.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// A writer, so that a client that detaches does not end the process's input. Dropped by
    /// CloseIO.
    stdin: Option<OwnedFd>,
    /// Readers, so that output is not refused while containerd restarts. Dropped once the
    /// process is deleted.
    _outputs: Vec<OwnedFd>,
    logger: Option<Logger>,
}

impl Held {
    /// Ends the process's input once the client's own end is closed too.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Lets go of all of it; returns once a log driver has ended.
    pub(crate) async fn finish(self) {
        if let Some(logger) = self.logger {
            logger.finish().await;
        }
    }
}

/// Why the files could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("cannot open {path:?} as the process's {stream}")]
    Open {
        stream: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the process's {stream} is {uri:?}, and only FIFOs, file:// and, for stdout, binary:// are \
         supported"
    )]
    Scheme { stream: &'static str, uri: String },
    #[error("the process's {stream} {path:?} is not an absolute path")]
    Relative { stream: &'static str, path: PathBuf },
    #[error("the process's {stream}")]
    Uri {
        stream: &'static str,
        source: UriError,
    },
    #[error("cannot make the directory of {path:?}, the process's {stream}")]
    Directory {
        stream: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Logger(#[from] LoggerError),
}

/// What a stream's name means.
#[derive(Debug)]
enum Target {
    /// A path without a scheme, or `fifo://`.
    Plain(PathBuf),
    /// `file://`: created where missing, appended to.
    Log(PathBuf),
    /// `binary://`.
    Logger(LoggerUri),
}

impl Paths {
    /// Opens all of them. Nothing stays open if one fails, and nothing waits for a client; only a
    /// log driver is waited for.
    pub(crate) async fn open(&self, owner: Owner<'_>) -> Result<(Ends, Held), StdioError> {
        let mut ends = Ends::default();
        let mut held = Held::default();
        if !self.stdin.is_empty() {
            let (end, keep) = open_input(&self.stdin)?;
            ends.stdin = Some(end);
            held.stdin = keep;
        }
        let stdout = (!self.stdout.is_empty())
            .then(|| target("stdout", &self.stdout))
            .transpose()?;
        // A terminal's process has one output.
        let has_stderr = !self.stderr.is_empty() && !self.terminal;
        match stdout {
            Some(Target::Logger(uri)) => {
                let (logger, inputs) = Logger::start(&uri, owner).await?;
                held.logger = Some(logger);
                ends.stdout = Some(inputs.stdout);
                ends.stderr = Some(inputs.stderr).filter(|_| !self.terminal);
                return Ok((ends, held));
            }
            Some(Target::Log(path)) => {
                ends.stdout = Some(open_log("stdout", &path)?);
                if has_stderr {
                    ends.stderr = Some(open_log("stderr", &path)?);
                }
                return Ok((ends, held));
            }
            Some(Target::Plain(path)) => {
                let (end, keep) = open_output("stdout", &path)?;
                ends.stdout = Some(end);
                held._outputs.extend(keep);
            }
            None => {}
        }
        if has_stderr {
            match target("stderr", &self.stderr)? {
                Target::Plain(path) => {
                    let (end, keep) = open_output("stderr", &path)?;
                    ends.stderr = Some(end);
                    held._outputs.extend(keep);
                }
                Target::Log(path) => ends.stderr = Some(open_log("stderr", &path)?),
                Target::Logger(_) => return Err(scheme("stderr", &self.stderr)),
            }
        }
        Ok((ends, held))
    }
}

fn open_input(uri: &str) -> Result<(OwnedFd, Option<OwnedFd>), StdioError> {
    let stream = "stdin";
    let (Target::Plain(path) | Target::Log(path)) = target(stream, uri)? else {
        return Err(scheme(stream, uri));
    };
    let end = open(stream, &path, OFlags::RDONLY)?;
    let keep = if is_fifo(stream, &path, &end)? {
        Some(open(stream, &path, OFlags::WRONLY)?)
    } else {
        None
    };
    Ok((end, keep))
}

fn open_output(
    stream: &'static str,
    path: &Path,
) -> Result<(OwnedFd, Option<OwnedFd>), StdioError> {
    // A reader first: a writer alone is refused by a FIFO that nobody reads.
    let keep = open(stream, path, OFlags::RDONLY)?;
    let end = open(stream, path, OFlags::WRONLY)?;
    let fifo = is_fifo(stream, path, &end)?;
    Ok((end, fifo.then_some(keep)))
}

/// A log file, made with its directory where missing.
fn open_log(stream: &'static str, path: &Path) -> Result<OwnedFd, StdioError> {
    if let Some(directory) = path.parent() {
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o755).create(directory);
        made.map_err(|source| StdioError::Directory {
            stream,
            path: path.to_owned(),
            source,
        })?;
    }
    open(
        stream,
        path,
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE,
    )
}

fn target(stream: &'static str, uri: &str) -> Result<Target, StdioError> {
    let invalid = |source| StdioError::Uri { stream, source };
    let (is_log, path) = match uri.split_once("://") {
        None => (false, uri.into()),
        Some(("fifo", path)) => (false, path.into()),
        Some(("file", path)) => (true, unescape(path).map_err(invalid)?.into()),
        Some(("binary", text)) => {
            return Ok(Target::Logger(LoggerUri::parse(text).map_err(invalid)?));
        }
        Some(_) => return Err(scheme(stream, uri)),
    };
    let path: PathBuf = path;
    if path.is_relative() {
        return Err(StdioError::Relative { stream, path });
    }
    Ok(if is_log {
        Target::Log(path)
    } else {
        Target::Plain(path)
    })
}

fn scheme(stream: &'static str, uri: &str) -> StdioError {
    StdioError::Scheme {
        stream,
        uri: uri.to_owned(),
    }
}

fn open(stream: &'static str, path: &Path, flags: OFlags) -> Result<OwnedFd, StdioError> {
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    rustix::fs::open(path, flags, mode).map_err(|errno| StdioError::Open {
        stream,
        path: path.to_owned(),
        source: errno.into(),
    })
}

fn is_fifo(stream: &'static str, path: &Path, end: &OwnedFd) -> Result<bool, StdioError> {
    let stat = rustix::fs::fstat(end).map_err(|errno| StdioError::Open {
        stream,
        path: path.to_owned(),
        source: errno.into(),
    })?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{Read, Write};

    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    const OWNER: Owner<'_> = Owner {
        namespace: "n",
        id: "c",
    };

    #[tokio::test]
    async fn bad_names_are_refused_with_the_stream_they_are_for() {
        for (stdout, wanted) in [
            (
                "gopher:///bin/log",
                "the process's stdout is \"gopher:///bin/log\", and only FIFOs",
            ),
            ("binary://log", "the process's stdout"),
            ("file:///a%", "the process's stdout"),
            (
                "relative",
                "the process's stdout \"relative\" is not an absolute path",
            ),
            (
                "/missing/fifo",
                "cannot open \"/missing/fifo\" as the process's stdout",
            ),
        ] {
            let paths = Paths {
                stdout: stdout.into(),
                ..Paths::default()
            };
            let error = paths.open(OWNER).await.unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[tokio::test]
    async fn output_can_be_written_before_a_client_reads_and_ends_with_the_writer() {
        let directory = tempfile::tempdir().unwrap();
        let stdout = fifo(directory.path(), "out");
        let (ends, held) = Paths {
            stdout: stdout.clone(),
            ..Paths::default()
        }
        .open(OWNER)
        .await
        .unwrap();

        let mut writer = File::from(ends.stdout.unwrap());
        writer.write_all(b"early").unwrap();
        let mut reader = File::open(&stdout).unwrap();
        drop(writer);
        drop(held);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();

        assert_eq!(text, "early");
    }

    #[tokio::test]
    async fn input_outlives_a_client_until_it_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = fifo(directory.path(), "in");
        let (ends, mut held) = Paths {
            stdin: stdin.clone(),
            ..Paths::default()
        }
        .open(OWNER)
        .await
        .unwrap();
        let mut reader = File::from(ends.stdin.unwrap());

        for word in [b"one", b"two"] {
            File::options()
                .write(true)
                .open(&stdin)
                .unwrap()
                .write_all(word)
                .unwrap();
            let mut read = [0; 3];
            reader.read_exact(&mut read).unwrap();
            assert_eq!(&read, word);
            let still_open = reader.read(&mut read).unwrap_err();
            assert_eq!(still_open.kind(), io::ErrorKind::WouldBlock);
        }
        held.close_stdin();
        assert_eq!(reader.read(&mut [0; 3]).unwrap(), 0);
    }

    #[tokio::test]
    async fn log_file_takes_both_outputs_and_is_made_where_it_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/my log");
        let uri = format!("file://{}", path.display()).replace(' ', "%20");
        let paths = Paths {
            stdout: uri.clone(),
            stderr: uri,
            ..Paths::default()
        };
        for words in ["first ", "second "] {
            let (ends, _held) = paths.open(OWNER).await.unwrap();
            for end in [ends.stdout, ends.stderr] {
                let mut end = File::from(end.unwrap());
                end.write_all(words.as_bytes()).unwrap();
            }
        }
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "first first second second ");
    }
}
