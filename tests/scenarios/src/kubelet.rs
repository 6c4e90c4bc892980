//! What the kubelet does: pods and their containers, through a containerd that serves CRI.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_cri::messages::{ContainerConfig, ExecSyncResponse, PodSandboxConfig};
use husk_cri::{Cri, Daemon, Events, Pod};

use crate::ctr::Ctr;

/// For a container to end that is about to. The testbed is some twenty times slower than metal.
const STOP_DEADLINE: Duration = Duration::from_secs(300);

/// Runs for all scenarios that want it, until [`end`].
static DAEMON: Mutex<Option<Daemon>> = Mutex::new(None);

/// Ends containerd.
pub(crate) fn end() {
    *DAEMON.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// Kills containerd and starts it again on what it has left.
fn restart() -> Result<()> {
    let mut daemon = DAEMON.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = daemon.as_mut().context("containerd does not run")?;
    daemon.restart()
}

/// Where containerd is, and what is in reach of it.
pub(crate) struct Places {
    pub(crate) socket: PathBuf,
    /// An archive of the image that containers run.
    pub(crate) image: PathBuf,
    /// The files that its snapshotter `blockfile` keeps roots in.
    pub(crate) blockfiles: PathBuf,
}

/// A client with one runtime.
pub(crate) struct Kubelet {
    pub(crate) cri: Cri,
    events: Events,
    handler: &'static str,
    /// The scenario's, for pods and files.
    pub(crate) name: String,
}

impl Kubelet {
    /// A client of the runtime that `ctr` is for; containerd is started if it does not run.
    pub(crate) fn new(ctr: &Ctr) -> Result<Self> {
        let socket = start()?.socket;
        Ok(Self {
            cri: Cri::connect(&socket)?,
            events: Events::listen(&socket)?,
            handler: if ctr.is_husk() { "husk" } else { "runc" },
            name: ctr.id.clone(),
        })
    }

    /// Kills containerd and starts it again.
    pub(crate) fn restart_containerd(&mut self) -> Result<()> {
        restart()?;
        self.connect()
    }

    fn connect(&mut self) -> Result<()> {
        let socket = start()?.socket;
        self.cri = Cri::connect(&socket)?;
        self.events = Events::listen(&socket)?;
        Ok(())
    }

    /// Kills containerd, and starts it again, when a call has come as far as `reached` waits for. What
    /// comes of the call does not matter.
    pub(crate) fn killed_in(
        &mut self,
        call: impl FnOnce(&Self) -> Result<()> + Send,
        reached: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let this = &*self;
        thread::scope(|scope| {
            let call = scope.spawn(|| call(this));
            let reached = reached();
            // Whoever waits for an answer gets one, now at the latest.
            let restarted = restart();
            let ended = call
                .join()
                .unwrap_or_else(|_| bail!("the call has panicked"));
            reached.with_context(|| format!("the call came to {ended:?}"))?;
            restarted
        })?;
        self.connect()
    }

    /// Runs a pod, does something with it, and removes it whatever came of that.
    pub(crate) fn with_pod(
        &mut self,
        config: PodSandboxConfig,
        what: impl FnOnce(&mut Self, &Pod) -> Result<()>,
    ) -> Result<()> {
        self.with_pod_of(self.handler, config, what)
    }

    /// The same, with a runtime handler of containerd's configuration.
    pub(crate) fn with_pod_of(
        &mut self,
        handler: &str,
        config: PodSandboxConfig,
        what: impl FnOnce(&mut Self, &Pod) -> Result<()>,
    ) -> Result<()> {
        let pod = self.cri.run_pod(handler, config)?;
        let done = what(self, &pod);
        let stopped = self.cri.stop_pod(&pod.id);
        let removed = self.cri.remove_pod(&pod.id);
        done.and(stopped).and(removed)
    }

    /// Runs a pod that the caller removes.
    pub(crate) fn run(&self, config: PodSandboxConfig) -> Result<Pod> {
        self.cri.run_pod(self.handler, config)
    }

    /// The addresses that a pod is known by.
    pub(crate) fn addresses(&self, pod: &Pod) -> Result<Vec<IpAddr>> {
        let network = self.cri.pod_status(&pod.id)?.network;
        let more = network.additional_ips.iter().map(|more| &more.ip);
        let all = std::iter::once(&network.ip).chain(more);
        let parsed = all.map(|ip| ip.parse().with_context(|| format!("{ip:?} is no address")));
        parsed.collect()
    }

    /// How a pod is refused that must not run.
    pub(crate) fn refusal(&self, config: PodSandboxConfig) -> Result<String> {
        match self.cri.run_pod(self.handler, config) {
            Err(error) => Ok(format!("{error:#}")),
            Ok(pod) => {
                self.cri.stop_pod(&pod.id)?;
                self.cri.remove_pod(&pod.id)?;
                bail!("it runs");
            }
        }
    }

    /// Makes and starts a container.
    pub(crate) fn start(&self, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let id = self.cri.create_container(pod, config)?;
        self.cri.start_container(&id)?;
        Ok(id)
    }

    /// Waits for the end of a container; answers with its exit code.
    pub(crate) fn stopped(&mut self, container: &str) -> Result<i32> {
        self.events.stopped(container, STOP_DEADLINE)?;
        Ok(self.cri.container_status(container)?.exit_code)
    }

    /// Waits for the end of a pod.
    pub(crate) fn pod_stopped(&mut self, pod: &str) -> Result<()> {
        self.events.stopped(pod, STOP_DEADLINE)
    }

    /// The output of a script that succeeds in a container.
    pub(crate) fn shell(&self, container: &str, script: &str) -> Result<String> {
        let ExecSyncResponse {
            stdout,
            stderr,
            exit_code,
            ..
        } = self.cri.exec_sync(container, &["sh", "-c", script])?;
        let stderr = String::from_utf8_lossy(&stderr);
        ensure!(
            exit_code == 0,
            "{script:?} ended with {exit_code}: {stderr}"
        );
        Ok(String::from_utf8_lossy(&stdout).trim_end().to_owned())
    }

    /// What a container has written, without the times and names that CRI puts in front.
    pub(crate) fn log(&self, pod: &Pod, container: &str) -> Result<String> {
        let path = Path::new(&pod.config.log_directory).join(format!("{container}.log"));
        let log = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        let text = |line: &str| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned();
        Ok(log.lines().map(text).collect::<Vec<_>>().join("\n"))
    }
}

/// Starts containerd if it does not run.
pub(crate) fn start() -> Result<Places> {
    let mut daemon = DAEMON.lock().unwrap_or_else(PoisonError::into_inner);
    let daemon = match &mut *daemon {
        Some(daemon) => daemon,
        none => none.insert(Daemon::start("cri")?),
    };
    Ok(Places {
        socket: daemon.socket(),
        image: daemon.image(),
        blockfiles: daemon.blockfiles(),
    })
}
