//! The Agent service of agent.proto: translates between messages and the [`Sandbox`].

use std::fs::OpenOptions;
use std::future::Future;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use husk_protocol::messages as m;
use husk_protocol::service::Agent;
use husk_protocol::{PROTOCOL_VERSION, SHARED_DIR};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::cgroup::CgroupError;
use crate::container::lock;
use crate::disks::{self, DiskError};
use crate::echo::{EchoError, echo};
use crate::forward::ForwardError;
use crate::guest::{self, Times};
use crate::launch::LaunchError;
use crate::network::{Network, NetworkError};
use crate::pod::PodError;
use crate::reaper::realtime_ns;
use crate::sandbox::{Sandbox, SandboxError};
use crate::sys;

/// Serves one pod.
#[derive(Debug)]
pub struct Service {
    sandbox: Arc<Sandbox>,
    network: Mutex<Network>,
    /// How many of the machine's devices are slots for disks.
    disk_slots: AtomicU32,
    times: Times,
}

impl Service {
    /// Serves the pod; `times` are told in the handshake.
    pub fn new(sandbox: Arc<Sandbox>, times: Times) -> Service {
        Service {
            sandbox,
            network: Mutex::default(),
            disk_slots: AtomicU32::new(0),
            times,
        }
    }

    fn disk_slots(&self) -> usize {
        to_usize(self.disk_slots.load(Ordering::Relaxed))
    }

    /// Does something with a disk beside everything else: the kernel waits for the host's.
    async fn with_disks<T: Send + 'static>(
        &self,
        work: impl FnOnce(usize) -> Result<T, DiskError> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let slots = self.disk_slots();
        let done = tokio::task::spawn_blocking(move || work(slots)).await;
        let done = done.map_err(|error| status(Code::INTERNAL, &error.to_string()))?;
        done.map_err(|error| {
            let code = match error {
                DiskError::NoSlot { .. } => Code::INVALID_ARGUMENT,
                DiskError::Step { .. } => Code::INTERNAL,
            };
            status(code, &chain(&error))
        })
    }
}

/// Carries a request out to its end even if the caller does not wait for it: half a container is
/// worse than one that nobody asks about.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, SandboxError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => answer(result),
        Err(error) => Err(status(Code::INTERNAL, &error.to_string())),
    }
}

fn answer<T>(result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    result.map_err(|error| status(code_of(&error), &chain(&error)))
}

fn status(code: Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text))
}

/// The error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn code_of(error: &SandboxError) -> Code {
    match error {
        SandboxError::InvalidId(_)
        | SandboxError::InvalidSpec(_)
        | SandboxError::InvalidSignal(_)
        | SandboxError::InvalidSize { .. }
        | SandboxError::InitDeleted
        | SandboxError::Pod(PodError::TooManyVolumes | PodError::InvalidSysctl(_))
        | SandboxError::Cgroup(
            CgroupError::Invalid(_) | CgroupError::Limit { .. } | CgroupError::BelowUsage { .. },
        ) => Code::INVALID_ARGUMENT,
        SandboxError::NoSuchContainer(_)
        | SandboxError::NoSuchProcess { .. }
        | SandboxError::ProcessEnded(_) => Code::NOT_FOUND,
        SandboxError::ContainerExists(_) | SandboxError::ProcessExists(_) => Code::ALREADY_EXISTS,
        SandboxError::ContainerRuns(_)
        | SandboxError::ProcessRuns(_)
        | SandboxError::AlreadyStarted(_)
        | SandboxError::NotStarted(_)
        | SandboxError::NeverRan(_)
        | SandboxError::ContainerStopped(_)
        | SandboxError::NoTerminal(_) => Code::FAILED_PRECONDITION,
        SandboxError::Launch(LaunchError::Stage(failure)) if failure.is_request_at_fault => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::Forward(ForwardError::NoPort(_)) => Code::INVALID_ARGUMENT,
        SandboxError::Forward(ForwardError::Dial { .. }) => Code::UNAVAILABLE,
        SandboxError::Launch(LaunchError::Deadline(_)) => Code::DEADLINE_EXCEEDED,
        SandboxError::Signal(_)
        | SandboxError::Resize(_)
        | SandboxError::Cgroup(_)
        | SandboxError::Stdio(_)
        | SandboxError::Pod(_)
        | SandboxError::Forward(_)
        | SandboxError::Launch(_) => Code::INTERNAL,
    }
}

fn add_entropy(bytes: &[u8]) -> std::io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/random")?;
    sys::add_entropy(random.as_fd(), bytes)
}

fn internal(what: &str) -> impl FnOnce(std::io::Error) -> ttrpc::Error {
    move |error| status(Code::INTERNAL, &format!("cannot {what}: {error}"))
}

