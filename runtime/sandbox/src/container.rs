//! Containers and processes of a sandbox.
//!
//! A process is named by its container's id and an exec id, which is empty for the container's init.

mod files;
mod table;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_protocol::messages::{self, Stdio};
use husk_protocol::service::AgentClient;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use crate::agent::context;
use crate::control::StreamEnd;
use crate::sandbox::in_background;
use crate::spec::guest_spec;
use crate::state::is_name;
use crate::{ContainerError, ErrorKind, Sandbox};

use files::ContainerFiles;
pub(crate) use table::Containers;

/// A container to make.
#[derive(Debug)]
pub struct ContainerRequest {
    /// Its id, unique in the sandbox.
    pub id: String,
    /// The directory of its `config.json`; relative paths in the spec start from here.
    pub bundle: PathBuf,
    /// The spec as the caller knows it, with the host's paths.
    pub spec: Spec,
    /// Mounts that make the root file system, in order; none: the spec's `root.path` is it.
    pub rootfs: Vec<RootfsMount>,
    /// The streams of the init process.
    pub io: ProcessIo,
}

/// A mount as containerd's snapshotters describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// `overlay`, `bind`, `ext4`, ...
    pub fstype: String,
    /// Directory, device, or a word the file system ignores.
    pub source: String,
    /// Where below the root file system; empty: the root itself.
    pub target: String,
    /// `ro`, `rbind`, `lowerdir=...`, ...
    pub options: Vec<String>,
}

/// The host's ends of a process's streams. They are handed to the VMM, which reads and writes them
/// itself, and closed here. An absent one is `/dev/null` in the guest.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// Read until its end, which becomes the end of the process's standard input.
    pub stdin: Option<OwnedFd>,
    /// A writer of the FIFO that `stdin` reads, so that it doesn't end as the last client detaches.
    /// Kept open until [`Sandbox::close_stdin`] or the process's end.
    pub stdin_keeper: Option<OwnedFd>,
    /// Standard output; a terminal's output.
    pub stdout: Option<OwnedFd>,
    /// Standard error; must be absent with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The process has a terminal. Must agree with the spec's `process.terminal`.
    pub terminal: bool,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + signal. 137 for all processes of a virtual machine that has gone.
    pub status: u32,
    /// When, by the guest's clock.
    pub at: SystemTime,
}

/// A process in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedProcess {
    /// Its pid in the guest.
    pub pid: u32,
    /// For those that were made through this library; empty: init.
    pub exec_id: Option<String>,
}

/// How the process's output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every byte it wrote has been written to the sinks.
    All,
    /// The deadline passed first: something holds the output open, or nobody reads it.
    NotInTime,
}

impl Sandbox {
    /// Makes a container, up to the point where its init waits for [`Self::start_process`] with an
    /// empty exec id. Answers with init's pid in the guest.
    ///
    /// # Errors
    /// [`ContainerError`]; everything that had been made is undone.
    pub async fn create_container(&self, request: ContainerRequest) -> Result<u32, ContainerError> {
        let id = request.id.clone();
        check_name("container", &id)?;
        let has_terminal = |process: &Process| process.terminal().unwrap_or(false);
        check_io(
            &request.io,
            request.spec.process().as_ref().is_some_and(has_terminal),
        )?;
        if let Some(end) = self.vmm.end() {
            return Err(ContainerError::VmGone(end));
        }
        self.containers().reserve(&id)?;
        let created = self.create_reserved(request).await;
        if created.is_err() {
            self.containers().remove(&id);
        }
        created
    }

    async fn create_reserved(&self, request: ContainerRequest) -> Result<u32, ContainerError> {
        let ContainerRequest {
            id,
            bundle,
            spec,
            rootfs,
            io,
        } = request;
        let guest = guest_spec(spec, &id)?;
        let spec_json = to_json(&guest.spec)?;
        let files = ContainerFiles::new(&self.state, &id);
        let mounting = files.clone();
        in_background(move || mounting.mount(&bundle, &guest, rootfs)).await?;
        let created = self.create_in_guest(&id, spec_json, io).await;
        if created.is_err()
            && let Err(error) = in_background(move || files.unmount()).await
        {
            tracing::warn!(container = id, %error, "a container that failed leaves something");
        }
        created
    }

    async fn create_in_guest(
        &self,
        id: &str,
        spec_json: Vec<u8>,
        io: ProcessIo,
    ) -> Result<u32, ContainerError> {
        let ports = self.allot_ports(&io);
        let mut request = messages::CreateContainerRequest::new();
        id.clone_into(&mut request.container_id);
        request.spec_json = spec_json;
        request.stdio = Some(ports.clone()).into();
        let response = self
            .call("create container", |client| async move {
                client.create_container(context(), &request).await
            })
            .await?;
        if let Err(error) = self.connect_streams(id, INIT, &ports, io).await {
            self.discard_in_guest(id).await;
            return Err(error);
        }
        Ok(response.pid)
    }

