//! Containers and processes of a sandbox, and how they are made.
//!
//! A process is named by its container's id and an exec id, which is empty for the container's init.

mod calls;
mod files;
mod pause;
mod pod;
mod streams;
mod table;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use husk_protocol::messages;
use husk_protocol::service::AgentClient;
use husk_protocol::{LAUNCH_DEADLINE, UNDO_DEADLINE};
use oci_spec::runtime::{Process, Spec};
use serde::Serialize;

use crate::agent::context;
use crate::disks::RootDisk;
use crate::hooks::{self, Kind, Lifecycle};
use crate::policy;
use crate::sandbox::in_background;
use crate::spec::{GuestSpec, guest_spec};
use crate::state::is_name;
use crate::{ContainerError, Role, Sandbox};

use calls::wait_request;
use files::{ContainerFiles, Root};
pub(crate) use streams::SourcePorts;
use streams::check_io;
pub use streams::{Drained, ProcessIo};
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
        let _creating = self.creating.read().await;
        if let Some(end) = self.vmm.end() {
            return Err(ContainerError::VmGone(end));
        }
        self.containers().reserve(&id)?;
        let created = match Role::of(&request.spec) {
            Role::Sandbox => self.create_pause(request).await.map(|()| 0),
            Role::Alone | Role::Member => self.create_reserved(request).await,
        };
        if created.is_err() {
            self.take_back_disks(&id).await;
            self.take_back_room(&id).await;
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
        let hooks = Lifecycle::of(&spec, &id, &bundle)?;
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        self.make_room(&id, resources).await;
        let oom_score = spec.process().as_ref().and_then(Process::oom_score_adj);
        let mut guest = guest_spec(spec, &id, Some(self.vmm_pid()), &mut self.memory_volumes())?;
        self.join_pod(&mut guest).await?;
        let joins_pids = guest.joins_pids;
        if !guest.volumes.is_empty() {
            let bundle = bundle.clone();
            guest = in_background(move || {
                guest.keep_flags(&bundle);
                Ok::<_, ContainerError>(guest)
            })
            .await?;
        }
        let has_hooks_inside = hooks.has(Kind::CreateContainer);
        let (rootfs, root_disk) = find_root_disk(rootfs, has_hooks_inside).await?;
        let disks = std::mem::take(&mut guest.disks);
        let disks = self.give_disks(&id, &mut guest.spec, disks, root_disk);
        let root_disk = disks.await?;
        let root = match root_disk {
            Some(_) => Root::Disk,
            None => Root::Share(rootfs),
        };
        let told = self.places_told(&id, &guest);
        let spec_json = to_json(&guest.spec)?;
        let files = ContainerFiles::new(&self.state, &id);
        let created = async {
            self.prepare_on_host(&files, &bundle, guest, root, &hooks)
                .await?;
            // The hooks have left the pod's network namespace as it is to be.
            self.follow_network().await?;
            let made = messages::CreateContainerRequest {
                container_id: id.clone(),
                spec_json,
                bundle: bundle.display().to_string(),
                root: root_disk.into(),
                ..Default::default()
            };
            self.create_in_guest(&id, made, io).await
        };
        let created = created.await;
        if let Ok(pid) = created {
            self.teller().watch(
                &self.state.shared(),
                told,
                self.agent.client(),
                self.vmm.end_watch(),
            );
            if let Some(score) = oom_score {
                self.vmm.take_oom_score(score);
            }
            let mut containers = self.containers();
            containers.keep_hooks(&id, hooks);
            if !joins_pids {
                containers.set_namespace_init(&id, pid);
            }
        } else if let Err(error) = self.remove_from_host(&id).await {
            tracing::warn!(container = id, %error, "a container that failed leaves something");
        }
        created
    }

    /// The volumes, below the share, of whose changes by the host the guest is to hear.
    fn places_told(&self, id: &str, guest: &GuestSpec) -> Vec<PathBuf> {
        let teller = self.teller();
        let volumes = guest.volumes.iter().enumerate();
        volumes
            .filter(|(_, volume)| teller.tells_of(volume.is_read_only))
            .map(|(index, _)| files::volume_place(id, index))
            .collect()
    }

    /// Mounts the container's files and runs the hooks that may change them or the network.
    async fn prepare_on_host(
        &self,
        files: &ContainerFiles,
        bundle: &Path,
        guest: GuestSpec,
        root: Root,
        hooks: &Lifecycle,
    ) -> Result<(), ContainerError> {
        let (files, bundle, hooks) = (files.clone(), bundle.to_owned(), hooks.clone());
        let (state, netns, pid) = (self.state.clone(), self.netns.clone(), self.vmm_pid());
        in_background(move || {
            files.mount(&bundle, &guest, root, |root| {
                hooks::arm_poststop(&state, &hooks)?;
                hooks::run_while_creating(&hooks, root, &netns, pid)
            })
        })
        .await
    }

    /// Removes what a container that is not in the guest has on the host. Its last hooks run.
    async fn remove_from_host(&self, id: &str) -> Result<(), ContainerError> {
        self.teller().leave(PathBuf::from(id));
        let (state, id) = (self.state.clone(), id.to_owned());
        in_background(move || {
            let unmounted = ContainerFiles::new(&state, &id).unmount();
            hooks::run_poststop(&state, &id);
            unmounted
        })
        .await
    }

    async fn create_in_guest(
        &self,
        id: &str,
        mut request: messages::CreateContainerRequest,
        io: ProcessIo,
    ) -> Result<u32, ContainerError> {
        let sources = self.allot_sources(&io)?;
        request.stdio = Some(sources.clone()).into();
        let create =
            |client: AgentClient| async move { client.create_container(context(), &request).await };
        let deadline = Some(LAUNCH_CALL_DEADLINE);
        let created = self
            .agent
            .call(&self.vmm, "create container", deadline, create);
        let response = created.await?;
        if let Err(error) = self.connect_streams(id, INIT, &sources, io).await {
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
        policy::check_process(process)?;
        let mut process = process.clone();
        process.set_apparmor_profile(None).set_selinux_label(None);
        if let Some(pause) = self.pod_pause(container) {
            return pause.refuse("run another beside");
        }
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
        let sources = self.allot_sources(&io)?;
        let mut request = messages::CreateProcessRequest::new();
        container.clone_into(&mut request.container_id);
        exec_id.clone_into(&mut request.exec_id);
        request.process_json = process_json;
        request.stdio = Some(sources.clone()).into();
        self.call("create process", |client| async move {
            client.create_process(context(), &request).await
        })
        .await?;
        let connected = self.connect_streams(container, exec_id, &sources, io).await;
        if connected.is_err() {
            // It never ran: the agent only has to forget it.
            let _ = self.delete_process_in_guest(container, exec_id).await;
        }
        connected
    }

    async fn call<T, F>(
        &self,
        name: &'static str,
        make: impl FnOnce(AgentClient) -> F,
    ) -> Result<T, ContainerError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let deadline = Some(CALL_DEADLINE);
        self.agent.call(&self.vmm, name, deadline, make).await
    }
}

