//! A container and its processes: what is known of them, and what can be done to them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::launch::Launched;
use crate::oci;
use crate::reaper::Exit;
use crate::sandbox::SandboxError;
use crate::stdio::Streams;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id, as the host gave it.
    pub id: String,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// The process it was made for.
    pub init: Arc<Process>,
    /// What further processes have in common with init.
    pub common: Common,
    /// By exec id.
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

/// What the processes of a container have in common.
#[derive(Debug)]
pub struct Common {
    /// Init as the spec has it; others take over from it what they don't say.
    pub init: oci::Process,
    /// The system call filter.
    pub seccomp: Option<oci::Seccomp>,
    /// The execution domain.
    pub personality: Option<oci::Personality>,
}

/// One process of a container.
#[derive(Debug)]
pub struct Process {
    /// Empty for init.
    pub exec_id: String,
    state: Mutex<State>,
    ending: watch::Sender<Ending>,
}

/// How a process's life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Not yet.
    None,
    /// It ran, and has ended.
    Exited(Exit),
    /// It will never run.
    NeverRan,
}

/// Where a process is in its life.
#[derive(Debug)]
enum State {
    /// An exec that waits for its start.
    Registered(Box<(oci::Process, Streams)>),
    /// Its launch is under way.
    Launching,
    /// An init that waits for its start.
    Gated(Box<Launched>, Handle),
    /// It runs, or has run.
    Started(Handle),
    /// Its launch failed.
    Failed,
}

/// What a process is reached by.
#[derive(Debug, Clone)]
struct Handle {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

impl Container {
    /// A container whose init waits at its gate.
    pub fn new(id: String, cgroup: Cgroup, init: Process, common: Common) -> Container {
        Container {
            id,
            cgroup,
            init: Arc::new(init),
            common,
            execs: Mutex::default(),
        }
    }

    /// The process of that exec id; empty is init.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, SandboxError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| SandboxError::NoSuchProcess {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            })
    }

    /// Registers a further process.
    pub fn add(&self, process: Process) -> Result<(), SandboxError> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(&process.exec_id) {
            return Err(SandboxError::ProcessExists(process.exec_id));
        }
        execs.insert(process.exec_id.clone(), Arc::new(process));
        Ok(())
    }

    /// Forgets a process that does not run.
    pub fn remove(&self, exec_id: &str) -> Result<(), SandboxError> {
        let process = self.process(exec_id)?;
        if process.is_alive() {
            return Err(SandboxError::ProcessRuns(exec_id.to_owned()));
        }
        process.ending.send_if_modified(|ending| {
            let is_pending = *ending == Ending::None;
            if is_pending {
                *ending = Ending::NeverRan;
            }
            is_pending
        });
        lock(&self.execs).remove(exec_id);
        Ok(())
    }

    /// All processes that are there, with the exec ids of those the host knows.
    pub fn processes(&self) -> Result<Vec<(i32, Option<String>)>, SandboxError> {
        let mut known: HashMap<i32, String> = lock(&self.execs)
            .values()
            .chain([&self.init])
            .filter(|process| process.is_alive())
            .filter_map(|process| Some((process.pid()?, process.exec_id.clone())))
            .collect();
        let pids = self.cgroup.pids()?;
        Ok(pids
            .into_iter()
            .map(|pid| (pid, known.remove(&pid)))
            .collect())
    }

    /// Whether any process the host knows runs.
    pub fn is_alive(&self) -> bool {
        self.init.is_alive() || lock(&self.execs).values().any(|process| process.is_alive())
    }

    /// Signals all its processes.
    pub fn signal_all(&self, signal: Signal) -> Result<(), SandboxError> {
        if signal == Signal::KILL {
            // One step for all, so that none can fork away from it.
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.pids()? {
            let sent = Pid::from_raw(pid)
                .ok_or(Errno::SRCH)
                .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
                .and_then(|pidfd| rustix::process::pidfd_send_signal(pidfd, signal));
            match sent {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(SandboxError::Signal(error.into())),
            }
        }
        Ok(())
    }
}