    /// Ends a container that exists in the guest but can't be served.
    async fn discard_in_guest(&self, id: &str) {
        let discard = async {
            self.signal_unchecked(id, INIT, SIGKILL, true).await?;
            let request = wait_request(id, INIT);
            self.call("end container", |client| async move {
                client.wait_process(context(), &request).await
            })
            .await?;
            self.delete_in_guest(id).await
        };
        if let Err(error) = discard.await {
            tracing::warn!(container = id, %error, "a container that failed stays in the guest");
        }
    }

    /// Registers a further process in a container. It runs with [`Self::start_process`].
    ///
    /// # Errors
    /// [`ContainerError`]; everything that had been made is undone.
    pub async fn create_process(
        &self,
        container: &str,
        exec_id: &str,
        process: &Process,
        io: ProcessIo,
    ) -> Result<(), ContainerError> {
        check_name("process", exec_id)?;
        check_io(&io, process.terminal().unwrap_or(false))?;
        let mut process = process.clone();
        process.set_apparmor_profile(None).set_selinux_label(None);
        let process_json = to_json(&process)?;
        self.containers().reserve_process(container, exec_id)?;
        let created = self
            .create_process_reserved(container, exec_id, process_json, io)
            .await;
        if created.is_err() {
            self.containers().remove_process(container, exec_id);
        }
        created
    }

    async fn create_process_reserved(
        &self,
        container: &str,
        exec_id: &str,
        process_json: Vec<u8>,
        io: ProcessIo,
    ) -> Result<(), ContainerError> {
        let ports = self.allot_ports(&io);
        let mut request = messages::CreateProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.process_json = process_json;
        request.stdio = Some(ports.clone()).into();
        self.call("create process", |client| async move {
            client.create_process(context(), &request).await
        })
        .await?;
        let connected = self.connect_streams(container, exec_id, &ports, io).await;
        if connected.is_err() {
            // It never ran: the agent only has to forget it.
            let _ = self.delete_process_in_guest(container, exec_id).await;
        }
        connected
    }

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
        let mut request = messages::StartProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        let response = self
            .call("start process", |client| async move {
                client.start_process(context(), &request).await
            })
            .await?;
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

