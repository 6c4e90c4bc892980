//! The Task service, without its transport: finds the task, acts, publishes.
//!
//! Order of events: create before start before exit before delete, and init's exit after the
//! exits of all its execs. One background task per process awaits its end and is the only place
//! that records it.

mod create;
mod sandbox;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{
    ConnectResponse, DeleteResponse, ProcessInfo, StateResponse, Status,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::CodedOutputStream;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxResources;
use tokio::sync::{OnceCell, RwLock, watch};
use tokio::task::JoinHandle;
use ttrpc::Code;

use crate::convert::timestamp;
use crate::events::{Event, Publisher};
use crate::logger::Owner;
use crate::pod::{Exit, GuestProcess, NewContainer, Pod, PodError, PodMaker};
use crate::state::{Refused, State, Step};
use crate::stats::metrics;
use crate::task::{Process, Task};
use sandbox::PodSandbox;

/// What an exec that could not be started has ended with, as a shell says of a missing command.
const STATUS_NOT_STARTED: u32 = 127;

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;

/// proc_sys_kernel(5): no pid of any host is as high.
const HOST_PIDS_MAX: u32 = 4 * 1024 * 1024;

/// How long init's exit waits for what ends with it: execs, and the watch over its memory.
const INIT_END_DEADLINE: Duration = Duration::from_secs(10);

/// How long this process waits for its first task. Who started it asks at once, or has gone: not every
/// containerd buries a shim that it finds unfit for a task (2.1, where the runtime lacks a feature).
const FIRST_TASK_DEADLINE: Duration = Duration::from_secs(60);

/// Most OOM events of one container: a guest can claim any number of kills.
const OOM_EVENTS_MAX: u32 = 1024;

impl From<Refused> for PodError {
    fn from(refused: Refused) -> Self {
        Self::new(Code::FAILED_PRECONDITION, refused)
    }
}

/// The tasks of one pod.
pub(crate) struct Service<M: PodMaker> {
    /// containerd's.
    namespace: String,
    /// The pod's.
    id: String,
    maker: M,
    pod: OnceCell<Arc<M::Pod>>,
    /// The pod as containerd's Sandbox API sees it; none where the first task makes the pod.
    sandbox: OnceLock<Box<PodSandbox>>,
    events: Publisher,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    /// Read while a task is created, so that the end of this process comes before or after that.
    creating: RwLock<()>,
    /// Set when this process is to end.
    ended: watch::Sender<bool>,
}

impl<M: PodMaker + 'static> Service<M> {
    pub(crate) fn new(namespace: String, id: String, maker: M, events: Publisher) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            id,
            maker,
            pod: OnceCell::new(),
            sandbox: OnceLock::new(),
            events,
            tasks: Mutex::default(),
            creating: RwLock::default(),
            ended: watch::Sender::new(false),
        })
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        // Nothing below panics while it holds the lock.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn task(&self, id: &str) -> Result<Arc<Task>, PodError> {
        self.tasks()
            .get(id)
            .cloned()
            .ok_or_else(|| PodError::new(Code::NOT_FOUND, format!("task {id:?} not found")))
    }

    fn process(&self, id: &str, exec: &str) -> Result<(Arc<Task>, Arc<Process>), PodError> {
        let task = self.task(id)?;
        let process = task.process(exec).ok_or_else(|| {
            PodError::new(
                Code::NOT_FOUND,
                format!("process {exec:?} of task {id:?} not found"),
            )
        })?;
        Ok((task, process))
    }

    fn pod(&self) -> Result<Arc<M::Pod>, PodError> {
        self.pod
            .get()
            .cloned()
            .ok_or_else(|| PodError::new(Code::FAILED_PRECONDITION, "no container was created yet"))
    }

    /// The pod, which is made if it is not there.
    async fn make_pod(&self, first: &NewContainer) -> Result<Arc<M::Pod>, PodError> {
        let make = || async { self.maker.make(first).await.map(Arc::new) };
        Ok(self.pod.get_or_try_init(make).await?.clone())
    }

    /// Whether nothing needs the pod any more. One of the Sandbox API is there without tasks.
    fn is_unused(&self) -> bool {
        self.tasks().is_empty() && self.sandbox.get().is_none()
    }

    /// Whose output it is, for log drivers.
    fn owner<'a>(&'a self, id: &'a str) -> Owner<'a> {
        Owner {
            namespace: &self.namespace,
            id,
        }
    }

    /// The pid containerd is told, for every process: guest pids mean nothing on the host.
    fn pid(&self) -> u32 {
        self.pod.get().map_or(0, |pod| pod.host_pid())
    }

    /// A process in a list of them. Clients look pids up on the host (`docker top`): init's is that
    /// of the pod, as ever, and the others are none that a process of the host can have.
    fn pid_of(&self, process: &GuestProcess) -> u32 {
        match process.exec_id.as_deref() {
            Some("") => self.pid(),
            _ => process.pid.saturating_add(HOST_PIDS_MAX),
        }
    }

    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, PodError> {
        let (_, process) = self.process(id, exec)?;
        let pod = self.pod()?;
        process.step(Step::Start)?;
        if let Err(error) = pod.start_process(id, exec).await {
            process.step(Step::StartFailed)?;
            if !exec.is_empty() {
                // Nothing has run, so nothing is published; but somebody may wait already.
                process.record_exit(Exit {
                    status: STATUS_NOT_STARTED,
                    at: SystemTime::now(),
                });
            }
            return Err(error);
        }
        let pid = pod.host_pid();
        if exec.is_empty() {
            let mut event = TaskStart::new();
            event.set_container_id(id.to_owned());
            event.set_pid(pid);
            self.events.publish(Event::Start(event));
        } else {
            let mut event = TaskExecStarted::new();
            event.set_container_id(id.to_owned());
            event.set_exec_id(exec.to_owned());
            event.set_pid(pid);
            self.events.publish(Event::ExecStarted(event));
        }
        process.step(Step::Started)?;
        if !exec.is_empty() {
            self.watch(pod, id, exec, &process, None);
        }
        Ok(pid)
    }

    /// Tells of a container's OOM kills, in the background, until it ends.
    fn watch_memory(&self, pod: Arc<M::Pod>, id: &str) -> JoinHandle<()> {
        let events = self.events.clone();
        let id = id.to_owned();
        tokio::spawn(async move {
            let mut seen = 0;
            for _ in 0..OOM_EVENTS_MAX {
                match pod.out_of_memory(&id, seen).await {
                    Ok(kills) if kills > seen => seen = kills,
                    _ => return,
                }
                let mut event = TaskOOM::new();
                event.set_container_id(id.clone());
                events.publish(Event::Oom(event));
            }
            tracing::warn!(id, "no more of its OOM kills are told of");
        })
    }

    /// Awaits the end of a process in the background, records it, and says so.
    /// What `before` has to say comes first.
    fn watch(
        self: &Arc<Self>,
        pod: Arc<M::Pod>,
        id: &str,
        exec: &str,
        process: &Arc<Process>,
        before: Option<JoinHandle<()>>,
    ) {
        let service = self.clone();
        let process = process.clone();
        let (id, exec) = (id.to_owned(), exec.to_owned());
        tokio::spawn(async move {
            let exit = pod.wait_process(&id, &exec).await;
            // The start event goes first.
            process.not_starting().await;
            if exec.is_empty()
                && let Ok(task) = service.task(&id)
            {
                execs_ended(&task).await;
            }
            if let Some(before) = before
                && tokio::time::timeout(INIT_END_DEADLINE, before)
                    .await
                    .is_err()
            {
                tracing::warn!(id, "the guest does not say how its memory was");
            }
            service.publish_exit(&id, &exec, exit);
            process.record_exit(exit);
        });
    }

    fn publish_exit(&self, id: &str, exec: &str, exit: Exit) {
        let mut event = TaskExit::new();
        event.set_container_id(id.to_owned());
        event.set_id(if exec.is_empty() { id } else { exec }.to_owned());
        event.set_pid(self.pid());
        event.set_exit_status(exit.status);
        event.set_exited_at(timestamp(exit.at));
        self.events.publish(Event::Exit(event));
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit, PodError> {
        let (_, process) = self.process(id, exec)?;
        Ok(process.exited().await)
    }

    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<StateResponse, PodError> {
        let (task, process) = self.process(id, exec)?;
        let mut response = StateResponse::new();
        response.set_id(id.to_owned());
        response.set_exec_id(exec.to_owned());
        response.set_bundle(task.bundle.display().to_string());
        response.set_pid(self.pid());
        response.set_status(match process.state() {
            State::Created | State::Starting => Status::CREATED,
            // The whole container is frozen, its execs too.
            State::Running if task.init.state() == State::Paused => Status::PAUSED,
            State::Running => Status::RUNNING,
            State::Paused => Status::PAUSED,
            State::Stopped | State::Deleting | State::Deleted => Status::STOPPED,
        });
        response.set_stdin(process.paths.stdin.clone());
        response.set_stdout(process.paths.stdout.clone());
        response.set_stderr(process.paths.stderr.clone());
        response.set_terminal(process.paths.terminal);
        if let Some(exit) = process.exit() {
            response.set_exit_status(exit.status);
            response.set_exited_at(timestamp(exit.at));
        }
        Ok(response)
    }

    pub(crate) async fn kill(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PodError> {
        let (_, process) = self.process(id, exec)?;
        match process.state() {
            State::Created if !exec.is_empty() => Err(PodError::new(
                Code::FAILED_PRECONDITION,
                "process not started: cannot signal",
            )),
            // The Go shim's words, which clients look for.
            State::Stopped | State::Deleting | State::Deleted => {
                Err(PodError::new(Code::NOT_FOUND, "process already finished"))
            }
            // It only asks whether there is a process, as kill(2) has it.
            _ if signal == 0 => Ok(()),
            _ => self.pod()?.signal_process(id, exec, signal, all).await,
        }
    }

    pub(crate) async fn resize(
        &self,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), PodError> {
        let (_, process) = self.process(id, exec)?;
        if !process.paths.terminal {
            // As runc's shim has it: clients resize without asking whether there is a terminal.
            return Ok(());
        }
        self.pod()?.resize_terminal(id, exec, width, height).await
    }

    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<(), PodError> {
        let (_, process) = self.process(id, exec)?;
        process.close_stdin();
        Ok(())
    }

    pub(crate) async fn pause(&self, id: &str, pause: bool) -> Result<(), PodError> {
        let task = self.task(id)?;
        let pod = self.pod()?;
        let step = if pause { Step::Pause } else { Step::Resume };
        // Asked of the table first: the guest is not bothered with what can't be.
        task.init.state().after(step)?;
        if pause {
            pod.pause(id).await?;
            task.init.step(step)?;
            let mut event = TaskPaused::new();
            event.set_container_id(id.to_owned());
            self.events.publish(Event::Paused(event));
        } else {
            pod.resume(id).await?;
            task.init.step(step)?;
            let mut event = TaskResumed::new();
            event.set_container_id(id.to_owned());
            self.events.publish(Event::Resumed(event));
        }
        Ok(())
    }

    pub(crate) async fn pids(&self, id: &str) -> Result<Vec<ProcessInfo>, PodError> {
        let task = self.task(id)?;
        if task.init.state() == State::Stopped {
            return Err(PodError::new(Code::NOT_FOUND, "the container has stopped"));
        }
        let processes = self.pod()?.processes(id).await?;
        Ok(processes
            .into_iter()
            .map(|process| {
                let mut info = ProcessInfo::new();
                info.set_pid(self.pid_of(&process));
                // The Go shim tells of execs, and of them only.
                let exec = process.exec_id.filter(|exec| !exec.is_empty());
                info.info = exec.map(|exec| process_details(&exec)).into();
                info
            })
            .collect())
    }

    /// Changes a container's limits. `resources` is the specification's `LinuxResources` as JSON.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), PodError> {
        self.running(id)?;
        let resources: LinuxResources = serde_json::from_slice(resources).map_err(|error| {
            PodError::new(
                Code::INVALID_ARGUMENT,
                format!("the resources for task {id:?}: {error}"),
            )
        })?;
        self.pod()?.update(id, &resources).await
    }

    pub(crate) async fn stats(&self, id: &str) -> Result<Metrics, PodError> {
        self.running(id)?;
        let pod = self.pod()?;
        let (files, counters) = tokio::try_join!(pod.stats(id), pod.network_counters())?;
        Ok(metrics(&files, &counters))
    }

    /// A task's cgroup is of use only while it has not ended.
    fn running(&self, id: &str) -> Result<(), PodError> {
        let task = self.task(id)?;
        match task.init.state() {
            State::Stopped | State::Deleting | State::Deleted => Err(PodError::new(
                Code::NOT_FOUND,
                format!("task {id:?} has stopped"),
            )),
            _ => Ok(()),
        }
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse, PodError> {
        let (_, process) = self.process(id, exec)?;
        let pod = self.pod()?;
        let state = process.state();
        if matches!(state, State::Deleting | State::Deleted) {
            // Who comes second is told the same as who comes too late, and no sooner than it is so.
            process.deleted().await;
            return Err(PodError::new(
                Code::NOT_FOUND,
                format!("process {exec:?} of task {id:?} was deleted by another call"),
            ));
        }
        let has_ended = process.exit().is_some();
        process.step(Step::Delete)?;
        if exec.is_empty() && !has_ended {
            // It waits for a start that will not come, or did not start as it should.
            if let Err(error) = pod.signal_process(id, exec, SIGKILL, true).await {
                tracing::debug!(%error, id, "it has ended by itself, or is about to");
            }
            let ended = tokio::time::timeout(INIT_END_DEADLINE, process.exited());
            if ended.await.is_err() {
                tracing::warn!(id, "a container that did not start outlives SIGKILL");
            }
        }
        if state != State::Created {
            pod.output_drained(id, exec).await;
        }
        process.release_stdio().finish().await;
        let pid = pod.host_pid();
        if exec.is_empty() {
            if let Err(error) = pod.delete_container(id).await {
                tracing::warn!(%error, id, "the guest could not remove the container");
            }
            self.tasks().remove(id);
            if self.is_unused() {
                pod.shutdown().await;
            }
        } else {
            if let Err(error) = pod.delete_process(id, exec).await {
                tracing::warn!(%error, id, exec, "the guest could not remove the process");
            }
            self.task(id)?.remove_exec(exec);
        }
        let mut response = DeleteResponse::new();
        response.set_pid(pid);
        if let Some(exit) = process.exit() {
            response.set_exit_status(exit.status);
            response.set_exited_at(timestamp(exit.at));
        }
        if exec.is_empty() {
            let mut event = TaskDelete::new();
            event.set_container_id(id.to_owned());
            event.set_id(id.to_owned());
            event.set_pid(pid);
            event.set_exit_status(response.exit_status());
            event.exited_at = response.exited_at.clone();
            self.events.publish(Event::Delete(event));
        }
        process.step(Step::Deleted)?;
        Ok(response)
    }

    pub(crate) fn connect(&self, id: &str) -> ConnectResponse {
        let mut response = ConnectResponse::new();
        response.set_shim_pid(std::process::id());
        if self.has_pid(id) {
            response.set_task_pid(self.pid());
        }
        response
    }

    /// What `Checkpoint` answers for a task that is there.
    pub(crate) fn checkpoint(&self, id: &str) -> Result<(), PodError> {
        self.task(id)?;
        Err(PodError::new(
            Code::UNIMPLEMENTED,
            "checkpoints are not supported",
        ))
    }

    /// Ends this process, unless somebody needs the pod and `now` is not set.
    pub(crate) async fn shutdown(&self, now: bool) {
        // What is under way fails by itself if the machine goes.
        let _created = match now {
            true => None,
            false => Some(self.creating.write().await),
        };
        if !now && !self.is_unused() {
            return;
        }
        if let Some(pod) = self.pod.get() {
            pod.shutdown().await;
        }
        self.ended.send_replace(true);
    }

    /// Ends this process if nobody asks for a task in time.
    pub(crate) async fn end_if_unused(&self) {
        tokio::time::sleep(FIRST_TASK_DEADLINE).await;
        // One that is being created is waited for.
        drop(self.creating.write().await);
        if self.pod.get().is_none() && self.sandbox.get().is_none() {
            tracing::warn!("nobody has asked for a task within {FIRST_TASK_DEADLINE:?}: ending");
            self.shutdown(false).await;
        }
    }

    /// Answers when `shutdown` has done its work.
    pub(crate) async fn ended(&self) {
        // The sender lives in self.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

/// Waits for the exits of a task's execs: they end with init.
async fn execs_ended(task: &Task) {
    let all = async {
        for exec in task.running_execs() {
            exec.exited().await;
        }
    };
    if tokio::time::timeout(INIT_END_DEADLINE, all).await.is_err() {
        tracing::warn!("execs outlived their container's init by {INIT_END_DEADLINE:?}");
    }
}

/// `containerd.runc.v1.ProcessDetails`, whose one field is the exec id: what clients of the Go shim
/// know. Its definition is not among those that the protocol's crate compiles.
fn process_details(exec: &str) -> Any {
    const EXEC_ID: u32 = 1;
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    // Writing to memory does not fail.
    let written = output
        .write_string(EXEC_ID, exec)
        .and_then(|()| output.flush());
    drop(output);
    debug_assert!(written.is_ok());
    Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        value,
        ..Any::default()
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
