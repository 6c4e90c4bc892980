//! The server of one pod: the Task and Sandbox services over ttrpc, on the socket that `start` has made.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use std::{fs, io};

use anyhow::Context;
use async_trait::async_trait;
use husk_sandbox::{
    ContainerError, ContainerRequest, Drained, ErrorKind, Install, NetworkCounters, PodRequest,
    ProcessIo, Role, RootfsMount, STATE_DIR_ROOT, Sandbox, SandboxConfig, Settings, monotonic_us,
    oci,
};
use rustix::io::fcntl_dupfd_cloexec;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::Code;
use ttrpc::r#async::transport::Listener;

use crate::args::Arguments;
use crate::bootstrap::{TTRPC_ADDRESS, socket_path};
use crate::events::Publisher;
use crate::pod::{Exit, GuestProcess, NewContainer, Pod, PodError, PodMaker, RootMount};
use crate::service::{Service, chain};
use crate::stdio::Ends;
use crate::{log, rpc, sandbox_rpc};

/// How long a guest may take to power itself off before it is stopped.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// How long a process's last output may wait for a reader once the process is deleted.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// How long answers that are under way may take to leave as the server ends.
const DISCONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// The first number of a descriptor that is not a standard stream.
const FIRST_DESCRIPTOR: i32 = 3;

/// What a process of a machine that is gone has ended with: 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;

/// Serves until containerd asks for the end.
pub(crate) fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let served_us = monotonic_us();
    log::init(arguments.debug);
    if let Err(error) = adjust_oom_score() {
        tracing::warn!(%error, "this process keeps containerd's OOM score");
    }
    let served = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime of this process")?
        .block_on(serve_pod(arguments, served_us));
    if let Err(error) = &served {
        tracing::error!("{error:#}");
    }
    served
}

/// Makes the host's kernel kill this process before containerd, whose score it has inherited, when it
/// runs out of memory (proc(5), `oom_score_adj`). containerd's own shims do so.
fn adjust_oom_score() -> io::Result<()> {
    const PATH: &str = "/proc/self/oom_score_adj";
    const MAX: i32 = 1000;
    let score = fs::read_to_string(PATH)?;
    let score: i32 = score.trim().parse().map_err(io::Error::other)?;
    fs::write(PATH, score.saturating_add(1).min(MAX).to_string())
}

async fn serve_pod(arguments: Arguments, served_us: u64) -> anyhow::Result<()> {
    let listener = fcntl_dupfd_cloexec(rustix::stdio::stdin(), FIRST_DESCRIPTOR)
        .context("cannot take over the socket")?;
    let listener = Listener::try_from(UnixListener::from(listener))
        .context("standard input is not a listening socket: -serve is for `start` alone")?;
    let events = Publisher::to_containerd(ttrpc_address(&arguments), arguments.namespace.clone());
    let socket = socket_path(&arguments.namespace, &arguments.id);
    let (namespace, id) = (arguments.namespace.clone(), arguments.id.clone());
    let maker = Maker {
        namespace: arguments.namespace,
        id: arguments.id,
        began_us: arguments.began_us,
        served_us,
    };
    let service = Service::new(namespace, id, maker, events.clone());
    let [v2, v3] = rpc::services(service.clone());
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(v2)
        .register_service(v3)
        .register_service(sandbox_rpc::service(service.clone()));
    server.start().await.context("cannot serve")?;

    let mut terminate = signal(SignalKind::terminate()).context("cannot await SIGTERM")?;
    let unused = service.clone();
    tokio::spawn(async move { unused.end_if_unused().await });
    tokio::select! {
        () = service.ended() => {}
        _ = terminate.recv() => service.shutdown(true).await,
    }
    // No new caller finds the socket; the answer to Shutdown still goes out.
    let _ = fs::remove_file(&socket);
    if tokio::time::timeout(DISCONNECT_DEADLINE, server.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("connections were still open at the end");
    }
    events.flushed().await;
    Ok(())
}

