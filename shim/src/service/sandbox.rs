//! containerd's Sandbox API without its transport: a pod that is there before its containers are.
//!
//! CreateSandbox takes what the pod is to be, StartSandbox makes its machine, StopSandbox ends that, and
//! ShutdownSandbox ends this process. In between the pod's containers are tasks like any others, but the
//! pod does not end with the last of them. An ordinary pod, whose first task makes it, has none of this.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, SandboxStatusResponse};
use husk_sandbox::Role;
use oci_spec::runtime::Spec;
use serde_json::json;
use tokio::sync::watch;
use ttrpc::Code;

use super::{SIGTERM, STATUS_KILLED, Service, chain};
use crate::convert::timestamp;
use crate::pod::{Exit, NewContainer, Pod, PodError, PodMaker};
use crate::pod_config::PodConfig;
use crate::pod_files::PodFiles;
use crate::pod_spec::pod_spec;
use crate::state::State;
use crate::stats::{add, metrics, networks};
use crate::stdio::Ends;

/// A pod of the Sandbox API.
#[derive(Debug)]
pub(super) struct PodSandbox {
    bundle: PathBuf,
    /// Stands for the pod, as that of CRI's own container does in ordinary pods.
    spec: Spec,
    files: PodFiles,
    created_at: SystemTime,
    phase: watch::Sender<Phase>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Starting,
    Ready,
    Ended(Exit),
}

impl PodSandbox {
    fn new(request: &CreateSandboxRequest) -> Result<Self, PodError> {
        let invalid = |text: &dyn std::fmt::Display| PodError::new(Code::INVALID_ARGUMENT, text);
        if !request.rootfs.is_empty() {
            return Err(invalid(&"rootfs: a pod has no root file system of its own"));
        }
        let config = PodConfig::of(request.options.as_ref()).map_err(|error| invalid(&error))?;
        let hostname = match config.hostname.as_str() {
            "" => rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            hostname => hostname.to_owned(),
        };
        let (id, netns) = (request.sandbox_id(), request.netns_path());
        let spec = pod_spec(id, &hostname, &config, netns, &request.annotations)
            .map_err(|error| invalid(&format!("options: {}", chain(&error))))?;
        let bundle = PathBuf::from(request.bundle_path());
        let files = PodFiles::make(&bundle, &hostname, &config).map_err(|(path, error)| {
            PodError::new(
                Code::FAILED_PRECONDITION,
                format!("bundle_path: cannot write {path:?}: {error}"),
            )
        })?;
        Ok(Self {
            bundle,
            spec,
            files,
            created_at: SystemTime::now(),
            phase: watch::Sender::new(Phase::Created),
        })
    }

    fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Makes sure that no start will begin, and waits for one that is under way: it has deadlines.
    async fn settled(&self) -> Phase {
        self.phase.send_if_modified(|phase| {
            let is_new = *phase == Phase::Created;
            if is_new {
                *phase = Phase::Ended(exit(0));
            }
            is_new
        });
        // The sender lives in self.
        let settled = |phase: &Phase| *phase != Phase::Starting;
        let _ = self.phase.subscribe().wait_for(settled).await;
        self.phase()
    }

    fn end(&self, exit: Exit) {
        self.phase.send_if_modified(|phase| {
            let is_alive = !matches!(phase, Phase::Ended(_));
            if is_alive {
                *phase = Phase::Ended(exit);
            }
            is_alive
        });
    }

    fn check_ready(&self) -> Result<(), PodError> {
        let text = match self.phase() {
            Phase::Ready => return Ok(()),
            Phase::Created | Phase::Starting => "the sandbox has not started",
            Phase::Ended(_) => "the sandbox has ended",
        };
        Err(PodError::new(Code::FAILED_PRECONDITION, text))
    }

