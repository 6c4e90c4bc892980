//! FIFOs as containerd's clients make them: one for each stream of a process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::host::DEADLINE;
use crate::shim::Streams;

/// A directory of a scenario's own, gone with the scenario.
pub(crate) struct Place {
    pub(crate) path: PathBuf,
}

impl Place {
    pub(crate) fn make(name: &str) -> Result<Self> {
        let path = Path::new("/run").join(format!("husk-scenarios-{name}"));
        // A scenario that was broken off may have left it.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| format!("cannot make {path:?}"))?;
        Ok(Self { path })
    }

    /// A path in it, as text.
    pub(crate) fn at(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Makes a FIFO.
    pub(crate) fn fifo(&self, name: &str) -> Result<Fifo> {
        let path = self.path.join(name);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0)
            .with_context(|| format!("cannot make the FIFO {path:?}"))?;
        Ok(Fifo { path })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A FIFO.
pub(crate) struct Fifo {
    path: PathBuf,
}

impl Fifo {
    /// Its path, as requests have it.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// A client that reads.
    pub(crate) fn reader(&self) -> Result<Reader> {
        Ok(Reader(self.open(OFlags::RDONLY)?))
    }

    /// A client that writes. Opened for both, which waits for nobody and is never refused.
    pub(crate) fn writer(&self) -> Result<Writer> {
        Ok(Writer(self.open(OFlags::RDWR)?))
    }

    fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .with_context(|| format!("cannot open the FIFO {:?}", self.path))
    }
}

/// FIFOs for all streams of a process.
pub(crate) struct Fifos {
    pub(crate) stdin: Fifo,
    pub(crate) stdout: Fifo,
    pub(crate) stderr: Fifo,
    /// Nobody says anything there, but runc's shim waits for somebody who listens.
    _listener: Reader,
}

impl Fifos {
    pub(crate) fn make(place: &Place, name: &str) -> Result<(Self, Streams)> {
        let stderr = place.fifo(&format!("{name}-err"))?;
        let fifos = Self {
            stdin: place.fifo(&format!("{name}-in"))?,
            stdout: place.fifo(&format!("{name}-out"))?,
            _listener: stderr.reader()?,
            stderr,
        };
        let streams = Streams {
            stdin: fifos.stdin.name(),
            stdout: fifos.stdout.name(),
            stderr: fifos.stderr.name(),
            ..Streams::default()
        };
        Ok((fifos, streams))
    }

    pub(crate) fn remove(self) -> Result<()> {
        for fifo in [self.stdin, self.stdout, self.stderr] {
            fs::remove_file(fifo.name())?;
        }
        Ok(())
    }
}

/// A client's end to read from.
pub(crate) struct Reader(OwnedFd);

impl Reader {
    /// The next bytes; none at the end.
    pub(crate) fn read<'a>(&self, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            wait(&self.0, PollFlags::IN, deadline).context("nothing comes out")?;
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(count) => return Ok(buffer.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot read the FIFO"),
            }
        }
    }

    /// Whether nothing is left and nobody writes. A reader that came after the last writer has gone
    /// gets no hang-up to wait for.
    pub(crate) fn is_at_end(&self) -> bool {
        matches!(rustix::io::read(&self.0, &mut [0]), Ok(0))
    }

    /// Everything up to the end.
    pub(crate) fn rest(&self) -> Result<Vec<u8>> {
        let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            let read = self.read(&mut buffer)?;
            if read.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(read);
        }
    }

    /// Bytes up to the end of a line, which is not among them.
    pub(crate) fn line(&self) -> Result<String> {
        let mut line = Vec::new();
        loop {
            match self.read(&mut [0])? {
                [] => bail!("the output ends after {:?}", String::from_utf8_lossy(&line)),
                b"\n" => return Ok(String::from_utf8_lossy(&line).into_owned()),
                byte => line.extend_from_slice(byte),
            }
        }
    }
}

/// A client's end to write to.
pub(crate) struct Writer(OwnedFd);

impl Writer {
    pub(crate) fn write(&self, mut bytes: &[u8]) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !bytes.is_empty() {
            wait(&self.0, PollFlags::OUT, deadline).context("nothing goes in")?;
            match rustix::io::write(&self.0, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot write to the FIFO"),
            }
        }
        Ok(())
    }
}

/// Waits for readiness, or for a hang-up, which a read or a write tells of.
fn wait(fd: &OwnedFd, flags: PollFlags, deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(fd, flags)], Some(&left)) {
        Ok(0) => bail!("not within {DEADLINE:?}"),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error).context("cannot wait"),
    }
}