/// containerd's ttrpc socket: from the environment, else beside the gRPC socket.
fn ttrpc_address(arguments: &Arguments) -> PathBuf {
    match std::env::var_os(TTRPC_ADDRESS) {
        Some(address) if !address.is_empty() => address.into(),
        _ => format!("{}.ttrpc", arguments.address).into(),
    }
}

struct Maker {
    namespace: String,
    id: String,
    /// When `start` began, and when this server did.
    began_us: u64,
    served_us: u64,
}

#[async_trait]
impl PodMaker for Maker {
    type Pod = SandboxPod;

    async fn make(&self, first: &NewContainer) -> Result<SandboxPod, PodError> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            PodError::new(Code::FAILED_PRECONDITION, chain(error))
        };
        let settings = Settings::load().map_err(|error| failed(&error))?;
        let pod = PodRequest::of(&first.spec, &rootfs(&first.rootfs), &settings.vm)
            .map_err(|error| PodError::new(Code::INVALID_ARGUMENT, chain(&error)))?;
        let install = Install::locate_with(&settings).map_err(|error| failed(&error))?;
        let config = SandboxConfig {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            state_dir_root: Path::new(STATE_DIR_ROOT).to_owned(),
            install,
            vcpus: pod.vcpus,
            memory_mib: pod.memory_mib,
            memory_growth: pod.memory_growth,
            cmdline_extra: settings.vm.cmdline_extra,
            hostname: first.spec.hostname().clone().unwrap_or_default(),
            netns: netns(&first.spec),
            spare_net_devices: match self.gets_interfaces_later(&first.spec) {
                true => settings.network.spare_interfaces.into(),
                false => 0,
            },
            disk_slots: pod.disk_slots,
            changes_told: settings.volumes.inotify,
            cgroup: pod.cgroup,
        };
        let sandbox = Sandbox::start(config)
            .await
            .map_err(|error| PodError::new(Code::INTERNAL, chain(&error)))?;
        let sandbox = Arc::new(sandbox);
        tokio::spawn(log_end(self.id.clone(), sandbox.clone()));
        let followed = sandbox.clone();
        tokio::spawn(async move { followed.follow_network_changes().await });
        if Role::of(&first.spec) == Role::Sandbox {
            forward_ports(sandbox.clone()).await;
        }
        Ok(SandboxPod {
            sandbox,
            ending: tokio::sync::Mutex::default(),
            id: self.id.clone(),
            began_us: self.began_us,
            served_us: self.served_us,
            created_us: AtomicU64::new(0),
        })
    }
}

/// The network namespace that the spec joins by path.
fn netns(spec: &oci::Spec) -> Option<PathBuf> {
    spec.linux()
        .as_ref()?
        .namespaces()
        .as_ref()?
        .iter()
        .find(|namespace| namespace.typ() == oci::LinuxNamespaceType::Network)?
        .path()
        .clone()
}

/// No moment, but the mark that the pod's start was told.
const TOLD: u64 = u64::MAX;

/// Docker's namespace in containerd.
const DOCKER: &str = "moby";

impl Maker {
    /// Whether somebody puts interfaces into the pod's network namespace once there is one: hooks that
    /// run before the container starts (nerdctl), or Docker, which does so before it starts it.
    fn gets_interfaces_later(&self, spec: &oci::Spec) -> bool {
        let makes = |hooks: &oci::Hooks| {
            let lists = [
                hooks.prestart(),
                hooks.create_runtime(),
                hooks.create_container(),
            ];
            lists.into_iter().flatten().any(|list| !list.is_empty())
        };
        netns(spec).is_none()
            && (self.namespace == DOCKER || spec.hooks().as_ref().is_some_and(makes))
    }
}

