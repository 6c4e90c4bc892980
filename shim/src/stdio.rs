//! The files that containerd names for a process's stdin, stdout and stderr.
//!
//! They are FIFOs on which containerd's client holds the other ends, now, later, or never. The
//! descriptors opened here go to the VMM, which moves the bytes; this process only keeps the ends
//! that must stay open while a client comes and goes.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

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

/// The ends that only keep a FIFO alive.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// A writer, so that a client that detaches does not end the process's input. Dropped by
    /// CloseIO.
    stdin: Option<OwnedFd>,
    /// Readers, so that output is not refused while containerd restarts. Dropped once the
    /// process is deleted.
    _outputs: Vec<OwnedFd>,
}

impl Held {
    /// Ends the process's input once the client's own end is closed too.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
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
    #[error("the process's {stream} is {uri:?}, and only FIFOs and file:// are supported")]
    Scheme { stream: &'static str, uri: String },
    #[error("the process's {stream} {path:?} is not an absolute path")]
    Relative { stream: &'static str, path: PathBuf },
}

/// What a stream's name means.
enum Target<'a> {
    /// A path without a scheme, or `fifo://`.
    Plain(&'a Path),
    /// `file://`: created where missing, appended to.
    Log(&'a Path),
}

impl Paths {
    /// Opens all of them. Nothing stays open if one fails, and nothing waits for a client.
    pub(crate) fn open(&self) -> Result<(Ends, Held), StdioError> {
        let mut ends = Ends::default();
        let mut held = Held::default();
        if !self.stdin.is_empty() {
            let (end, keep) = open_input(&self.stdin)?;
            ends.stdin = Some(end);
            held.stdin = keep;
        }
        for (stream, uri, slot) in [
            ("stdout", &self.stdout, &mut ends.stdout),
            ("stderr", &self.stderr, &mut ends.stderr),
        ] {
            // A terminal's process has one output.
            if uri.is_empty() || (self.terminal && stream == "stderr") {
                continue;
            }
            let (end, keep) = open_output(stream, uri)?;
            *slot = Some(end);
            held._outputs.extend(keep);
        }
        Ok((ends, held))
    }
}

fn open_input(uri: &str) -> Result<(OwnedFd, Option<OwnedFd>), StdioError> {
    let stream = "stdin";
    let (Target::Plain(path) | Target::Log(path)) = target(stream, uri)?;
    let end = open(stream, path, OFlags::RDONLY)?;
    let keep = if is_fifo(stream, path, &end)? {
        Some(open(stream, path, OFlags::WRONLY)?)
    } else {
        None
    };
    Ok((end, keep))
}

fn open_output(stream: &'static str, uri: &str) -> Result<(OwnedFd, Option<OwnedFd>), StdioError> {
    match target(stream, uri)? {
        Target::Log(path) => {
            let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
            Ok((open(stream, path, flags)?, None))
        }
        Target::Plain(path) => {
            // A reader first: a writer alone is refused by a FIFO that nobody reads.
            let keep = open(stream, path, OFlags::RDONLY)?;
            let end = open(stream, path, OFlags::WRONLY)?;
            let fifo = is_fifo(stream, path, &end)?;
            Ok((end, fifo.then_some(keep)))
        }
    }
}

fn target<'a>(stream: &'static str, uri: &'a str) -> Result<Target<'a>, StdioError> {
    let target = match uri.split_once("://") {
        None => Target::Plain(Path::new(uri)),
        Some(("fifo", path)) => Target::Plain(Path::new(path)),
        Some(("file", path)) => Target::Log(Path::new(path)),
        Some(_) => {
            return Err(StdioError::Scheme {
                stream,
                uri: uri.to_owned(),
            });
        }
    };
    let (Target::Plain(path) | Target::Log(path)) = target;
    if path.is_relative() {
        return Err(StdioError::Relative {
            stream,
            path: path.to_owned(),
        });
    }
    Ok(target)
}

fn open(stream: &'static str, path: &Path, flags: OFlags) -> Result<OwnedFd, StdioError> {
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| StdioError::Open {
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

    #[test]
    fn bad_names_are_refused_with_the_stream_they_are_for() {
        for (stdout, wanted) in [
            (
                "binary:///bin/log",
                "the process's stdout is \"binary:///bin/log\", and only FIFOs",
            ),
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
            let error = paths.open().unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn output_can_be_written_before_a_client_reads_and_ends_with_the_writer() {
        let directory = tempfile::tempdir().unwrap();
        let stdout = fifo(directory.path(), "out");
        let (ends, held) = Paths {
            stdout: stdout.clone(),
            ..Paths::default()
        }
        .open()
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

    #[test]
    fn input_outlives_a_client_until_it_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = fifo(directory.path(), "in");
        let (ends, mut held) = Paths {
            stdin: stdin.clone(),
            ..Paths::default()
        }
        .open()
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

    #[test]
    fn log_files_are_created_and_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "kept ").unwrap();
        let paths = Paths {
            stderr: format!("file://{}", path.display()),
            ..Paths::default()
        };
        let (ends, _held) = paths.open().unwrap();
        File::from(ends.stderr.unwrap())
            .write_all(b"added")
            .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept added");
    }
}
