//! The pod as the guest sees it: its containers, and everything the host may ask about them.
//!
//! Independent of the transport: [`crate::service`] translates.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protocol::UNDO_DEADLINE;
use husk_protocol::messages::{ForwardPortRequest, PreparePodRequest, RootDisk, Stdio};
use rustix::process::Signal;

use crate::arrivals::Arrivals;
use crate::cgroup::{Cgroup, CgroupError, SETTLE_DEADLINE};
use crate::container::{Common, Container, Ending, Process, lock};
use crate::forward::{ForwardError, forward};
use crate::launch::{Deadline, END_DEADLINE, LaunchError, launch};
use crate::oci::{self, NamespaceKind, Resources, Spec};
use crate::plan::{Place, Plan, StartHooks};
use crate::pod::{Pod, PodError};
use crate::reaper::{Exit, Reaper};
use crate::stdio::{StdioError, Streams};

/// Longest id of a container or an exec.
const ID_BYTES_MAX: usize = 256;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say it, and the fields are what they name"
)]
pub enum SandboxError {
    #[error("the id {0:?} is not made of letters, digits, and _ . + -, or is too long")]
    InvalidId(String),
    #[error("the spec is not one: {0}")]
    InvalidSpec(#[source] serde_json::Error),
    #[error("{0} is not a signal")]
    InvalidSignal(u32),
    #[error("a terminal can't be {width} by {height}")]
    InvalidSize { width: u32, height: u32 },
    #[error("there is no container {0:?}")]
    NoSuchContainer(String),
    #[error("the container {container_id:?} has no process {exec_id:?}")]
    NoSuchProcess {
        container_id: String,
        exec_id: String,
    },
    #[error("the container {0:?} exists already")]
    ContainerExists(String),
    #[error("the process {0:?} exists already")]
    ProcessExists(String),
    #[error("the container {0:?} has processes that run")]
    ContainerRuns(String),
    #[error("the process {0:?} runs")]
    ProcessRuns(String),
    #[error("init can't be deleted, only its container")]
    InitDeleted,
    #[error("the process {0:?} was started before")]
    AlreadyStarted(String),
    #[error("the process {0:?} has not been started")]
    NotStarted(String),
    #[error("the process {0:?} has never run")]
    NeverRan(String),
    #[error("process {0:?} already finished")]
    ProcessEnded(String),
    #[error("the container {0:?} has no running init")]
    ContainerStopped(String),
    #[error("the process {0:?} has no terminal")]
    NoTerminal(String),
    #[error("cannot send the signal")]
    Signal(#[source] io::Error),
    #[error("cannot resize the terminal")]
    Resize(#[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Where things are.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our own program, which is the launch stage as well.
    pub program: PathBuf,
    /// The cgroup below which containers get theirs.
    pub cgroup_parent: PathBuf,
    /// Where the host's streams arrive.
    pub arrivals: Arc<Arrivals>,
    /// How long a launch may take: [`husk_protocol::LAUNCH_DEADLINE`] but for tests.
    pub launch_deadline: Duration,
}

// The stage and its process end one after the other, and then the cgroup.
const _: () = assert!(
    2 * END_DEADLINE.as_secs() + SETTLE_DEADLINE.as_secs() < UNDO_DEADLINE.as_secs(),
    "a host that waits as long as it is told hears of every launch"
);

/// The pod.
#[derive(Debug)]
pub struct Sandbox {
    config: Config,
    reaper: Arc<Reaper>,
    /// By id; `None` while it is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    pod: Pod,
}

impl Sandbox {
    /// A pod without containers.
    pub fn new(config: Config, reaper: Arc<Reaper>) -> Sandbox {
        Sandbox {
            config,
            reaper,
            containers: Mutex::default(),
            pod: Pod::default(),
        }
    }

    /// Makes what containers are to share. Returns process 1 of their PID namespace if they share one.
    pub async fn prepare_pod(
        &self,
        request: &PreparePodRequest,
    ) -> Result<Option<i32>, SandboxError> {
        let program = &self.config.program;
        Ok(self
            .pod
            .prepare(request, program, &self.reaper, self.deadline())
            .await?)
    }

    /// Of a launch that begins now.
    fn deadline(&self) -> Deadline {
        Deadline::after(self.config.launch_deadline)
    }

    /// Connects a stream with a TCP port of the pod.
    pub async fn forward(&self, request: &ForwardPortRequest) -> Result<(), SandboxError> {
        Ok(forward(&self.config.arrivals, request).await?)
    }

    /// Makes a container up to its init's gate and returns init's pid.
    pub async fn create(
        &self,
        id: &str,
        spec_json: &[u8],
        bundle: &str,
        root: Option<&RootDisk>,
        stdio: &Stdio,
    ) -> Result<i32, SandboxError> {
        check_id(id)?;
        let spec: Spec = serde_json::from_slice(spec_json).map_err(SandboxError::InvalidSpec)?;
        self.reserve(id)?;
        match self.build(id, spec, bundle, root, stdio).await {
            Ok(container) => {
                let pid = container.init.pid().unwrap_or_default();
                lock(&self.containers).insert(id.to_owned(), Some(container));
                Ok(pid)
            }
            Err(error) => {
                lock(&self.containers).remove(id);
                Err(error)
            }
        }
    }

    fn reserve(&self, id: &str) -> Result<(), SandboxError> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(SandboxError::ContainerExists(id.to_owned()));
        }
        containers.insert(id.to_owned(), None);
        Ok(())
    }

    async fn build(
        &self,
        id: &str,
        spec: Spec,
        bundle: &str,
        root: Option<&RootDisk>,
        stdio: &Stdio,
    ) -> Result<Arc<Container>, SandboxError> {
        let deadline = self.deadline();
        let streams = Streams::open(&self.config.arrivals, stdio, spec.process.terminal)?;
        let cgroup = Cgroup::create(&self.config.cgroup_parent, id)?;
        let has_pid_namespace = spec.linux.namespaces.iter().any(|namespace| {
            namespace.kind == NamespaceKind::Pid
                && namespace
                    .path
                    .as_ref()
                    .is_none_or(|path| path.as_os_str().is_empty())
        });
        let common = Common {
            init: spec.process.clone(),
            seccomp: spec.linux.seccomp.clone(),
            personality: spec.linux.personality.clone(),
        };
        let plan = Plan {
            process: spec.process.clone(),
            seccomp: common.seccomp.clone(),
            personality: common.personality.clone(),
            cgroup: Some(cgroup.path().to_owned()),
            start_hooks: StartHooks::of(&spec, id, bundle),
            root_disk: root.map(root_mount),
            place: Place::Create(Box::new(spec)),
        };
        let launched = async {
            if let Place::Create(spec) = &plan.place
                && let Some(resources) = &spec.linux.resources
            {
                cgroup.apply(resources)?;
                cgroup.confine_devices(resources)?;
            }
            let program = &self.config.program;
            let launched = launch(program, &self.reaper, &plan, streams, deadline).await?;
            Ok::<_, SandboxError>(launched)
        }
        .await;
        let launched = match launched {
            Ok(launched) => launched,
            Err(error) => {
                discard(&cgroup).await;
                return Err(error);
            }
        };
        let mut exit = launched.exit.clone();
        let process = Process::gated(launched);
        let container = Arc::new(Container::new(id.to_owned(), cgroup, process, common));
        let watched = Arc::clone(&container);
        tokio::spawn(async move {
            let Some(exit) = ended(&mut exit).await else {
                return;
            };
            if !has_pid_namespace && let Err(error) = watched.cgroup.kill() {
                // With a PID namespace of its own the kernel does it.
                eprintln!(
                    "husk-agent: {}: what init left lives on: {error}",
                    watched.id
                );
            }
            watched.init.set_exited(exit);
        });
        Ok(container)
    }

    /// Removes a container whose processes have ended.
    pub async fn delete(&self, id: &str) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        if container.is_alive() {
            return Err(SandboxError::ContainerRuns(id.to_owned()));
        }
        container.cgroup.kill()?;
        container.cgroup.empty().await?;
        container.cgroup.remove()?;
        lock(&self.containers).remove(id);
        Ok(())
    }

