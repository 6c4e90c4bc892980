//! What a pod's containers share, and the one that stands for them all.

use std::sync::Arc;

use husk_protocol::messages;
use husk_protocol::service::AgentClient;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use super::pause::Pause;
use super::{ContainerRequest, LAUNCH_CALL_DEADLINE};
use crate::agent::context;
use crate::spec::{GuestSpec, guest_spec};
use crate::{ContainerError, Sandbox};

impl Sandbox {
    /// Makes the container that stands for the pod: its kernel parameters are the guest's, and that
    /// is all there is of it.
    pub(super) async fn create_pause(
        &self,
        request: ContainerRequest,
    ) -> Result<(), ContainerError> {
        let ContainerRequest { id, spec, .. } = request;
        let linux = spec.linux().as_ref();
        let sysctls = linux.and_then(|linux| linux.sysctl().clone());
        guest_spec(spec, &id, Some(self.vmm_pid()), &mut self.memory_volumes())?;
        let mut prepare = messages::PreparePodRequest::new();
        prepare.sysctls = sysctls.unwrap_or_default();
        if !prepare.sysctls.is_empty() {
            self.prepare_pod(prepare).await?;
        }
        self.containers().set_pause(Arc::new(Pause::new(&id)));
        Ok(())
    }

    /// Makes what the container shares with others of the pod.
    pub(super) async fn join_pod(&self, guest: &mut GuestSpec) -> Result<(), ContainerError> {
        let pids = match guest.joins_pids {
            true => Some(self.containers().pids_to_join()?),
            false => None,
        };
        let mut prepare = messages::PreparePodRequest::new();
        prepare.volumes.clone_from(&guest.memory_volumes);
        prepare.shares_pids = pids == Some(None);
        let mut pid = pids.flatten();
        if prepare.shares_pids || !prepare.volumes.is_empty() {
            let pause_pid = self.prepare_pod(prepare).await?;
            pid = pid.or(pids.map(|_| pause_pid));
        }
        if let (Some(pid), Some(linux)) = (pid, guest.spec.linux_mut()) {
            let mut joined = LinuxNamespace::default();
            joined.set_typ(LinuxNamespaceType::Pid);
            joined.set_path(Some(format!("/proc/{pid}/ns/pid").into()));
            let namespaces = linux.namespaces_mut().get_or_insert_default();
            namespaces.push(joined);
        }
        Ok(())
    }

    async fn prepare_pod(
        &self,
        request: messages::PreparePodRequest,
    ) -> Result<u32, ContainerError> {
        let prepare =
            |client: AgentClient| async move { client.prepare_pod(context(), &request).await };
        let deadline = Some(LAUNCH_CALL_DEADLINE);
        let prepared = self.agent.call(&self.vmm, "prepare pod", deadline, prepare);
        let response = prepared.await?;
        Ok(response.pause_pid)
    }

    /// The container that stands for the pod, if that is it.
    pub(super) fn pod_pause(&self, container: &str) -> Option<Arc<Pause>> {
        self.containers().pause(container)
    }
}
