//! What the Task service needs of a pod: the sandbox, or a stand-in in tests.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use husk_sandbox::NetworkCounters;
use oci_spec::runtime::{LinuxResources, Spec};

use crate::stdio::Ends;

/// One mount of a container's root, as containerd asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootMount {
    pub(crate) fstype: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) options: Vec<String>,
}

/// A container to make.
#[derive(Debug)]
pub(crate) struct NewContainer {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) spec: Spec,
    pub(crate) rootfs: Vec<RootMount>,
    pub(crate) terminal: bool,
    pub(crate) ends: Ends,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255, or 128 + signal.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// A process of the guest, and whether it is one of those that containerd started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestProcess {
    pub(crate) pid: u32,
    pub(crate) exec_id: Option<String>,
}

/// What went wrong, in the terms that containerd's clients know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(crate) struct PodError {
    pub(crate) code: ttrpc::Code,
    pub(crate) text: String,
}

impl PodError {
    pub(crate) fn new(code: ttrpc::Code, text: impl std::fmt::Display) -> Self {
        Self {
            code,
            text: text.to_string(),
        }
    }
}

/// One pod. A process is named by its container and its exec id, which is empty for init.
#[async_trait]
pub(crate) trait Pod: Send + Sync {
    /// A process on the host that stands for the pod: containerd reports its pid.
    fn host_pid(&self) -> u32;

    async fn create_container(&self, new: NewContainer) -> Result<(), PodError>;
    /// Registers an exec; `process` is the specification's process as JSON.
    async fn create_process(
        &self,
        container: &str,
        exec: &str,
        process: Vec<u8>,
        terminal: bool,
        ends: Ends,
    ) -> Result<(), PodError>;
    async fn start_process(&self, container: &str, exec: &str) -> Result<(), PodError>;
    /// Answers at the exit. A pod that is gone is an exit with 137.
    async fn wait_process(&self, container: &str, exec: &str) -> Exit;
    async fn signal_process(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PodError>;
    async fn resize_terminal(
        &self,
        container: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), PodError>;
    async fn processes(&self, container: &str) -> Result<Vec<GuestProcess>, PodError>;
    async fn pause(&self, container: &str) -> Result<(), PodError>;
    async fn resume(&self, container: &str) -> Result<(), PodError>;
    /// Changes a container's limits.
    async fn update(&self, container: &str, resources: &LinuxResources) -> Result<(), PodError>;
    /// The files of the container's cgroup that hold figures, by name.
    async fn stats(&self, container: &str) -> Result<HashMap<String, String>, PodError>;
    /// What has passed through each of the pod's interfaces.
    async fn network_counters(&self) -> Result<Vec<NetworkCounters>, PodError>;
    /// Answers when the container has had more OOM kills than `seen`, with their number; an error
    /// when it ends, or the pod.
    async fn out_of_memory(&self, container: &str, seen: u64) -> Result<u64, PodError>;
    /// Returns when every byte of the process's output is where it belongs, or a bound is over.
    async fn output_drained(&self, container: &str, exec: &str);
    async fn delete_process(&self, container: &str, exec: &str) -> Result<(), PodError>;
    async fn delete_container(&self, container: &str) -> Result<(), PodError>;
    /// Ends the virtual machine and removes all that belongs to the pod.
    async fn shutdown(&self);
}

/// Makes the pod when its first container is created.
#[async_trait]
pub(crate) trait PodMaker: Send + Sync {
    type Pod: Pod + 'static;

    async fn make(&self, first: &NewContainer) -> Result<Self::Pod, PodError>;
}
