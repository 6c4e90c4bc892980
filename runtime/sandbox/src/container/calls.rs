//! What is asked of containers and processes that are there, up to their deletion.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_protocol::messages;
use oci_spec::runtime::LinuxResources;
use tokio::time::timeout;

use crate::agent::context;
use crate::hooks::{Kind, Lifecycle};
use crate::sandbox::in_background;
use crate::state::is_name;
use crate::{ContainerError, ErrorKind, Exit, ListedProcess, Sandbox};

use super::{INIT, LAUNCH_CALL_DEADLINE, SIGKILL, SIGKILL_DEADLINE, to_json};

impl Sandbox {
    /// Starts a process. Answers with its pid in the guest.
    ///
    /// # Errors
    /// [`ContainerError`]; a missing program is `Agent` with kind `NotFound` or `InvalidArgument`.
    pub async fn start_process(
        &self,
        container: &str,
        exec_id: &str,
    ) -> Result<u32, ContainerError> {
        self.containers().check(container, exec_id)?;
        if let Some(pause) = self.pod_pause(container) {
            return pause.start().map(|()| 0);
        }
        if exec_id == INIT {
            // Docker moves interfaces in between a container's creation and its start.
            self.follow_network().await?;
        }
        let mut request = messages::StartProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        let hooks = match exec_id {
            INIT => self.containers().hooks(container),
            _ => None,
        };
        let in_guest = |hooks: &Lifecycle| hooks.time_limit(Kind::StartContainer);
        let deadline = LAUNCH_CALL_DEADLINE + hooks.as_ref().map_or(Duration::ZERO, in_guest);
        let response = self
            .agent
            .call(
                &self.vmm,
                "start process",
                Some(deadline),
                |client| async move { client.start_process(context(), &request).await },
            )
            .await?;
        if let Some(hooks) = hooks.filter(|hooks| hooks.has(Kind::Poststart)) {
            let pid = self.vmm_pid();
            in_background(move || hooks.run_poststart(pid)).await;
        }
        Ok(response.pid)
    }

    /// Waits for the end of a process, for as long as it takes. If the virtual machine goes, all
    /// its processes have ended with 137.
    ///
    /// # Errors
    /// [`ContainerError`], never `VmGone`.
    pub async fn wait_process(
        &self,
        container: &str,
        exec_id: &str,
    ) -> Result<Exit, ContainerError> {
        self.containers().check(container, exec_id)?;
        if let Some(pause) = self.pod_pause(container) {
            return Ok(pause.ended(self.ended()).await);
        }
        let request = wait_request(container, exec_id);
        let waited = self
            .agent
            .call(&self.vmm, "wait process", None, |client| async move {
                client.wait_process(context(), &request).await
            })
            .await;
        match waited {
            Ok(response) => Ok(Exit {
                status: response.exit_status.min(EXIT_STATUS_MAX),
                at: UNIX_EPOCH + Duration::from_nanos(response.exited_at_ns),
            }),
            Err(ContainerError::VmGone(_)) => Ok(Exit {
                status: EXIT_STATUS_KILLED,
                at: SystemTime::now(),
            }),
            Err(error) => Err(error),
        }
    }

