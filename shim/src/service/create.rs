//! Tasks and execs as they are made, up to where they can be started.

use std::sync::Arc;

use containerd_shim_protos::api::{CreateTaskRequest, Mount};
use containerd_shim_protos::events::task::{TaskCreate, TaskExecAdded, TaskIO};
use oci_spec::runtime::Spec;
use tokio::sync::oneshot;
use ttrpc::Code;

use super::{Service, chain};
use crate::events::Event;
use crate::pod::{NewContainer, Pod, PodError, PodMaker, RootMount};
use crate::state::State;
use crate::stdio::Paths;
use crate::task::{Process, Task};

impl<M: PodMaker + 'static> Service<M> {
    /// Creates a task and tells who has asked. If nobody is left to hear it, the task is removed, and
    /// this process ends with its last one: containerd has gone, and some versions of it never ask
    /// for a task again that they have not seen running.
    pub(crate) async fn create_for(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        answer: oneshot::Sender<Result<u32, PodError>>,
    ) {
        {
            let _creating = self.creating.read().await;
            let Err(created) = answer.send(self.create(request).await) else {
                return;
            };
            let id = request.id();
            tracing::warn!(id, "whoever was to have this task has gone");
            if created.is_ok()
                && let Err(error) = self.delete(id, "").await
            {
                tracing::error!(id, %error, "it can't be removed");
            }
        }
        self.shutdown(false).await;
    }

    pub(crate) async fn create(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
    ) -> Result<u32, PodError> {
        let id = request.id();
        if *self.ended.borrow() {
            return Err(PodError::new(Code::UNAVAILABLE, "the shim is ending"));
        }
        if !request.checkpoint().is_empty() {
            return Err(PodError::new(
                Code::UNIMPLEMENTED,
                "checkpoints are not supported",
            ));
        }
        if self.tasks().contains_key(id) {
            return Err(PodError::new(
                Code::ALREADY_EXISTS,
                format!("task {id:?} exists already"),
            ));
        }
        let paths = Paths {
            stdin: request.stdin().to_owned(),
            stdout: request.stdout().to_owned(),
            stderr: request.stderr().to_owned(),
            terminal: request.terminal(),
        };
        let mut spec = read_spec(request.bundle())?;
        if let Some(sandbox) = self.sandbox.get() {
            sandbox.admit(&mut spec)?;
        }
        let (ends, held) = paths
            .open(self.owner(id))
            .await
            .map_err(|error| PodError::new(Code::INVALID_ARGUMENT, chain(&error)))?;
        let new = NewContainer {
            id: id.to_owned(),
            bundle: request.bundle().into(),
            spec,
            rootfs: request.rootfs.iter().map(root_mount).collect(),
            terminal: request.terminal(),
            ends,
        };
        let pod = self.make_pod(&new).await?;
        if let Err(error) = pod.create_container(new).await {
            if self.is_unused() {
                pod.shutdown().await;
            }
            return Err(error);
        }
        let init = Process::new(paths.clone(), held);
        let task = Task::new(request.bundle().into(), init.clone());
        self.tasks().insert(id.to_owned(), task);

        let pid = pod.host_pid();
        let mut event = TaskCreate::new();
        event.set_container_id(id.to_owned());
        event.set_bundle(request.bundle().to_owned());
        event.rootfs = request.rootfs.clone();
        let mut io = TaskIO::new();
        io.set_stdin(paths.stdin);
        io.set_stdout(paths.stdout);
        io.set_stderr(paths.stderr);
        io.set_terminal(paths.terminal);
        event.set_io(io);
        event.set_pid(pid);
        self.events.publish(Event::Create(event));
        let memory = self.watch_memory(pod.clone(), id);
        self.watch(pod, id, "", &init, Some(memory));
        Ok(pid)
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        paths: Paths,
        process: Vec<u8>,
    ) -> Result<(), PodError> {
        let task = self.task(id)?;
        let unfit = match task.init.state() {
            State::Stopped | State::Deleting | State::Deleted => Some("stopped"),
            State::Paused => Some("paused"),
            State::Created | State::Starting | State::Running => None,
        };
        if let Some(unfit) = unfit {
            return Err(PodError::new(
                Code::FAILED_PRECONDITION,
                format!("cannot exec in a {unfit} container"),
            ));
        }
        let exists = || {
            PodError::new(
                Code::ALREADY_EXISTS,
                format!("exec {exec:?} of task {id:?} exists"),
            )
        };
        if task.process(exec).is_some() {
            return Err(exists());
        }
        let (ends, held) = paths
            .open(self.owner(exec))
            .await
            .map_err(|error| PodError::new(Code::INVALID_ARGUMENT, chain(&error)))?;
        let terminal = paths.terminal;
        self.pod()?
            .create_process(id, exec, process, terminal, ends)
            .await?;
        if !task.add_exec(exec, Process::new(paths, held)) {
            return Err(exists());
        }
        let mut event = TaskExecAdded::new();
        event.set_container_id(id.to_owned());
        event.set_exec_id(exec.to_owned());
        self.events.publish(Event::ExecAdded(event));
        Ok(())
    }
}

fn read_spec(bundle: &str) -> Result<Spec, PodError> {
    let path = std::path::Path::new(bundle).join("config.json");
    let failed = |error: &(dyn std::error::Error + 'static)| {
        PodError::new(
            Code::INVALID_ARGUMENT,
            format!("cannot read {path:?}: {}", chain(error)),
        )
    };
    let text = std::fs::read(&path).map_err(|error| failed(&error))?;
    husk_sandbox::parse_spec(&text).map_err(|error| failed(&error))
}

fn root_mount(mount: &Mount) -> RootMount {
    RootMount {
        fstype: mount.type_().to_owned(),
        source: mount.source().to_owned(),
        target: mount.target().to_owned(),
        options: mount.options.clone(),
    }
}