    /// Sends a signal to a process, or to all of its container.
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
        self.signal_unchecked(container, exec_id, signal, all).await
    }

    async fn signal_unchecked(
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

    /// Drops [`ProcessIo::stdin_keeper`]: the process's standard input ends once no client has the
    /// FIFO open for writing. Does nothing the second time.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`]
    pub fn close_stdin(&self, container: &str, exec_id: &str) -> Result<(), ContainerError> {
        let keeper = self
            .containers()
            .process(container, exec_id)?
            .stdin_keeper
            .take();
        drop(keeper);
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
        let mut request = messages::ResumeContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.call("resume container", |client| async move {
            client.resume_container(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn update(
        &self,
        container: &str,
        resources: &LinuxResources,
    ) -> Result<(), ContainerError> {
        self.containers().check(container, INIT)?;
        let mut request = messages::UpdateContainerRequest::new();
        container.clone_into(&mut request.container_id);
        request.resources_json = to_json(resources)?;
        self.call("update container", |client| async move {
            client.update_container(context(), &request).await
        })
        .await?;
        Ok(())
    }

    /// The files of the container's cgroup that hold figures, by name.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn stats(&self, container: &str) -> Result<HashMap<String, String>, ContainerError> {
        self.containers().check(container, INIT)?;
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

    /// Waits until every byte that the process has written to its standard output and error is
    /// written to the sinks, but no longer than `deadline`. With the virtual machine gone there is
    /// nothing more to come.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`]
    pub async fn output_drained(
        &self,
        container: &str,
        exec_id: &str,
        deadline: Duration,
    ) -> Result<Drained, ContainerError> {
        let outputs = self
            .containers()
            .process(container, exec_id)?
            .outputs
            .clone();
        let deadline = Instant::now() + deadline;
        for mut output in outputs {
            // Never changes; the error says that the stream is closed.
            if timeout_at(deadline, output.changed()).await.is_err() {
                return Ok(Drained::NotInTime);
            }
        }
        Ok(Drained::All)
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

    async fn delete_process_in_guest(
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
        unless_gone(self.delete_in_guest(container).await)?;
        let files = ContainerFiles::new(&self.state, container);
        in_background(move || files.unmount()).await?;
        self.containers().remove(container);
        Ok(())
    }

    async fn delete_in_guest(&self, container: &str) -> Result<(), ContainerError> {
        let mut request = messages::DeleteContainerRequest::new();
        container.clone_into(&mut request.container_id);
        self.call("delete container", |client| async move {
            client.delete_container(context(), &request).await
        })
        .await?;
        Ok(())
    }

    async fn call<T, F>(
        &self,
        name: &'static str,
        make: impl FnOnce(AgentClient) -> F,
    ) -> Result<T, ContainerError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.agent
            .call(&self.vmm, name, Some(CALL_DEADLINE), make)
            .await
    }

    /// Ports for the streams that are there.
    fn allot_ports(&self, io: &ProcessIo) -> Stdio {
        let mut ports = Stdio::new();
        let next = || self.ports.fetch_add(1, Ordering::Relaxed);
        if io.stdin.is_some() || (io.terminal && io.stdout.is_some()) {
            ports.stdin = next();
        }
        if !io.terminal && io.stdout.is_some() {
            ports.stdout = next();
        }
        if !io.terminal && io.stderr.is_some() {
            ports.stderr = next();
        }
        ports
    }

    /// Gives the streams to the VMM, which connects them to the ports on which the agent listens.
    async fn connect_streams(
        &self,
        container: &str,
        exec_id: &str,
        ports: &Stdio,
        io: ProcessIo,
    ) -> Result<(), ContainerError> {
        let mut outputs = Vec::new();
        if io.terminal {
            if ports.stdin != 0 {
                let both = (io.stdin.as_ref(), io.stdout.as_ref());
                outputs.push(self.connect(ports.stdin, both.0, both.1).await?);
            }
        } else {
            if ports.stdin != 0 {
                self.connect(ports.stdin, io.stdin.as_ref(), None).await?;
            }
            for (port, sink) in [(ports.stdout, &io.stdout), (ports.stderr, &io.stderr)] {
                if port != 0 {
                    outputs.push(self.connect(port, None, sink.as_ref()).await?);
                }
            }
        }
        let mut containers = self.containers();
        let process = containers.process(container, exec_id)?;
        process.outputs = outputs;
        process.stdin_keeper = io.stdin_keeper;
        Ok(())
    }

    async fn connect(
        &self,
        port: u32,
        source: Option<&OwnedFd>,
        sink: Option<&OwnedFd>,
    ) -> Result<StreamEnd, ContainerError> {
        let connected = self.vmm.connect(port, source, sink).await;
        connected.map_err(|text| match self.vmm.end() {
            Some(end) => ContainerError::VmGone(end),
            None => ContainerError::Vmm {
                call: "connect a stream",
                text,
            },
        })
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

fn wait_request(container: &str, exec_id: &str) -> messages::WaitProcessRequest {
    let mut request = messages::WaitProcessRequest::new();
    container.clone_into(&mut request.container_id);
    exec_id.clone_into(&mut request.exec_id);
    request
}

fn check_name(what: &str, name: &str) -> Result<(), ContainerError> {
    if is_name(name) {
        return Ok(());
    }
    Err(ContainerError::Invalid {
        text: format!("{name:?} can't be the id of a {what}"),
    })
}

fn check_io(io: &ProcessIo, has_terminal: bool) -> Result<(), ContainerError> {
    let text = if io.terminal != has_terminal {
        "the request and the spec disagree on whether there is a terminal"
    } else if io.terminal && io.stderr.is_some() {
        "a process with a terminal has no standard error of its own"
    } else {
        return Ok(());
    };
    Err(ContainerError::Invalid {
        text: text.to_owned(),
    })
}

/// JSON for the agent, no longer than a request may be.
fn to_json(value: &impl Serialize) -> Result<Vec<u8>, ContainerError> {
    let text = match serde_json::to_vec(value) {
        Ok(json) if json.len() <= JSON_BYTES_MAX => return Ok(json),
        Ok(json) => format!(
            "the spec is {} bytes long, and must be at most {JSON_BYTES_MAX}",
            json.len()
        ),
        Err(error) => format!("the spec can't be written as JSON: {error}"),
    };
    Err(ContainerError::Invalid { text })
}

/// The exec id of a container's init.
const INIT: &str = "";

const SIGKILL: u32 = 9;

/// 128 + SIGKILL: what a process has ended with whose machine is gone.
const EXIT_STATUS_KILLED: u32 = 137;

const EXIT_STATUS_MAX: u32 = 255;

/// A ttrpc message holds 4 MiB; the rest of the request is small.
const JSON_BYTES_MAX: usize = 4 * 1024 * 1024 - 64 * 1024;

/// For any call to the agent that isn't a wait.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_send<T: Send>(_: &T) {}

    /// A ttrpc server spawns its handlers. Compiling is the test.
    #[expect(dead_code, reason = "never run")]
    fn calls_can_be_made_by_spawned_tasks(sandbox: &Sandbox, request: ContainerRequest) {
        assert_send(&sandbox.create_container(request));
        assert_send(&sandbox.wait_process("", ""));
        assert_send(&sandbox.output_drained("", "", Duration::ZERO));
        assert_send(&sandbox.shutdown(Duration::ZERO));
        assert_send(&sandbox.ended());
    }

    #[test]
    fn terminal_must_be_agreed_on() {
        let io = ProcessIo {
            terminal: true,
            ..ProcessIo::default()
        };
        assert!(check_io(&io, false).is_err());
        assert!(check_io(&ProcessIo::default(), true).is_err());
        assert!(check_io(&io, true).is_ok());
    }

    #[test]
    fn terminal_has_no_standard_error() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let io = ProcessIo {
            terminal: true,
            stderr: Some(writer.into()),
            ..ProcessIo::default()
        };
        assert!(check_io(&io, true).is_err());
    }

    #[test]
    fn oversized_spec_is_refused() {
        assert!(to_json(&"x".repeat(JSON_BYTES_MAX)).is_err());
    }
}