    /// Sends a signal to a process, or to all of its container. A guest that does not even answer to
    /// a SIGKILL for an init is ended as a whole.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn signal(
        &self,
        container: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        self.containers().check(container, exec_id)?;
        if let Some(pause) = self.pod_pause(container) {
            pause.signal(signal);
            return Ok(());
        }
        let sent = self.signal_unchecked(container, exec_id, signal, all);
        if signal != SIGKILL || exec_id != INIT {
            return sent.await;
        }
        match timeout(SIGKILL_DEADLINE, sent).await {
            Ok(sent) => sent,
            Err(_) => {
                tracing::warn!(
                    container,
                    "ending a guest that has not answered to SIGKILL for {SIGKILL_DEADLINE:?}"
                );
                self.vmm.kill().await;
                Ok(())
            }
        }
    }

    pub(super) async fn signal_unchecked(
        &self,
        container: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let mut request = messages::SignalProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.signal = signal;
        request.all = all;
        self.call("signal process", |client| async move {
            client.signal_process(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn resize(
        &self,
        container: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<(), ContainerError> {
        self.containers().check(container, exec_id)?;
        if let Some(pause) = self.pod_pause(container) {
            return pause.refuse("have a terminal");
        }
        let mut request = messages::ResizeTerminalRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.width = width;
        request.height = height;
        self.call("resize terminal", |client| async move {
            client.resize_terminal(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn list_processes(
        &self,
        container: &str,
    ) -> Result<Vec<ListedProcess>, ContainerError> {
        self.containers().check(container, INIT)?;
        if let Some(pause) = self.pod_pause(container) {
            return Ok(pause.processes());
        }
        let mut request = messages::ListProcessesRequest::new();
        container.clone_into(&mut request.container_id);
        let response = self
            .call("list processes", |client| async move {
                client.list_processes(context(), &request).await
            })
            .await?;
        let listed = response.processes.into_iter().map(|process| ListedProcess {
            pid: process.pid,
            // A name of another form is none that was given here.
            exec_id: (process.known && (process.exec_id.is_empty() || is_name(&process.exec_id)))
                .then_some(process.exec_id),
        });
        Ok(listed.collect())
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn pause(&self, container: &str) -> Result<(), ContainerError> {
        self.containers().check(container, INIT)?;
        if let Some(pause) = self.pod_pause(container) {
            return pause.refuse("freeze");
        }
        let mut request = messages::PauseContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.call("pause container", |client| async move {
            client.pause_container(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn resume(&self, container: &str) -> Result<(), ContainerError> {
        self.containers().check(container, INIT)?;
        if let Some(pause) = self.pod_pause(container) {
            return pause.refuse("freeze");
        }
        let mut request = messages::ResumeContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.call("resume container", |client| async move {
            client.resume_container(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// Changes a container's limits. A machine that has less memory than they come to takes more first;
    /// one that has more gives some back afterwards, as far as it can.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn update(
        &self,
        container: &str,
        resources: &LinuxResources,
    ) -> Result<(), ContainerError> {
        self.containers().check(container, INIT)?;
        if self.pod_pause(container).is_some() {
            // Limits of what uses nothing.
            return Ok(());
        }
        let mut request = messages::UpdateContainerRequest::new();
        container.clone_into(&mut request.container_id);
        request.resources_json = to_json(resources)?;
        let update = async {
            let updated = self.call("update container", |client| async move {
                client.update_container(context(), &request).await
            });
            updated.await.map(drop)
        };
        self.update_in_room(container, resources, update).await
    }

    /// The files of the container's cgroup that hold figures, by name.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn stats(&self, container: &str) -> Result<HashMap<String, String>, ContainerError> {
        self.containers().check(container, INIT)?;
        if self.pod_pause(container).is_some() {
            return Ok(HashMap::new());
        }
        let mut request = messages::ContainerStatsRequest::new();
        container.clone_into(&mut request.container_id);
        let response = self
            .call("container stats", |client| async move {
                client.container_stats(context(), &request).await
            })
            .await?;
        Ok(response.files)
    }

    /// Waits until the container's count of OOM kills is higher than `seen`, and answers with it.
    /// No deadline: ends with the container or the virtual machine.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn wait_oom(&self, container: &str, seen: u64) -> Result<u64, ContainerError> {
        self.containers().check(container, INIT)?;
        if let Some(pause) = self.pod_pause(container) {
            return pause.refuse("run out of memory");
        }
        let mut request = messages::WaitOomRequest::new();
        container.clone_into(&mut request.container_id);
        request.seen = seen;
        let response = self
            .agent
            .call(&self.vmm, "wait for OOM", None, |client| async move {
                client.wait_oom(context(), &request).await
            })
            .await?;
        Ok(response.oom_kills)
    }

    /// Forgets a process that has ended. Works with the virtual machine gone.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn delete_process(
        &self,
        container: &str,
        exec_id: &str,
    ) -> Result<(), ContainerError> {
        if exec_id == INIT {
            let text = "init is deleted with its container".to_owned();
            return Err(ContainerError::Invalid { text });
        }
        self.containers().check(container, exec_id)?;
        unless_gone(self.delete_process_in_guest(container, exec_id).await)?;
        self.containers().remove_process(container, exec_id);
        Ok(())
    }

    pub(super) async fn delete_process_in_guest(
        &self,
        container: &str,
        exec_id: &str,
    ) -> Result<(), ContainerError> {
        let mut request = messages::DeleteProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        self.call("delete process", |client| async move {
            client.delete_process(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// Removes a container whose processes have ended: in the guest, and its mounts and directories
    /// on the host. Works with the virtual machine gone.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn delete_container(&self, container: &str) -> Result<(), ContainerError> {
        self.containers().check(container, INIT)?;
        if self.pod_pause(container).is_some() {
            self.containers().remove(container);
            return Ok(());
        }
        unless_gone(self.delete_in_guest(container).await)?;
        self.take_back_disks(container).await;
        self.take_back_room(container).await;
        self.remove_from_host(container).await?;
        self.containers().remove(container);
        Ok(())
    }

    pub(super) async fn delete_in_guest(&self, container: &str) -> Result<(), ContainerError> {
        let mut request = messages::DeleteContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.call("delete container", |client| async move {
            client.delete_container(context(), &request).await
        })
        .await?;
        Ok(())
    }
}

/// What a virtual machine takes with it as it goes need not be deleted in it. Neither need what a
/// repeated call has deleted already.
fn unless_gone(deleted: Result<(), ContainerError>) -> Result<(), ContainerError> {
    match deleted {
        Err(ContainerError::VmGone(_)) => Ok(()),
        Err(error @ ContainerError::Agent { .. }) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(super) fn wait_request(container: &str, exec_id: &str) -> messages::WaitProcessRequest {
    let mut request = messages::WaitProcessRequest::new();
    container.clone_into(&mut request.container_id);
    exec_id.clone_into(&mut request.exec_id);
    request
}

/// 128 + SIGKILL: what a process has ended with whose machine is gone.
const EXIT_STATUS_KILLED: u32 = 137;

const EXIT_STATUS_MAX: u32 = 255;