    /// Lets a container join the pod: its spec gets what is the pod's.
    pub(super) fn admit(&self, spec: &mut Spec) -> Result<(), PodError> {
        self.check_ready()?;
        if Role::of(spec) == Role::Sandbox {
            return Err(PodError::new(
                Code::INVALID_ARGUMENT,
                "the container is to stand for a pod, and this pod was made without one",
            ));
        }
        self.files.bind_into(spec);
        Ok(())
    }
}

fn not_found(id: &str) -> PodError {
    PodError::new(Code::NOT_FOUND, format!("sandbox {id:?} not found"))
}

fn exit(status: u32) -> Exit {
    let at = SystemTime::now();
    Exit { status, at }
}

impl<M: PodMaker + 'static> Service<M> {
    fn sandbox(&self, id: &str) -> Result<&PodSandbox, PodError> {
        self.sandbox
            .get()
            .filter(|_| id == self.id)
            .map(AsRef::as_ref)
            .ok_or_else(|| not_found(id))
    }

    pub(crate) async fn create_sandbox(
        &self,
        request: &CreateSandboxRequest,
    ) -> Result<(), PodError> {
        // No task makes the pod meanwhile, and this process does not end.
        let _creating = self.creating.write().await;
        let refuse = |code, text: &str| Err(PodError::new(code, text));
        let id = request.sandbox_id();
        if *self.ended.borrow() {
            return refuse(Code::UNAVAILABLE, "the shim is ending");
        }
        if id != self.id {
            let text = format!("sandbox_id: this shim serves {:?}, not {id:?}", self.id);
            return refuse(Code::INVALID_ARGUMENT, &text);
        }
        if self.sandbox.get().is_some() {
            let text = format!("sandbox {id:?} exists already");
            return refuse(Code::ALREADY_EXISTS, &text);
        }
        if self.pod.get().is_some() {
            return refuse(Code::FAILED_PRECONDITION, "a task has made the pod already");
        }
        let sandbox = PodSandbox::new(request)?;
        // Nobody else sets it: the lock is held.
        let _ = self.sandbox.set(sandbox.into());
        Ok(())
    }

    /// Makes the pod's machine. Answers with the pid that stands for the pod and the time of its creation.
    pub(crate) async fn start_sandbox(
        self: &Arc<Self>,
        id: &str,
    ) -> Result<(u32, SystemTime), PodError> {
        let sandbox = self.sandbox(id)?;
        let is_first = sandbox.phase.send_if_modified(|phase| {
            let is_new = *phase == Phase::Created;
            if is_new {
                *phase = Phase::Starting;
            }
            is_new
        });
        if !is_first {
            return Err(PodError::new(
                Code::FAILED_PRECONDITION,
                format!("sandbox {id:?} was started before, or has ended"),
            ));
        }
        let pod = match self.start_pod(id, sandbox).await {
            Ok(pod) => pod,
            Err(error) => {
                if let Some(pod) = self.pod.get() {
                    pod.shutdown().await;
                }
                sandbox.end(exit(STATUS_KILLED));
                return Err(error);
            }
        };
        sandbox.phase.send_replace(Phase::Ready);
        let pid = pod.host_pid();
        let (service, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let exit = pod.wait_process(&id, "").await;
            if let Ok(sandbox) = service.sandbox(&id) {
                sandbox.end(exit);
            }
        });
        Ok((pid, sandbox.created_at))
    }

    async fn start_pod(&self, id: &str, sandbox: &PodSandbox) -> Result<Arc<M::Pod>, PodError> {
        let new = NewContainer {
            id: id.to_owned(),
            bundle: sandbox.bundle.clone(),
            spec: sandbox.spec.clone(),
            rootfs: Vec::new(),
            terminal: false,
            ends: Ends::default(),
        };
        let pod = self.make_pod(&new).await?;
        pod.create_container(new).await?;
        pod.start_process(id, "").await?;
        Ok(pod)
    }

    /// Ends the pod's machine and what runs in it. Nothing happens to one that has ended.
    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), PodError> {
        let sandbox = self.sandbox(id)?;
        if sandbox.settled().await == Phase::Ready
            && let Ok(pod) = self.pod()
            && let Err(error) = pod.signal_process(id, "", SIGTERM, false).await
        {
            tracing::debug!(%error, id, "it has ended by itself, or is about to");
        }
        if let Some(pod) = self.pod.get() {
            pod.shutdown().await;
        }
        sandbox.end(exit(0));
        Ok(())
    }

    /// Answers at the pod's end.
    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<Exit, PodError> {
        let mut phases = self.sandbox(id)?.phase.subscribe();
        loop {
            if let Phase::Ended(exit) = *phases.borrow_and_update() {
                return Ok(exit);
            }
            // The sender lives in self.
            let _ = phases.changed().await;
        }
    }

    pub(crate) fn sandbox_status(
        &self,
        id: &str,
        is_verbose: bool,
    ) -> Result<SandboxStatusResponse, PodError> {
        let sandbox = self.sandbox(id)?;
        let (state, process, pid) = match sandbox.phase() {
            Phase::Ready => (READY, "running", self.pid()),
            Phase::Created | Phase::Starting => (NOT_READY, "created", 0),
            Phase::Ended(_) => (NOT_READY, "stopped", 0),
        };
        let mut response = SandboxStatusResponse::new();
        response.set_sandbox_id(id.to_owned());
        response.set_pid(pid);
        response.set_state(state.to_owned());
        response.set_created_at(timestamp(sandbox.created_at));
        if let Phase::Ended(exit) = sandbox.phase() {
            response.set_exited_at(timestamp(exit.at));
        }
        if is_verbose {
            // In the words of what CRI's server says of its own pods.
            let info = json!({ "pid": pid, "processStatus": process }).to_string();
            response.info.insert("info".to_owned(), info);
        }
        Ok(response)
    }

    /// Whether the pod is one of the Sandbox API.
    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<(), PodError> {
        self.sandbox(id).map(|_| ())
    }

    /// Figures of all the pod's containers that run.
    pub(crate) async fn sandbox_metrics(&self, id: &str) -> Result<Metrics, PodError> {
        self.sandbox(id)?.check_ready()?;
        let pod = self.pod()?;
        let running: Vec<String> = {
            let tasks = self.tasks();
            let ids = tasks
                .iter()
                .filter(|(_, task)| matches!(task.init.state(), State::Running | State::Paused));
            ids.map(|(id, _)| id.clone()).collect()
        };
        let mut sum = Metrics::new();
        sum.network = networks(&pod.network_counters().await?);
        for id in running {
            match pod.stats(&id).await {
                Ok(files) => add(&mut sum, &metrics(&files, &[])),
                Err(error) => tracing::debug!(%error, id, "it has just ended"),
            }
        }
        Ok(sum)
    }

    /// Ends this process, with all that is left of the pod. One that was refused by CreateSandbox has
    /// nothing, and is done with as well.
    pub(crate) async fn shutdown_sandbox(&self, id: &str) -> Result<(), PodError> {
        if id != self.id {
            return Err(not_found(id));
        }
        match self.sandbox.get() {
            Some(sandbox) => {
                sandbox.settled().await;
                self.shutdown(true).await;
                sandbox.end(exit(STATUS_KILLED));
            }
            None if self.pod.get().is_some() => {
                return Err(PodError::new(
                    Code::FAILED_PRECONDITION,
                    "the pod was made by a task, and ends with its tasks",
                ));
            }
            None => self.shutdown(false).await,
        }
        Ok(())
    }

    /// Whether a pid stands for that name: of a task, or of the pod.
    pub(super) fn has_pid(&self, id: &str) -> bool {
        let is_ready = |sandbox: &PodSandbox| sandbox.check_ready().is_ok();
        self.tasks().contains_key(id) || self.sandbox(id).is_ok_and(is_ready)
    }
}

/// The states of a pod that CRI knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
