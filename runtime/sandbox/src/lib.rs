//! One pod: its VMM process, shared directory, agent client, containers.
//!
//! [`Sandbox::start`] makes the pod's directory under `/run/husk`, spawns `husk-vmm`, boots the
//! guest and shakes hands with its agent. Containers and processes are then made through the
//! sandbox. [`Sandbox::shutdown`] undoes everything; [`cleanup()`] does the same from a fresh process
//! that knows nothing but the pod's name, after whatever was killed at whatever moment.
//!
//! Trust: the VMM process and everything behind it belongs to the guest. What it says is checked for
//! form and length, every wait for it but the one for a process's exit has a deadline, and its death
//! ends every pending call with [`ContainerError::VmGone`].
//!
//! Everything asynchronous must be called within a tokio runtime with I/O and time enabled; one
//! thread is enough.

#![forbid(unsafe_code)]

mod agent;
mod cgroup;
mod changes;
mod cleanup;
mod clock;
mod container;
mod control;
mod disks;
mod error;
mod hooks;
mod loopback;
mod machine_memory;
mod mounts;
mod namespaces;
mod netns;
mod network;
mod oom_score;
mod pod;
mod policy;
mod process;
mod readiness;
mod remove;
mod sandbox;
mod settings;
mod spec;
mod spec_json;
mod state;
mod timings;
mod vmm;
mod volumes;

pub use changes::ChangesTold;
pub use cleanup::{cleanup, cleanup_container, sandboxes};
pub use container::{ContainerRequest, Drained, Exit, ListedProcess, ProcessIo, RootfsMount};
pub use disks::{DiskError, Number as DiskNumber};
pub use error::{CleanupError, ContainerError, ErrorKind, StartError, VmEnd};
pub use hooks::{HookError, HookName};
pub use husk_netlink::{Counters as NetworkCounters, Passed};
pub use husk_vmm_control::monotonic_us;
pub use loopback::Loopback;
pub use mounts::MountError;
pub use network::NetworkError;
pub use oci_spec::runtime as oci;
pub use pod::{MemoryGrowth, PodRequest, Role};
pub use sandbox::{GuestInfo, Sandbox, SandboxConfig};
pub use settings::{
    Install, InstallError, LogSettings, NetworkSettings, SETTINGS_PATH, Settings, SettingsError,
    VmSettings, VolumeSettings,
};
pub use spec::{SpecError, check as check_spec};
pub use spec_json::{parse_process, parse_spec};
pub use timings::StartTimings;

/// Where the pods' directories are: `STATE_DIR_ROOT/<namespace>/<pod>`.
pub const STATE_DIR_ROOT: &str = "/run/husk";
