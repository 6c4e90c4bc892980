//! The machine that the scenarios run on: its processes, and waiting for its files.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What containerd and the shims say.
const LOG: &str = "/var/log/containerd.log";

/// For something to happen that is due, in the testbed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A process that somebody else has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// As `ps -o comm` says: at most 15 characters.
    pub(crate) name: String,
    arguments: Vec<u8>,
}

impl Process {
    /// All there are.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc").context("cannot list /proc")? {
            let directory = entry?.path();
            let pid = directory.file_name().and_then(OsStr::to_str);
            let Some(pid) = pid.and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A process may end while it is looked at.
            let Ok(name) = fs::read_to_string(directory.join("comm")) else {
                continue;
            };
            all.push(Self {
                pid,
                name: name.trim_end().to_owned(),
                arguments: fs::read(directory.join("cmdline")).unwrap_or_default(),
            });
        }
        Ok(all)
    }

    /// Whether the program is this one. `comm` is cut to 15 characters.
    pub(crate) fn is(&self, program: &str) -> bool {
        program.get(..15).unwrap_or(program) == self.name
    }

    /// Whether one of its arguments is this word.
    pub(crate) fn has_argument(&self, word: &str) -> bool {
        let mut arguments = self.arguments.split(|byte| *byte == 0);
        arguments.any(|argument| argument == word.as_bytes())
    }

    /// Memory that is its own: what no file holds and no other process has a part in.
    pub(crate) fn memory_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let mut lines = status.lines();
        let figure = lines.find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = figure.and_then(|figure| figure.trim().strip_suffix(" kB"));
        let kib: u64 = kib
            .and_then(|kib| kib.parse().ok())
            .with_context(|| format!("{path} has no RssAnon: {status}"))?;
        Ok(kib.saturating_mul(1024))
    }

    /// Sends SIGKILL and waits for the end.
    pub(crate) fn kill(&self) -> Result<()> {
        let Some(pidfd) = self.open()? else {
            return Ok(());
        };
        // Gone meanwhile is as good.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        ensure!(
            readable(&pidfd, Instant::now() + DEADLINE)?,
            "{} {} outlives SIGKILL",
            self.name,
            self.pid
        );
        Ok(())
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pidfd = self.open()?.context("it has ended")?;
        pidfd_send_signal(&pidfd, signal).context("cannot send a signal")
    }

    /// Waits for its end; `false` if it does not come in time.
    pub(crate) fn ends_before(&self, deadline: Instant) -> Result<bool> {
        match self.open()? {
            Some(pidfd) => readable(&pidfd, deadline),
            None => Ok(true),
        }
    }

    fn open(&self) -> Result<Option<OwnedFd>> {
        let pid = Pid::from_raw(self.pid).context("no pid")?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(pidfd)),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error).context("cannot watch a process"),
        }
    }
}

/// The shims of a task: the process that serves it.
pub(crate) fn shims(id: &str) -> Result<Vec<Process>> {
    let mut all = Process::all()?;
    // `-id ID` in both runtimes; every other process with the id is somebody who asks for it.
    all.retain(|process| process.is("containerd-shim") && process.has_argument(id));
    Ok(all)
}

/// The virtual machines.
pub(crate) fn vmms() -> Result<Vec<Process>> {
    let mut all = Process::all()?;
    all.retain(|process| process.is("husk-vmm"));
    Ok(all)
}

/// Waits until the path is there, or is not there any more.
pub(crate) fn path_becomes(path: &Path, wanted: bool, deadline: Instant) -> Result<bool> {
    loop {
        // Symbolic links count as they are.
        if path.symlink_metadata().is_ok() == wanted {
            return Ok(true);
        }
        let directory = path.ancestors().skip(1).find(|place| place.is_dir());
        let directory = directory.context("no directory to watch")?;
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        use inotify::WatchFlags as W;
        let events = W::CREATE | W::MOVED_TO | W::MOVED_FROM | W::DELETE | W::DELETE_SELF;
        if inotify::add_watch(&watch, directory, events).is_err() {
            // It went away just now.
            continue;
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&watch, &mut buffer);
        // What has happened before the watch was set makes no event.
        if path.symlink_metadata().is_ok() == wanted {
            return Ok(true);
        }
        let nearest = path.ancestors().skip(1).find(|place| place.is_dir());
        if nearest != Some(directory) {
            continue;
        }
        if !readable(&watch, deadline)? {
            return Ok(false);
        }
        reader.next()?;
    }
}

/// Waits until the text of a file is as wanted. The file may not be there yet; its directory is made
/// with it.
pub(crate) fn file_becomes(path: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    ensure!(path_becomes(path, true, deadline)?, "there is no {path:?}");
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(&watch, &mut buffer);
    loop {
        let text = fs::read_to_string(path)?;
        if is_wanted(&text) {
            return Ok(());
        }
        ensure!(readable(&watch, deadline)?, "{path:?} has {text:?}");
        reader.next()?;
    }
}

/// What appears in a directory from now on.
pub(crate) struct Appearing(OwnedFd);