fn to_usize(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn unsigned(pid: i32) -> u32 {
    pid.unsigned_abs()
}

#[async_trait]
impl Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: m::HelloRequest,
    ) -> ttrpc::Result<m::HelloResponse> {
        if request.protocol_version != PROTOCOL_VERSION {
            let text = format!(
                "the agent speaks version {PROTOCOL_VERSION} of the protocol, the host {}",
                request.protocol_version
            );
            return Err(status(Code::FAILED_PRECONDITION, &text));
        }
        if !request.entropy.is_empty() {
            add_entropy(&request.entropy).map_err(internal("add entropy"))?;
        }
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes())
                .map_err(|error| internal("set the hostname")(error.into()))?;
        }
        let slots = request.disk_slots;
        self.disk_slots.store(slots, Ordering::Relaxed);
        let uname = rustix::system::uname();
        Ok(m::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            started_at_ns: self.times.started_at_ns,
            ready_at_ns: self.times.ready_at_ns,
            ..Default::default()
        })
    }

    async fn read_clock(
        &self,
        _: &TtrpcContext,
        _: m::ReadClockRequest,
    ) -> ttrpc::Result<m::ReadClockResponse> {
        Ok(m::ReadClockResponse {
            realtime_ns: realtime_ns(),
            ..Default::default()
        })
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: m::AdjustClockRequest,
    ) -> ttrpc::Result<m::AdjustClockResponse> {
        let adjusted = if request.gradually {
            sys::slew_clock(request.adjust_ns)
        } else {
            sys::step_clock(request.adjust_ns)
        };
        adjusted.map_err(internal("adjust the clock"))?;
        Ok(m::AdjustClockResponse::default())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: m::ConfigureNetworkRequest,
    ) -> ttrpc::Result<m::ConfigureNetworkResponse> {
        // The kernel answers at once, so nobody waits for this.
        let configured = lock(&self.network).configure(&request, self.disk_slots());
        configured.map_err(|error| {
            let code = match error {
                NetworkError::Invalid(_) => Code::INVALID_ARGUMENT,
                NetworkError::Step { .. } => Code::INTERNAL,
            };
            status(code, &chain(&error))
        })?;
        Ok(m::ConfigureNetworkResponse::default())
    }

    async fn attach_disk(
        &self,
        _: &TtrpcContext,
        request: m::AttachDiskRequest,
    ) -> ttrpc::Result<m::AttachDiskResponse> {
        let attach = move |slots| disks::attach(slots, to_usize(request.slot));
        let disk = self.with_disks(attach).await?;
        Ok(m::AttachDiskResponse {
            major: disk.major,
            minor: disk.minor,
            node: disk.node.to_string_lossy().into_owned(),
            ..Default::default()
        })
    }

    async fn detach_disk(
        &self,
        _: &TtrpcContext,
        request: m::DetachDiskRequest,
    ) -> ttrpc::Result<m::DetachDiskResponse> {
        let detach = move |slots| disks::detach(slots, to_usize(request.slot));
        self.with_disks(detach).await?;
        Ok(m::DetachDiskResponse::default())
    }

    async fn forward_port(
        &self,
        _: &TtrpcContext,
        request: m::ForwardPortRequest,
    ) -> ttrpc::Result<m::ForwardPortResponse> {
        answer(self.sandbox.forward(&request).await)?;
        Ok(m::ForwardPortResponse::default())
    }

    async fn echo_changes(
        &self,
        _: &TtrpcContext,
        request: m::EchoChangesRequest,
    ) -> ttrpc::Result<m::EchoChangesResponse> {
        let work = move || echo(Path::new(SHARED_DIR), &request);
        let echoed = tokio::task::spawn_blocking(work).await;
        let echoed = echoed.map_err(|error| status(Code::INTERNAL, &error.to_string()))?;
        echoed.map_err(|error| {
            let code = match error {
                EchoError::TooMany(_) | EchoError::Group(_) => Code::INVALID_ARGUMENT,
                EchoError::Share(_) => Code::INTERNAL,
            };
            status(code, &chain(&error))
        })?;
        Ok(m::EchoChangesResponse::default())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: m::ShutdownRequest,
    ) -> ttrpc::Result<m::ShutdownResponse> {
        self.sandbox.kill_all();
        guest::power_off()
    }

    async fn prepare_pod(
        &self,
        _: &TtrpcContext,
        request: m::PreparePodRequest,
    ) -> ttrpc::Result<m::PreparePodResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let pid = detached(async move { sandbox.prepare_pod(&request).await }).await?;
        Ok(m::PreparePodResponse {
            pause_pid: pid.map_or(0, unsigned),
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: m::CreateContainerRequest,
    ) -> ttrpc::Result<m::CreateContainerResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let pid = detached(async move {
            let stdio = request.stdio.unwrap_or_default();
            sandbox
                .create(
                    &request.container_id,
                    &request.spec_json,
                    &request.bundle,
                    request.root.as_ref(),
                    &stdio,
                )
                .await
        })
        .await?;
        Ok(m::CreateContainerResponse {
            pid: unsigned(pid),
            ..Default::default()
        })
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: m::DeleteContainerRequest,
    ) -> ttrpc::Result<m::DeleteContainerResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move { sandbox.delete(&request.container_id).await }).await?;
        Ok(m::DeleteContainerResponse::default())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: m::UpdateContainerRequest,
    ) -> ttrpc::Result<m::UpdateContainerResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        detached(async move {
            let resources = &request.resources_json;
            sandbox.update(&request.container_id, resources).await
        })
        .await?;
        Ok(m::UpdateContainerResponse::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: m::PauseContainerRequest,
    ) -> ttrpc::Result<m::PauseContainerResponse> {
        let container = answer(self.sandbox.container(&request.container_id))?;
        answer(
            container
                .cgroup
                .freeze(true)
                .await
                .map_err(SandboxError::from),
        )?;
        Ok(m::PauseContainerResponse::default())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: m::ResumeContainerRequest,
    ) -> ttrpc::Result<m::ResumeContainerResponse> {
        let container = answer(self.sandbox.container(&request.container_id))?;
        answer(
            container
                .cgroup
                .freeze(false)
                .await
                .map_err(SandboxError::from),
        )?;
        Ok(m::ResumeContainerResponse::default())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: m::ContainerStatsRequest,
    ) -> ttrpc::Result<m::ContainerStatsResponse> {
        let container = answer(self.sandbox.container(&request.container_id))?;
        let files = container.cgroup.figures();
        Ok(m::ContainerStatsResponse {
            files,
            ..Default::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: m::WaitOomRequest,
    ) -> ttrpc::Result<m::WaitOomResponse> {
        let kills = self
            .sandbox
            .wait_oom(&request.container_id, request.seen)
            .await;
        let oom_kills = answer(kills)?;
        Ok(m::WaitOomResponse {
            oom_kills,
            ..Default::default()
        })
    }

    async fn create_process(
        &self,
        _: &TtrpcContext,
        request: m::CreateProcessRequest,
    ) -> ttrpc::Result<m::CreateProcessResponse> {
        let stdio = request.stdio.unwrap_or_default();
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        answer(
            self.sandbox
                .add_process(id, exec_id, &request.process_json, &stdio),
        )?;
        Ok(m::CreateProcessResponse::default())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: m::StartProcessRequest,
    ) -> ttrpc::Result<m::StartProcessResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let pid =
            detached(async move { sandbox.start(&request.container_id, &request.exec_id).await })
                .await?;
        Ok(m::StartProcessResponse {
            pid: unsigned(pid),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: m::SignalProcessRequest,
    ) -> ttrpc::Result<m::SignalProcessResponse> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        answer(
            self.sandbox
                .signal(id, exec_id, request.signal, request.all),
        )?;
        Ok(m::SignalProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: m::WaitProcessRequest,
    ) -> ttrpc::Result<m::WaitProcessResponse> {
        let exit = answer(
            self.sandbox
                .wait(&request.container_id, &request.exec_id)
                .await,
        )?;
        Ok(m::WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: exit.at_ns,
            ..Default::default()
        })
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: m::DeleteProcessRequest,
    ) -> ttrpc::Result<m::DeleteProcessResponse> {
        answer(
            self.sandbox
                .delete_process(&request.container_id, &request.exec_id),
        )?;
        Ok(m::DeleteProcessResponse::default())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: m::ListProcessesRequest,
    ) -> ttrpc::Result<m::ListProcessesResponse> {
        let container = answer(self.sandbox.container(&request.container_id))?;
        let processes = answer(container.processes())?
            .into_iter()
            .map(|(pid, exec_id)| m::list_processes_response::Process {
                pid: unsigned(pid),
                known: exec_id.is_some(),
                exec_id: exec_id.unwrap_or_default(),
                ..Default::default()
            })
            .collect();
        Ok(m::ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: m::ResizeTerminalRequest,
    ) -> ttrpc::Result<m::ResizeTerminalResponse> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        answer(
            self.sandbox
                .resize(id, exec_id, request.width, request.height),
        )?;
        Ok(m::ResizeTerminalResponse::default())
    }
}
