//! The agent's side of a launch: starts a stage, answers its reports, and holds the process at its
//! gate until it is to run.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::attributes::Attributes;
use crate::oci::IdMapping;
use crate::plan::{self, Failure, Handover, Order, Place, Plan, Report, StartHooks};
use crate::reaper::{Exit, Reaper};
use crate::stdio::{Streams, nonblocking};

/// How long a stage may take from one report to the next.
const REPORT_DEADLINE: Duration = Duration::from_secs(30);

/// Why a process was not launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The stage gave up.
    #[error(transparent)]
    Stage(#[from] Failure),
    /// The stage can't be started.
    #[error("cannot start the launch stage {program}")]
    Spawn {
        /// Its program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The stage can't be talked to.
    #[error("cannot talk to the launch stage")]
    Talk(#[source] io::Error),
    /// The stage ended without a word.
    #[error("the launch stage ended without a report, its process with status {0:?}")]
    Silent(Option<u32>),
    /// The stage is too slow.
    #[error("the launch stage did not report within {0:?}")]
    Deadline(Duration),
    /// Id mappings can't be written.
    #[error("cannot write the id mappings")]
    Mappings(#[source] io::Error),
}

/// A process behind its gate.
#[derive(Debug)]
pub struct Launched {
    /// Its pid.
    pub pid: i32,
    /// Names the process whatever becomes of the pid.
    pub pidfd: OwnedFd,
    /// Its end.
    pub exit: watch::Receiver<Option<Exit>>,
    /// Its terminal's master side.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    channel: AsyncFd<OwnedFd>,
    /// From the order to start to the program.
    start_deadline: Duration,
}

/// A process as its stage has reported it so far. Dropped without being taken, it is killed.
#[derive(Default)]
struct Progress {
    process: Option<(i32, OwnedFd, watch::Receiver<Option<Exit>>)>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// Launches a process up to its gate.
pub async fn launch(
    program: &Path,
    reaper: &Arc<Reaper>,
    plan: &Plan,
    streams: Streams,
) -> Result<Launched, LaunchError> {
    // What can't be is refused before anything is started.
    let is_exec = matches!(plan.place, Place::Enter { .. });
    let attributes = Attributes::parse(&plan.process, is_exec)?;
    let expectation = reaper.expect();
    let channel = spawn(program, plan, &streams.fds)?;
    let Streams {
        fds,
        terminal,
        movers,
    } = streams;
    // The stage has its own; a copy kept here would keep the pipes open for ever.
    drop(fds);
    let mut terminal_taker = terminal;
    let mut progress = Progress::default();
    loop {
        let (report, fds) = match next_report(&channel, REPORT_DEADLINE).await? {
            Some(received) => received,
            None => return Err(LaunchError::Silent(progress.status())),
        };
        match report {
            Report::NeedsMappings { pid } => {
                write_mappings(pid, plan).map_err(LaunchError::Mappings)?;
                order(&channel)?;
            }
            Report::Forked { pid } => {
                let exit = expectation.claim(pid);
                let pidfd = open_pidfd(pid).map_err(LaunchError::Talk)?;
                progress.process = Some((pid, pidfd, exit));
                attributes.apply_limits(Pid::from_raw(pid).ok_or_else(missing)?)?;
                order(&channel)?;
            }
            Report::Console => {
                let master = fds.into_iter().next().ok_or_else(missing)?;
                let interest = Interest::READABLE | Interest::WRITABLE;
                let master = nonblocking(master, interest).map_err(LaunchError::Talk)?;
                let master = Arc::new(master);
                if let Some(taker) = terminal_taker.take() {
                    // Fails only if the stream's task is over, which then needs no terminal.
                    let _ = taker.send(Arc::clone(&master));
                }
                progress.terminal = Some(master);
            }
            Report::Ready => {
                let (pid, ..) = progress.process.as_ref().ok_or_else(missing)?;
                attributes.apply_scheduling(Pid::from_raw(*pid).ok_or_else(missing)?)?;
                let terminal = progress.terminal.take();
                let hooks = plan.start_hooks.as_ref();
                let hooks = hooks.map_or(Duration::ZERO, StartHooks::time_limit);
                let (pid, pidfd, exit) = progress.process.take().ok_or_else(missing)?;
                movers.let_go();
                return Ok(Launched {
                    pid,
                    pidfd,
                    exit,
                    terminal,
                    channel,
                    start_deadline: REPORT_DEADLINE + hooks,
                });
            }
            Report::Failed(failure) => return Err(failure.into()),
        }
    }
}

impl Launched {
    /// Opens the gate, and returns once the program runs.
    ///
    /// # Errors
    /// [`LaunchError`]; the process is killed.
    pub async fn start(self) -> Result<(), LaunchError> {
        let started = self.open_gate().await;
        if started.is_err() {
            // It may have ended by itself, which is what is wanted.
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
        started
    }

    async fn open_gate(&self) -> Result<(), LaunchError> {
        match order(&self.channel) {
            // Killed at the gate: to have run and ended is the same to everybody.
            Err(LaunchError::Talk(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(());
            }
            other => other?,
        }
        match next_report(&self.channel, self.start_deadline).await? {
            None => Ok(()),
            Some((Report::Failed(failure), _)) => Err(failure.into()),
            Some(_) => Err(LaunchError::Talk(io::Error::other("an unexpected report"))),
        }
    }
}

impl Progress {
    fn status(&self) -> Option<u32> {
        let (_, _, exit) = self.process.as_ref()?;
        let exit = *exit.borrow();
        exit.map(|exit| exit.status)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((_, pidfd, _)) = &self.process {
            // It may have ended by itself, which is what is wanted.
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

fn missing() -> LaunchError {
    LaunchError::Talk(io::Error::other(
        "a report lacks its descriptor or its process",
    ))
}

fn spawn(
    program: &Path,
    plan: &Plan,
    streams: &[OwnedFd; 3],
) -> Result<AsyncFd<OwnedFd>, LaunchError> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|error| LaunchError::Talk(error.into()))?;
    let plan = plan.to_memfd().map_err(LaunchError::Talk)?;
    let [stdin, stdout, stderr] = streams;
    let fds = [plan.as_fd(), stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    plan::send(ours.as_fd(), &Handover, &fds).map_err(LaunchError::Talk)?;
    // Not waited for through std: the reaper collects every child.
    Command::new(program)
        .arg("launch")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(|source| LaunchError::Spawn {
            program: program.to_owned(),
            source,
        })?;
    nonblocking(ours, Interest::READABLE).map_err(LaunchError::Talk)
}

async fn next_report(
    channel: &AsyncFd<OwnedFd>,
    deadline: Duration,
) -> Result<Option<(Report, Vec<OwnedFd>)>, LaunchError> {
    let received = channel.async_io(Interest::READABLE, |channel| plan::receive(channel.as_fd()));
    match tokio::time::timeout(deadline, received).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Ok(result) => result.map_err(LaunchError::Talk),
        Err(_) => Err(LaunchError::Deadline(deadline)),
    }
}

fn order(channel: &AsyncFd<OwnedFd>) -> Result<(), LaunchError> {
    // An order is a few bytes, and the stage waits for it: the socket has room.
    plan::send(channel.get_ref().as_fd(), &Order, &[]).map_err(LaunchError::Talk)
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

fn write_mappings(pid: i32, plan: &Plan) -> io::Result<()> {
    let Place::Create(spec) = &plan.place else {
        return Err(io::Error::other("only a new container has mappings"));
    };
    let directory = Path::new("/proc").join(pid.to_string());
    let (uids, gids) = (&spec.linux.uid_mappings, &spec.linux.gid_mappings);
    std::fs::write(directory.join("uid_map"), IdMapping::lines(uids))?;
    std::fs::write(directory.join("gid_map"), IdMapping::lines(gids))
}