    /// Registers a further process.
    pub fn add_process(
        &self,
        id: &str,
        exec_id: &str,
        process_json: &[u8],
        stdio: &Stdio,
    ) -> Result<(), SandboxError> {
        check_id(exec_id)?;
        let container = self.container(id)?;
        if !container.init.is_alive() {
            return Err(SandboxError::ContainerStopped(id.to_owned()));
        }
        if container.process(exec_id).is_ok() {
            return Err(SandboxError::ProcessExists(exec_id.to_owned()));
        }
        let mut process: oci::Process =
            serde_json::from_slice(process_json).map_err(SandboxError::InvalidSpec)?;
        process.inherit(&container.common.init);
        let streams = Streams::open(&self.config.arrivals, stdio, process.terminal)?;
        container.add(Process::registered(exec_id.to_owned(), process, streams))
    }

    /// Starts a process: opens init's gate, or launches a registered one. Returns its pid.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<i32, SandboxError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            let (pid, launched) = process.take_gated()?;
            launched.start(self.deadline()).await?;
            return Ok(pid);
        }
        let registered = process.take_registered()?;
        let started = self.start_exec(&container, &process, registered).await;
        if started.is_err() {
            process.set_failed();
        }
        started
    }

    async fn start_exec(
        &self,
        container: &Container,
        process: &Arc<Process>,
        (spec, streams): (oci::Process, Streams),
    ) -> Result<i32, SandboxError> {
        let stopped = || SandboxError::ContainerStopped(container.id.clone());
        if !container.init.is_alive() {
            return Err(stopped());
        }
        let init_pid = container.init.pid().ok_or_else(stopped)?;
        let plan = Plan {
            process: spec,
            seccomp: container.common.seccomp.clone(),
            personality: container.common.personality.clone(),
            cgroup: Some(container.cgroup.path().to_owned()),
            place: Place::Enter { init_pid },
            root_disk: None,
            start_hooks: None,
        };
        let deadline = self.deadline();
        let program = &self.config.program;
        let launched = launch(program, &self.reaper, &plan, streams, deadline).await?;
        let pid = launched.pid;
        process.set_started(&launched)?;
        let mut exit = launched.exit.clone();
        launched.start(deadline).await?;
        let watched = Arc::clone(process);
        tokio::spawn(async move {
            if let Some(exit) = ended(&mut exit).await {
                watched.set_exited(exit);
            }
        });
        Ok(pid)
    }

    /// Tells how a process ended, as soon as it has.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, SandboxError> {
        let process = self.container(id)?.process(exec_id)?;
        match process.wait().await {
            Ending::Exited(exit) => Ok(exit),
            Ending::None | Ending::NeverRan => Err(SandboxError::NeverRan(exec_id.to_owned())),
        }
    }

    /// Signals one process, or all of a container.
    pub fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        is_for_all: bool,
    ) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let number = parse_signal(signal)?;
        if is_for_all {
            return container.signal_all(number);
        }
        container.process(exec_id)?.signal(number)
    }

    /// Forgets a process that has ended or never ran.
    pub fn delete_process(&self, id: &str, exec_id: &str) -> Result<(), SandboxError> {
        if exec_id.is_empty() {
            return Err(SandboxError::InitDeleted);
        }
        self.container(id)?.remove(exec_id)
    }

    /// Sets the size of a process's terminal.
    pub fn resize(
        &self,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), SandboxError> {
        let process = self.container(id)?.process(exec_id)?;
        let (Ok(columns), Ok(rows)) = (u16::try_from(width), u16::try_from(height)) else {
            return Err(SandboxError::InvalidSize { width, height });
        };
        process.resize(columns, rows)
    }

    /// Sets limits of a running container.
    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), SandboxError> {
        let container = self.container(id)?;
        let resources: Resources =
            serde_json::from_slice(resources_json).map_err(SandboxError::InvalidSpec)?;
        let cgroup = container.cgroup.clone();
        // A lower limit of memory is met before the kernel returns.
        Ok(unblocked(move || cgroup.apply(&resources)).await?)
    }

    /// Returns the count of OOM kills once it is above `seen`; an error when init ends first.
    pub async fn wait_oom(&self, id: &str, seen: u64) -> Result<u64, SandboxError> {
        let container = self.container(id)?;
        tokio::select! {
            kills = container.cgroup.oom_kills_above(seen) => Ok(kills?),
            _ = container.init.wait() => {
                // The kill may be the very one that ended it.
                let kills = container.cgroup.oom_kills()?;
                if kills > seen {
                    return Ok(kills);
                }
                Err(SandboxError::ContainerStopped(id.to_owned()))
            }
        }
    }

    /// Kills everything there is; for the end of the guest.
    pub fn kill_all(&self) {
        let containers: Vec<_> = lock(&self.containers).values().flatten().cloned().collect();
        for container in containers {
            // The guest ends next, whatever is left.
            let _ = container.cgroup.kill();
        }
    }

    /// The container of that id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, SandboxError> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| SandboxError::NoSuchContainer(id.to_owned()))
    }
}

