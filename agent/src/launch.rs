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
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::attributes::Attributes;
use crate::oci::IdMapping;
use crate::plan::{self, Failure, Handover, Order, Place, Plan, Report, StartHooks};
use crate::reaper::{Exit, Expectation, Reaper};
use crate::stdio::{Streams, nonblocking};

/// For a process that was killed to be gone.
pub(crate) const END_DEADLINE: Duration = Duration::from_secs(5);

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
    #[error("the launch took longer than {0:?}")]
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
    /// What the hooks may take beyond the time for a start.
    hooks: Duration,
}

/// When a launch is too late, and how long it was given until then.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    given: Duration,
}

/// A launch under way.
struct Launch<'p> {
    plan: &'p Plan,
    attributes: Attributes,
    expectation: Expectation,
    /// The stage as it was started, which forks.
    stage: Child,
    /// Once the stage has told of it.
    process: Option<Child>,
    /// Who wants the terminal.
    terminal_taker: Option<oneshot::Sender<Arc<AsyncFd<OwnedFd>>>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// A process of a launch.
struct Child {
    pid: i32,
    /// Names the process whatever becomes of the pid. None: it had ended, and was collected, before it
    /// could be had.
    pidfd: Option<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

/// Launches a process up to its gate. Of a launch that fails or is too late no process is left as this
/// returns, which is at most five seconds after its own.
///
/// # Errors
/// [`LaunchError`]
pub async fn launch(
    program: &Path,
    reaper: &Arc<Reaper>,
    plan: &Plan,
    streams: Streams,
    deadline: Deadline,
) -> Result<Launched, LaunchError> {
    // What can't be is refused before anything is started.
    let is_exec = matches!(plan.place, Place::Enter { .. });
    let attributes = Attributes::parse(&plan.process, is_exec)?;
    let expectation = reaper.expect();
    let (channel, stage) = spawn(program, plan, &streams.fds, &expectation)?;
    let Streams {
        fds,
        terminal,
        movers,
    } = streams;
    // The stage has its own; a copy kept here would keep the pipes open for ever.
    drop(fds);
    let mut launch = Launch {
        plan,
        attributes,
        expectation,
        stage,
        process: None,
        terminal_taker: terminal,
        terminal: None,
    };
    let reached = launch.reach_gate(&channel, deadline).await;
    if let Err(error) = reached {
        // A process that is not known of yet waits for an order, and ends with the channel.
        drop(channel);
        launch.undo().await;
        return Err(error);
    }
    let process = launch.process.ok_or_else(missing)?;
    let Some(pidfd) = process.pidfd else {
        return Err(LaunchError::Silent(status_of(&process.exit)));
    };
    movers.let_go();
    let hooks = plan.start_hooks.as_ref();
    Ok(Launched {
        pid: process.pid,
        pidfd,
        exit: process.exit,
        terminal: launch.terminal,
        channel,
        hooks: hooks.map_or(Duration::ZERO, StartHooks::time_limit),
    })
}

impl Deadline {
    /// So much from now.
    pub fn after(given: Duration) -> Deadline {
        Deadline {
            at: Instant::now() + given,
            given,
        }
    }

    fn later(self, by: Duration) -> Deadline {
        Deadline {
            at: self.at + by,
            given: self.given + by,
        }
    }
}

impl Launch<'_> {
    /// Answers the stage's reports until the process waits at its gate.
    async fn reach_gate(
        &mut self,
        channel: &AsyncFd<OwnedFd>,
        deadline: Deadline,
    ) -> Result<(), LaunchError> {
        loop {
            let Some((report, fds)) = next_report(channel, deadline).await? else {
                let status = self.process.as_ref();
                return Err(LaunchError::Silent(
                    status.and_then(|process| status_of(&process.exit)),
                ));
            };
            match report {
                Report::NeedsMappings { pid } => {
                    write_mappings(pid, self.plan).map_err(LaunchError::Mappings)?;
                    order(channel)?;
                }
                Report::Forked { pid } => {
                    let process = Child::of(pid, &self.expectation)?;
                    self.process = Some(process);
                    self.attributes
                        .apply_limits(Pid::from_raw(pid).ok_or_else(missing)?)?;
                    order(channel)?;
                }
                Report::Console => {
                    let master = fds.into_iter().next().ok_or_else(missing)?;
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    let master = nonblocking(master, interest).map_err(LaunchError::Talk)?;
                    let master = Arc::new(master);
                    if let Some(taker) = self.terminal_taker.take() {
                        // Fails only if the stream's task is over, which then needs no terminal.
                        let _ = taker.send(Arc::clone(&master));
                    }
                    self.terminal = Some(master);
                }
                Report::Ready => {
                    let process = self.process.as_ref().ok_or_else(missing)?;
                    let pid = Pid::from_raw(process.pid).ok_or_else(missing)?;
                    return Ok(self.attributes.apply_scheduling(pid)?);
                }
                Report::Failed(failure) => return Err(failure.into()),
            }
        }
    }