struct SandboxPod {
    sandbox: Arc<Sandbox>,
    /// Held while the pod is ended: who asks for the same meanwhile waits for it.
    ending: tokio::sync::Mutex<()>,
    id: String,
    began_us: u64,
    served_us: u64,
    /// When the first container was created; 0 before that, [`TOLD`] once its start is told.
    created_us: AtomicU64,
}

impl SandboxPod {
    /// Tells of the start of the pod and its first container: moments in the order in which they
    /// come, microseconds of the host's CLOCK_MONOTONIC.
    fn tell_start(&self, created_us: u64, start_us: u64) {
        let at = self.sandbox.timings();
        tracing::info!(
            pod = self.id,
            kernel = self.sandbox.guest().kernel_release,
            prepare_ms = at.prepare().as_millis(),
            vmm_ms = at.vmm().as_millis(),
            guest_ms = at.guest().as_millis(),
            guest_own_us = at.guest_own.as_micros(),
            began_us = self.began_us,
            served_us = self.served_us,
            asked_us = at.asked_us,
            prepared_us = at.prepared_us,
            spawned_us = at.spawned_us,
            jailed_us = at.jailed_us,
            kvm_us = at.kvm_us,
            loaded_us = at.loaded_us,
            built_us = at.built_us,
            entered_us = at.entered_us,
            hello_us = at.hello_us,
            created_us,
            start_us,
            started_us = monotonic_us(),
            "pod started"
        );
    }
}

/// Makes the ports of the pod's localhost reachable for CRI, which looks for them on the host. The pod
/// is of use without it.
async fn forward_ports(sandbox: Arc<Sandbox>) {
    match sandbox.catch_loopback().await {
        Ok(loopback) => drop(tokio::spawn(sandbox.forward_loopback(loopback))),
        Err(error) => tracing::warn!(%error, "ports of the pod can't be forwarded"),
    }
}

/// Says why a virtual machine has ended that nobody has asked to.
async fn log_end(pod: String, sandbox: Arc<Sandbox>) {
    let end = sandbox.ended().await;
    if !end.is_clean {
        let (console, vmm) = sandbox.last_words();
        tracing::error!(
            pod,
            console,
            vmm,
            "the pod's virtual machine is gone: {end}"
        );
    }
}

impl From<ContainerError> for PodError {
    fn from(error: ContainerError) -> Self {
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NOT_FOUND,
            ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
            ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
            ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
            ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
            ErrorKind::Unavailable => Code::UNAVAILABLE,
            ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            ErrorKind::Internal => Code::INTERNAL,
        };
        Self::new(code, chain(&error))
    }
}

fn process_io(terminal: bool, ends: Ends) -> ProcessIo {
    ProcessIo {
        stdin: ends.stdin,
        stdin_keeper: None,
        stdout: ends.stdout,
        stderr: ends.stderr,
        terminal,
    }
}

fn rootfs(mounts: &[RootMount]) -> Vec<RootfsMount> {
    let mounts = mounts.iter().map(|mount| RootfsMount {
        fstype: mount.fstype.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    });
    mounts.collect()
}

#[async_trait]
impl Pod for SandboxPod {
    fn host_pid(&self) -> u32 {
        self.sandbox.vmm_pid()
    }

    async fn create_container(&self, new: NewContainer) -> Result<(), PodError> {
        self.sandbox
            .create_container(ContainerRequest {
                id: new.id,
                bundle: new.bundle,
                spec: new.spec,
                rootfs: rootfs(&new.rootfs),
                io: process_io(new.terminal, new.ends),
            })
            .await?;
        // Only the first one is part of the pod's start.
        let (unset, now) = (0, monotonic_us());
        let relaxed = Ordering::Relaxed;
        let _ = self
            .created_us
            .compare_exchange(unset, now, relaxed, relaxed);
        Ok(())
    }