impl Process {
    /// An init behind its gate.
    pub fn gated(launched: Launched) -> Process {
        let handle = Handle::try_of(&launched);
        Process {
            exec_id: String::new(),
            state: Mutex::new(match handle {
                Ok(handle) => State::Gated(Box::new(launched), handle),
                Err(_) => State::Failed,
            }),
            ending: watch::Sender::new(Ending::None),
        }
    }

    /// A further process that waits for its start.
    pub fn registered(exec_id: String, process: oci::Process, streams: Streams) -> Process {
        Process {
            exec_id,
            state: Mutex::new(State::Registered(Box::new((process, streams)))),
            ending: watch::Sender::new(Ending::None),
        }
    }

    /// Its pid, once it has one.
    pub fn pid(&self) -> Option<i32> {
        self.handle().map(|handle| handle.pid)
    }

    /// Tells how it ended, as soon as it has.
    pub async fn wait(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        let ended = ending.wait_for(|ending| *ending != Ending::None).await;
        ended.map_or(Ending::NeverRan, |ending| *ending)
    }

    /// Whether there is a process that has not ended.
    pub fn is_alive(&self) -> bool {
        let has_process = matches!(
            &*lock(&self.state),
            State::Launching | State::Gated(..) | State::Started(_)
        );
        has_process && *self.ending.borrow() == Ending::None
    }

    /// Takes an init off its gate; the caller then starts it.
    pub fn take_gated(&self) -> Result<(i32, Launched), SandboxError> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Launching) {
            State::Gated(launched, handle) => {
                let pid = handle.pid;
                *state = State::Started(handle);
                Ok((pid, *launched))
            }
            other => {
                *state = other;
                Err(SandboxError::AlreadyStarted(self.exec_id.clone()))
            }
        }
    }

    /// Takes what a registered process is to be launched with.
    pub fn take_registered(&self) -> Result<(oci::Process, Streams), SandboxError> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Launching) {
            State::Registered(registered) => Ok(*registered),
            other => {
                *state = other;
                Err(SandboxError::AlreadyStarted(self.exec_id.clone()))
            }
        }
    }

    /// Records that the launch has come as far as the gate.
    pub fn set_started(&self, launched: &Launched) -> Result<(), SandboxError> {
        let handle = Handle::try_of(launched)?;
        *lock(&self.state) = State::Started(handle);
        Ok(())
    }

    /// Records that the launch has failed.
    pub fn set_failed(&self) {
        *lock(&self.state) = State::Failed;
        self.ending.send_replace(Ending::NeverRan);
    }

    /// Records its end.
    pub fn set_exited(&self, exit: Exit) {
        self.ending.send_replace(Ending::Exited(exit));
    }

    /// Signals it.
    pub fn signal(&self, signal: Signal) -> Result<(), SandboxError> {
        let handle = self.reachable()?;
        match rustix::process::pidfd_send_signal(&*handle.pidfd, signal) {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(SandboxError::ProcessEnded(self.exec_id.clone())),
            Err(error) => Err(SandboxError::Signal(error.into())),
        }
    }

    /// Sets its terminal's size.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), SandboxError> {
        let handle = self.reachable()?;
        let terminal = handle
            .terminal
            .ok_or_else(|| SandboxError::NoTerminal(self.exec_id.clone()))?;
        let size = Winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(terminal.get_ref(), size)
            .map_err(|error| SandboxError::Resize(error.into()))
    }

    fn reachable(&self) -> Result<Handle, SandboxError> {
        if *self.ending.borrow() != Ending::None {
            return Err(SandboxError::ProcessEnded(self.exec_id.clone()));
        }
        self.handle()
            .ok_or_else(|| SandboxError::NotStarted(self.exec_id.clone()))
    }

    fn handle(&self) -> Option<Handle> {
        match &*lock(&self.state) {
            State::Gated(_, handle) | State::Started(handle) => Some(handle.clone()),
            State::Registered(_) | State::Launching | State::Failed => None,
        }
    }
}

impl Handle {
    fn try_of(launched: &Launched) -> Result<Handle, SandboxError> {
        let pidfd = launched.pidfd.try_clone().map_err(SandboxError::Signal)?;
        Ok(Handle {
            pid: launched.pid,
            pidfd: Arc::new(pidfd),
            terminal: launched.terminal.clone(),
        })
    }
}

/// Locks; a panic elsewhere leaves nothing half-done behind these locks.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
