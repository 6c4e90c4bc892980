//! The calls of the interface.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use protobuf::Message;

use crate::daemon::IMAGE;
use crate::grpc::{Connection, Messages};
use crate::messages::{
    AttachRequest, AttachResponse, ContainerConfig, ContainerEventResponse, ContainerEventType,
    ContainerMetadata, ContainerStats, ContainerStatsRequest, ContainerStatsResponse,
    ContainerStatus, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest,
    CreateContainerResponse, ExecRequest, ExecResponse, ExecSyncRequest, ExecSyncResponse,
    GetEventsRequest, ImageSpec, ImageStatusRequest, ImageStatusResponse, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    ListContainerStatsRequest, ListContainerStatsResponse, ListPodSandboxRequest,
    ListPodSandboxResponse, ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStats, PodSandboxStatsRequest,
    PodSandboxStatsResponse, PodSandboxStatus, PodSandboxStatusRequest, PodSandboxStatusResponse,
    PortForwardRequest, PortForwardResponse, RemoveContainerRequest, RemoveContainerResponse,
    RemovePodSandboxRequest, RemovePodSandboxResponse, RunPodSandboxRequest, RunPodSandboxResponse,
    StartContainerRequest, StartContainerResponse, StatusRequest, StatusResponse,
    StopContainerRequest, StopContainerResponse, StopPodSandboxRequest, StopPodSandboxResponse,
    UpdateContainerResourcesRequest, UpdateContainerResourcesResponse, VersionRequest,
    VersionResponse,
};

/// For any call. The testbed is some twenty times slower than metal.
const DEADLINE: Duration = Duration::from_secs(300);

/// A client of containerd's CRI service.
pub struct Cri {
    connection: Connection,
}

/// A pod that runs, and what it was made from, which each of its containers needs again.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// As it was asked for.
    pub config: PodSandboxConfig,
}