    async fn create_process(
        &self,
        container: &str,
        exec: &str,
        process: Vec<u8>,
        terminal: bool,
        ends: Ends,
    ) -> Result<(), PodError> {
        let process = husk_sandbox::parse_process(&process).map_err(|error| {
            PodError::new(
                Code::INVALID_ARGUMENT,
                format!("the process of exec {exec:?}: {error}"),
            )
        })?;
        Ok(self
            .sandbox
            .create_process(container, exec, &process, process_io(terminal, ends))
            .await?)
    }

    async fn start_process(&self, container: &str, exec: &str) -> Result<(), PodError> {
        let start_us = monotonic_us();
        self.sandbox.start_process(container, exec).await?;
        match self.created_us.load(Ordering::Relaxed) {
            0 | TOLD => {}
            created_us => {
                self.tell_start(created_us, start_us);
                self.created_us.store(TOLD, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    async fn wait_process(&self, container: &str, exec: &str) -> Exit {
        match self.sandbox.wait_process(container, exec).await {
            Ok(exit) => Exit {
                status: exit.status,
                at: exit.at,
            },
            Err(error) => {
                tracing::error!(container, exec, "the exit is not known: {}", chain(&error));
                Exit {
                    status: STATUS_KILLED,
                    at: SystemTime::now(),
                }
            }
        }
    }

    async fn signal_process(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PodError> {
        Ok(self.sandbox.signal(container, exec, signal, all).await?)
    }

    async fn resize_terminal(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), PodError> {
        Ok(self.sandbox.resize(container, exec, width, height).await?)
    }

    async fn processes(&self, container: &str) -> Result<Vec<GuestProcess>, PodError> {
        let listed = self.sandbox.list_processes(container).await?;
        Ok(listed
            .into_iter()
            .map(|process| GuestProcess {
                pid: process.pid,
                exec_id: process.exec_id,
            })
            .collect())
    }

    async fn pause(&self, container: &str) -> Result<(), PodError> {
        Ok(self.sandbox.pause(container).await?)
    }

    async fn resume(&self, container: &str) -> Result<(), PodError> {
        Ok(self.sandbox.resume(container).await?)
    }

    async fn update(
        &self,
        container: &str,
        resources: &oci::LinuxResources,
    ) -> Result<(), PodError> {
        Ok(self.sandbox.update(container, resources).await?)
    }

    async fn stats(&self, container: &str) -> Result<HashMap<String, String>, PodError> {
        Ok(self.sandbox.stats(container).await?)
    }

    async fn network_counters(&self) -> Result<Vec<NetworkCounters>, PodError> {
        Ok(self.sandbox.network_counters().await?)
    }

    async fn out_of_memory(&self, container: &str, seen: u64) -> Result<u64, PodError> {
        Ok(self.sandbox.wait_oom(container, seen).await?)
    }

    async fn output_drained(&self, container: &str, exec: &str) {
        match self
            .sandbox
            .output_drained(container, exec, DRAIN_DEADLINE)
            .await
        {
            Ok(Drained::All) => {}
            Ok(Drained::Lost(error)) => {
                tracing::warn!(
                    container,
                    exec,
                    error,
                    "output is lost: it can't be written"
                );
            }
            Ok(Drained::NotInTime) => {
                tracing::warn!(container, exec, "output is lost: nobody reads it");
            }
            Err(error) => tracing::debug!(container, exec, "no output: {}", chain(&error)),
        }
    }

    async fn delete_process(&self, container: &str, exec: &str) -> Result<(), PodError> {
        Ok(self.sandbox.delete_process(container, exec).await?)
    }

    async fn delete_container(&self, container: &str) -> Result<(), PodError> {
        Ok(self.sandbox.delete_container(container).await?)
    }

    async fn shutdown(&self) {
        let _ending = self.ending.lock().await;
        if let Err(error) = self.sandbox.shutdown(SHUTDOWN_DEADLINE).await {
            tracing::error!("something of the pod is left: {}", chain(&error));
        }
    }
}