    /// Ends what there is, and returns once it is gone.
    async fn undo(self) {
        let children = [Some(self.stage), self.process];
        for child in children.iter().flatten() {
            child.pidfd.as_ref().map(kill);
        }
        for child in children.into_iter().flatten() {
            gone(child.pid, child.exit).await;
        }
    }
}

impl Child {
    /// A child that was born since the expectation.
    fn of(pid: i32, expectation: &Expectation) -> Result<Child, LaunchError> {
        let exit = expectation.claim(pid);
        let opened = Pid::from_raw(pid)
            .ok_or(Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        let pidfd = match opened {
            Ok(pidfd) => Some(pidfd),
            // The reaper was faster.
            Err(Errno::SRCH) => None,
            Err(error) => return Err(LaunchError::Talk(error.into())),
        };
        Ok(Child { pid, pidfd, exit })
    }
}

fn kill(pidfd: &OwnedFd) {
    // It may have ended by itself, which is what is wanted.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}

/// Returns once a process that was killed is gone, or says that it isn't.
async fn gone(pid: i32, mut exit: watch::Receiver<Option<Exit>>) {
    let ended = exit.wait_for(Option::is_some);
    if tokio::time::timeout(END_DEADLINE, ended).await.is_err() {
        eprintln!("husk-agent: process {pid} does not end, though it was killed");
    }
}

fn status_of(exit: &watch::Receiver<Option<Exit>>) -> Option<u32> {
    let exit = *exit.borrow();
    exit.map(|exit| exit.status)
}

impl Launched {
    /// Opens the gate, and returns once the program runs. Hooks have the time that they say, in
    /// addition.
    ///
    /// # Errors
    /// [`LaunchError`]; the process is gone.
    pub async fn start(self, deadline: Deadline) -> Result<(), LaunchError> {
        let started = self.open_gate(deadline.later(self.hooks)).await;
        if started.is_err() {
            kill(&self.pidfd);
            gone(self.pid, self.exit).await;
        }
        started
    }

    async fn open_gate(&self, deadline: Deadline) -> Result<(), LaunchError> {
        match order(&self.channel) {
            // Killed at the gate: to have run and ended is the same to everybody.
            Err(LaunchError::Talk(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(());
            }
            other => other?,
        }
        match next_report(&self.channel, deadline).await? {
            None => Ok(()),
            Some((Report::Failed(failure), _)) => Err(failure.into()),
            Some(_) => Err(LaunchError::Talk(io::Error::other("an unexpected report"))),
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
    expectation: &Expectation,
) -> Result<(AsyncFd<OwnedFd>, Child), LaunchError> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|error| LaunchError::Talk(error.into()))?;
    let plan = plan.to_memfd().map_err(LaunchError::Talk)?;
    let [stdin, stdout, stderr] = streams;
    let fds = [plan.as_fd(), stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    plan::send(ours.as_fd(), &Handover, &fds).map_err(LaunchError::Talk)?;
    let ours = nonblocking(ours, Interest::READABLE).map_err(LaunchError::Talk)?;
    // Not waited for through std: the reaper collects every child.
    let stage = Command::new(program)
        .arg("launch")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(|source| LaunchError::Spawn {
            program: program.to_owned(),
            source,
        })?;
    let pid = i32::try_from(stage.id()).map_err(|_| missing())?;
    Ok((ours, Child::of(pid, expectation)?))
}

async fn next_report(
    channel: &AsyncFd<OwnedFd>,
    deadline: Deadline,
) -> Result<Option<(Report, Vec<OwnedFd>)>, LaunchError> {
    let received = channel.async_io(Interest::READABLE, |channel| plan::receive(channel.as_fd()));
    match tokio::time::timeout_at(deadline.at, received).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Ok(result) => result.map_err(LaunchError::Talk),
        Err(_) => Err(LaunchError::Deadline(deadline.given)),
    }
}

fn order(channel: &AsyncFd<OwnedFd>) -> Result<(), LaunchError> {
    // An order is a few bytes, and the stage waits for it: the socket has room.
    plan::send(channel.get_ref().as_fd(), &Order, &[]).map_err(LaunchError::Talk)
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