impl Cri {
    /// Connects to containerd's socket.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let connection = Connection::open(socket)?;
        Ok(Self { connection })
    }

    fn runtime<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        let path = format!("runtime.v1.RuntimeService/{method}");
        self.connection.call(&path, request, DEADLINE)
    }

    /// Who serves.
    ///
    /// # Errors
    /// containerd's, in its own words; so with all calls below.
    pub fn version(&self) -> Result<VersionResponse> {
        self.runtime("Version", &VersionRequest::new())
    }

    /// Whether the runtime and its network are ready.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn status(&self) -> Result<StatusResponse> {
        self.runtime("Status", &StatusRequest::new())
    }

    /// Whether an image is there.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn has_image(&self, name: &str) -> Result<bool> {
        let mut request = ImageStatusRequest::new();
        request.image = Some(image(name)).into();
        let path = "runtime.v1.ImageService/ImageStatus";
        let response: ImageStatusResponse = self.connection.call(path, &request, DEADLINE)?;
        Ok(response.image.is_some())
    }

    /// Runs a pod with one of the runtime handlers of containerd's configuration.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn run_pod(&self, handler: &str, config: PodSandboxConfig) -> Result<Pod> {
        let mut request = RunPodSandboxRequest::new();
        request.config = Some(config.clone()).into();
        handler.clone_into(&mut request.runtime_handler);
        let response: RunPodSandboxResponse = self.runtime("RunPodSandbox", &request)?;
        Ok(Pod {
            id: response.pod_sandbox_id,
            config,
        })
    }

    /// The ids of all pods there are, whatever state they are in.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn pods(&self) -> Result<Vec<String>> {
        let response: ListPodSandboxResponse =
            self.runtime("ListPodSandbox", &ListPodSandboxRequest::new())?;
        Ok(response.items.into_iter().map(|pod| pod.id).collect())
    }

    /// How a pod is.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn pod_status(&self, pod: &str) -> Result<PodSandboxStatus> {
        let mut request = PodSandboxStatusRequest::new();
        pod.clone_into(&mut request.pod_sandbox_id);
        let response: PodSandboxStatusResponse = self.runtime("PodSandboxStatus", &request)?;
        response.status.into_option().context("no status")
    }

    /// Stops a pod and what runs in it.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn stop_pod(&self, pod: &str) -> Result<()> {
        let mut request = StopPodSandboxRequest::new();
        pod.clone_into(&mut request.pod_sandbox_id);
        self.runtime::<StopPodSandboxResponse>("StopPodSandbox", &request)?;
        Ok(())
    }

    /// Removes a pod with its containers.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let mut request = RemovePodSandboxRequest::new();
        pod.clone_into(&mut request.pod_sandbox_id);
        self.runtime::<RemovePodSandboxResponse>("RemovePodSandbox", &request)?;
        Ok(())
    }

    /// Makes a container; answers with its id.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn create_container(&self, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let mut request = CreateContainerRequest::new();
        pod.id.clone_into(&mut request.pod_sandbox_id);
        request.config = Some(config).into();
        request.sandbox_config = Some(pod.config.clone()).into();
        let response: CreateContainerResponse = self.runtime("CreateContainer", &request)?;
        Ok(response.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn start_container(&self, container: &str) -> Result<()> {
        let mut request = StartContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.runtime::<StartContainerResponse>("StartContainer", &request)?;
        Ok(())
    }

    /// Asks a container to end, and kills it if it has not within so many seconds.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn stop_container(&self, container: &str, timeout_s: i64) -> Result<()> {
        let mut request = StopContainerRequest::new();
        container.clone_into(&mut request.container_id);
        request.timeout = timeout_s;
        self.runtime::<StopContainerResponse>("StopContainer", &request)?;
        Ok(())
    }

    /// Removes a container; it is killed if it runs.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn remove_container(&self, container: &str) -> Result<()> {
        let mut request = RemoveContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.runtime::<RemoveContainerResponse>("RemoveContainer", &request)?;
        Ok(())
    }

    /// How a container is.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn container_status(&self, container: &str) -> Result<ContainerStatus> {
        let mut request = ContainerStatusRequest::new();
        container.clone_into(&mut request.container_id);
        let response: ContainerStatusResponse = self.runtime("ContainerStatus", &request)?;
        response.status.into_option().context("no status")
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn update(&self, container: &str, limits: LinuxContainerResources) -> Result<()> {
        let mut request = UpdateContainerResourcesRequest::new();
        container.clone_into(&mut request.container_id);
        request.linux = Some(limits).into();
        let method = "UpdateContainerResources";
        self.runtime::<UpdateContainerResourcesResponse>(method, &request)?;
        Ok(())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn container_stats(&self, container: &str) -> Result<ContainerStats> {
        let mut request = ContainerStatsRequest::new();
        container.clone_into(&mut request.container_id);
        let response: ContainerStatsResponse = self.runtime("ContainerStats", &request)?;
        response.stats.into_option().context("no figures")
    }

    /// What a pod uses.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn pod_stats(&self, pod: &str) -> Result<PodSandboxStats> {
        let mut request = PodSandboxStatsRequest::new();
        pod.clone_into(&mut request.pod_sandbox_id);
        let response: PodSandboxStatsResponse = self.runtime("PodSandboxStats", &request)?;
        response.stats.into_option().context("no figures")
    }

    /// What each pod uses.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn all_pod_stats(&self) -> Result<Vec<PodSandboxStats>> {
        let request = ListPodSandboxStatsRequest::new();
        let response: ListPodSandboxStatsResponse =
            self.runtime("ListPodSandboxStats", &request)?;
        Ok(response.stats)
    }

    /// What each container of a pod uses.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn all_container_stats(&self, pod: &str) -> Result<Vec<ContainerStats>> {
        let mut request = ListContainerStatsRequest::new();
        let filter = request.filter.mut_or_insert_default();
        pod.clone_into(&mut filter.pod_sandbox_id);
        let response: ListContainerStatsResponse = self.runtime("ListContainerStats", &request)?;
        Ok(response.stats)
    }

    /// Runs a command in a container to its end.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn exec_sync(&self, container: &str, command: &[&str]) -> Result<ExecSyncResponse> {
        let mut request = ExecSyncRequest::new();
        container.clone_into(&mut request.container_id);
        request.cmd = owned(command);
        self.runtime("ExecSync", &request)
    }

    /// The address at which a command is run in a container, with its streams.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn exec(&self, container: &str, command: &[&str], tty: bool) -> Result<String> {
        let mut request = ExecRequest::new();
        container.clone_into(&mut request.container_id);
        request.cmd = owned(command);
        request.tty = tty;
        request.stdin = true;
        request.stdout = true;
        request.stderr = !tty;
        let response: ExecResponse = self.runtime("Exec", &request)?;
        Ok(response.url)
    }

    /// The address at which a container's own streams are.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn attach(&self, container: &str) -> Result<String> {
        let mut request = AttachRequest::new();
        container.clone_into(&mut request.container_id);
        request.stdin = true;
        request.stdout = true;
        request.stderr = true;
        let response: AttachResponse = self.runtime("Attach", &request)?;
        Ok(response.url)
    }

    /// The address at which a TCP port of a pod is.
    ///
    /// # Errors
    /// See [`Self::version`].
    pub fn port_forward(&self, pod: &str, port: u16) -> Result<String> {
        let mut request = PortForwardRequest::new();
        pod.clone_into(&mut request.pod_sandbox_id);
        request.port = vec![port.into()];
        let response: PortForwardResponse = self.runtime("PortForward", &request)?;
        Ok(response.url)
    }
}