/// Chooses where a root is to be mounted.
async fn find_root_disk(
    rootfs: Vec<RootfsMount>,
    has_hooks_inside: bool,
) -> Result<(Vec<RootfsMount>, Option<RootDisk>), ContainerError> {
    if !RootDisk::is_likely(&rootfs) {
        return Ok((rootfs, None));
    }
    in_background(move || {
        let root = RootDisk::of(&rootfs, has_hooks_inside)?;
        Ok((rootfs, root))
    })
    .await
}

fn check_name(what: &str, name: &str) -> Result<(), ContainerError> {
    if is_name(name) {
        return Ok(());
    }
    Err(ContainerError::Invalid {
        text: format!("{name:?} can't be the id of a {what}"),
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

/// A ttrpc message holds 4 MiB; the rest of the request is small.
const JSON_BYTES_MAX: usize = 4 * 1024 * 1024 - 64 * 1024;

/// For a guest to say that it has sent SIGKILL. A guest that thrashes may take longer than its user
/// has patience.
const SIGKILL_DEADLINE: Duration = Duration::from_secs(20);

/// For any call to the agent that isn't a wait and launches nothing.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

/// For a call that launches something. The agent gives up first, and has undone what was made when it
/// says so: a guest that does not even answer then is stuck, but has no launch of ours under way.
const LAUNCH_CALL_DEADLINE: Duration = LAUNCH_DEADLINE
    .saturating_add(UNDO_DEADLINE)
    .saturating_add(Duration::from_secs(10));

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
    fn oversized_spec_is_refused() {
        assert!(to_json(&"x".repeat(JSON_BYTES_MAX)).is_err());
    }
}