/// Runs what may block beside everything else.
async fn unblocked<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

async fn ended(exit: &mut tokio::sync::watch::Receiver<Option<Exit>>) -> Option<Exit> {
    exit.wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

/// Takes a cgroup away after a launch that failed; its processes are dead or about to be.
async fn discard(cgroup: &Cgroup) {
    let removed = async {
        cgroup.kill()?;
        cgroup.empty().await?;
        cgroup.remove()
    };
    if let Err(error) = removed.await {
        eprintln!("husk-agent: {error}");
    }
}

/// The mount that is the root of a container.
fn root_mount(disk: &RootDisk) -> oci::Mount {
    oci::Mount {
        destination: PathBuf::from("/"),
        kind: disk.kind.clone(),
        source: PathBuf::from(&disk.node),
        options: disk.options.clone(),
        ..oci::Mount::default()
    }
}

/// Ids become names of directories.
fn check_id(id: &str) -> Result<(), SandboxError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    let is_valid = id.len() <= ID_BYTES_MAX
        && id.bytes().all(is_plain)
        && id.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_');
    if !is_valid {
        return Err(SandboxError::InvalidId(
            id.chars().take(ID_BYTES_MAX).collect(),
        ));
    }
    Ok(())
}

fn parse_signal(signal: u32) -> Result<Signal, SandboxError> {
    let invalid = SandboxError::InvalidSignal(signal);
    let Ok(number) = i32::try_from(signal) else {
        return Err(invalid);
    };
    crate::sys::signal_of(number).ok_or(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_that_is_no_plain_name_is_refused() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "é",
            ".hidden",
            &"x".repeat(257),
        ] {
            assert!(check_id(id).is_err(), "{id}");
        }
        assert!(check_id("web-1.a_b+c").is_ok());
    }

    #[test]
    fn signal_that_is_none_is_refused() {
        for signal in [0, 65, u32::MAX] {
            assert!(parse_signal(signal).is_err(), "{signal}");
        }
        assert_eq!(parse_signal(15).unwrap(), Signal::TERM);
    }

    #[test]
    fn realtime_signal_can_be_sent() {
        assert_eq!(parse_signal(37).unwrap().as_raw(), 37);
    }
}