/// What happens to containers.
pub struct Events {
    messages: Messages,
}

impl Events {
    /// Listens to what happens from now on.
    ///
    /// # Errors
    /// See [`Cri::version`].
    pub fn listen(socket: &Path) -> Result<Self> {
        let path = "runtime.v1.RuntimeService/GetContainerEvents";
        let messages = Connection::open(socket)?.subscribe(path, &GetEventsRequest::new())?;
        Ok(Self { messages })
    }

    /// Waits for the end of a container or a pod.
    ///
    /// # Errors
    /// If it does not come in time.
    pub fn stopped(&mut self, id: &str, deadline: Duration) -> Result<()> {
        let deadline = Instant::now() + deadline;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event: ContainerEventResponse = self
                .messages
                .next(left)?
                .with_context(|| format!("{id} has not stopped"))?;
            let stopped = ContainerEventType::CONTAINER_STOPPED_EVENT;
            if event.container_id == id && event.container_event_type == stopped.into() {
                return Ok(());
            }
        }
    }
}

/// A pod as the kubelet asks for it, with nothing that is not needed.
pub fn pod(name: &str) -> PodSandboxConfig {
    let mut metadata = PodSandboxMetadata::new();
    name.clone_into(&mut metadata.name);
    metadata.uid = format!("{name}-uid");
    "default".clone_into(&mut metadata.namespace);
    let mut config = PodSandboxConfig::new();
    config.metadata = Some(metadata).into();
    name.clone_into(&mut config.hostname);
    config.log_directory = format!("/tmp/husk-cri-logs/{name}");
    config.linux = Some(LinuxPodSandboxConfig::new()).into();
    config
}

/// A container of [`crate::IMAGE`] as the kubelet asks for it: with a PID namespace of its own, and
/// a log named after it.
pub fn container(name: &str, command: &[&str]) -> ContainerConfig {
    let mut metadata = ContainerMetadata::new();
    name.clone_into(&mut metadata.name);
    let mut namespaces = NamespaceOption::new();
    namespaces.pid = NamespaceMode::CONTAINER.into();
    let mut security = LinuxContainerSecurityContext::new();
    security.namespace_options = Some(namespaces).into();
    let mut linux = LinuxContainerConfig::new();
    linux.security_context = Some(security).into();
    let mut config = ContainerConfig::new();
    config.metadata = Some(metadata).into();
    config.image = Some(image(IMAGE)).into();
    config.command = owned(command);
    config.log_path = format!("{name}.log");
    config.linux = Some(linux).into();
    config
}

/// An image by its name.
fn image(name: &str) -> ImageSpec {
    let mut image = ImageSpec::new();
    name.clone_into(&mut image.image);
    image
}

fn owned(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}