impl Appearing {
    pub(crate) fn watch(directory: &Path) -> Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = inotify::init(flags)?;
        inotify::add_watch(&watch, directory, inotify::WatchFlags::CREATE)
            .with_context(|| format!("cannot watch {directory:?}"))?;
        Ok(Self(watch))
    }

    /// Waits for the next names.
    pub(crate) fn next(&self) -> Result<Vec<String>> {
        ensure!(
            readable(&self.0, Instant::now() + DEADLINE)?,
            "nothing appears"
        );
        self.names()
    }

    /// The names that have appeared since this was last asked.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut names = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => names.extend(
                    event
                        .file_name()
                        .map(|name| name.to_string_lossy().into_owned()),
                ),
                Err(rustix::io::Errno::AGAIN) => return Ok(names),
                Err(error) => return Err(error).context("cannot read what has appeared"),
            }
        }
    }
}

/// Waits for a change of the mounts; `false` if none comes in time.
pub(crate) fn mounts_change(before: Instant) -> Result<bool> {
    // Opening it takes note of how things are: what changes afterwards is told.
    let mounts = File::open("/proc/self/mountinfo")?;
    wait(&mounts, PollFlags::PRI | PollFlags::ERR, before)
}

fn readable(fd: &impl std::os::fd::AsFd, deadline: Instant) -> Result<bool> {
    wait(fd, PollFlags::IN, deadline)
}

fn wait(fd: &impl std::os::fd::AsFd, events: PollFlags, deadline: Instant) -> Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left)?;
    Ok(poll(&mut [PollFd::new(fd, events)], Some(&left))? > 0)
}

/// The last line of containerd's log that has all these words.
pub(crate) fn log_line(words: &[&str]) -> Result<String> {
    let log = fs::read(LOG).context("cannot read containerd's log")?;
    let log = String::from_utf8_lossy(&log);
    let mut lines = log.lines().rev();
    let line = lines.find(|line| words.iter().all(|word| line.contains(word)));
    Ok(line
        .with_context(|| format!("the log has no line with {words:?}"))?
        .to_owned())
}

/// The end of containerd's log without what tells of good days.
pub(crate) fn last_warnings() -> Vec<String> {
    const LINES_MAX: usize = 12;
    let log = fs::read(LOG).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let mut lines: Vec<_> = log
        .lines()
        .rev()
        .filter(|line| !line.contains("level=info"))
        .take(LINES_MAX)
        .map(str::to_owned)
        .collect();
    lines.reverse();
    lines
}

/// The running containerd.
pub(crate) fn containerd() -> Result<Process> {
    let mut all = Process::all()?;
    // One that was killed stays a zombie, without arguments, until its parent asks.
    // The one of pods' scenarios has a configuration of its own, and so has Docker's.
    all.retain(|process| {
        process.is("containerd")
            && process.has_argument("containerd")
            && !process.has_argument("--config")
    });
    match <[Process; 1]>::try_from(all) {
        Ok([containerd]) => Ok(containerd),
        Err(all) => bail!("{} processes are containerd, not one", all.len()),
    }
}

/// Starts containerd and waits until it is ready, as systemd would hear it (sd_notify(3)).
pub(crate) fn start_containerd() -> Result<()> {
    const SOCKET: &str = "/run/husk-scenarios-ready";
    let ready = UnixDatagram::bind(SOCKET).context("cannot make the socket for READY")?;
    ready.set_read_timeout(Some(DEADLINE))?;
    let log = OpenOptions::new().append(true).create(true).open(LOG)?;
    // In a session of its own, as a service: nothing that ends the scenarios ends it.
    let started = Command::new("setsid")
        .arg("containerd")
        .env("NOTIFY_SOCKET", SOCKET)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot run containerd");
    let said = started.and_then(|_| hear_ready(&ready));
    fs::remove_file(SOCKET)?;
    said
}

fn hear_ready(ready: &UnixDatagram) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let count = ready.recv(&mut buffer).context("containerd is not ready")?;
        let said = buffer.get(..count).unwrap_or_default();
        if said.windows(7).any(|word| word == b"READY=1") {
            return Ok(());
        }
    }
}

/// A mount of the machine's, as long as a scenario needs it.
pub(crate) struct HostMount(PathBuf);

impl HostMount {
    /// A new tmpfs.
    pub(crate) fn tmpfs(path: &Path) -> Result<Self> {
        Self::mount(path, &["-t", "tmpfs", "tmpfs"], Path::new("/"))
    }

    /// `mount` of what the arguments say, from a working directory.
    pub(crate) fn mount(path: &Path, arguments: &[&str], directory: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        let status = Command::new("mount")
            .current_dir(directory)
            .args(arguments)
            .arg(path)
            // The newer calls take no option that is longer than 255 bytes.
            .env("LIBMOUNT_FORCE_MOUNT2", "always")
            .status()
            .context("cannot run mount")?;
        ensure!(status.success(), "cannot mount {arguments:?} at {path:?}");
        Ok(Self(path.to_owned()))
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        // The comparison with the machine before tells of one that stays.
        let _ = Command::new("umount")
            .arg("--recursive")
            .arg(&self.0)
            .status();
    }
}
