//! The parts of the OCI runtime specification (config.json) that a guest acts on.
//!
//! Our own types, because the agent is copied into memory at every boot and a full model of the
//! specification weighs more than the rest of it. Members that mean nothing in a guest are not
//! named here and therefore ignored; the host has already refused what must not be ignored.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// config.json.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// The version of the specification.
    pub oci_version: String,
    /// The process that the container is made for.
    pub process: Process,
    /// The container's root file system.
    pub root: Root,
    /// Hostname in the container's UTS namespace; empty leaves it.
    pub hostname: String,
    /// NIS domain name in the container's UTS namespace; empty leaves it.
    pub domainname: String,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// All that only Linux knows.
    pub linux: Linux,
    /// What the container's owner wants to be known of it.
    pub annotations: BTreeMap<String, String>,
    /// Programs to be run at moments of its life.
    pub hooks: Hooks,
}

/// The hooks that run in the container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// Before the process becomes its program.
    pub start_container: Vec<husk_hook::Hook>,
}

/// A process to be run in a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Whether it gets a pseudo terminal.
    pub terminal: bool,
    /// The terminal's first size.
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: PathBuf,
    /// Capability sets; absent: none at all.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Whether gaining privileges by execve is ruled out.
    pub no_new_privileges: bool,
    /// Written to /proc/self/oom_score_adj.
    pub oom_score_adj: Option<i32>,
    /// How it is scheduled.
    pub scheduler: Option<Scheduler>,
    /// How its reads and writes are ordered.
    pub io_priority: Option<IoPriority>,
    /// Where a process that enters a container runs.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,
}

impl Process {
    /// What a process that enters a container takes over from its init where it says nothing.
    pub fn inherit(&mut self, init: &Process) {
        if self.capabilities.is_none() {
            self.capabilities.clone_from(&init.capabilities);
        }
        if self.rlimits.is_empty() {
            self.rlimits.clone_from(&init.rlimits);
        }
        self.oom_score_adj = self.oom_score_adj.or(init.oom_score_adj);
        if self.scheduler.is_none() {
            self.scheduler.clone_from(&init.scheduler);
        }
        if self.io_priority.is_none() {
            self.io_priority.clone_from(&init.io_priority);
        }
        if self.exec_cpu_affinity.is_none() {
            self.exec_cpu_affinity.clone_from(&init.exec_cpu_affinity);
        }
    }
}

/// How a process is scheduled (sched_setattr(2)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Scheduler {
    /// Name like `SCHED_OTHER`.
    pub policy: String,
    /// Nice value.
    pub nice: i32,
    /// Static priority of the real-time policies.
    pub priority: i32,
    /// Names like `SCHED_FLAG_RESET_ON_FORK`.
    pub flags: Vec<String>,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub runtime: u64,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub deadline: u64,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub period: u64,
}

/// How a process's reads and writes are ordered (ioprio_set(2)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IoPriority {
    /// Name like `IOPRIO_CLASS_BE`.
    pub class: String,
    /// Within the class; 0 is the highest.
    pub priority: i32,
}

/// CPUs, as lists like `0-3,7`; an empty one changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuAffinity {
    /// Before the process is in the container's cgroup.
    pub initial: String,
    /// From then on.
    #[serde(rename = "final")]
    pub last: String,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// User and groups, by number only: names are resolved before the spec is made.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
}

/// The five sets, each a list of names like `CAP_CHOWN`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Capabilities {
    /// Limit for what execve may give.
    pub bounding: Vec<String>,
    /// In force.
    pub effective: Vec<String>,
    /// Kept over execve where the file allows it.
    pub inheritable: Vec<String>,
    /// May be put in force.
    pub permitted: Vec<String>,
    /// Kept over execve of any file.
    pub ambient: Vec<String>,
}

/// One resource limit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rlimit {
    /// Name like `RLIMIT_NOFILE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Limit in force; `u64::MAX` is none.
    pub soft: u64,
    /// What the soft limit may be raised to.
    pub hard: u64,
}

/// The container's root.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Root {
    /// Absolute path in the guest.
    pub path: PathBuf,
    /// Whether the root is made read-only.
    pub readonly: bool,
}

/// One mount in the container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Where, absolute in the container.
    pub destination: PathBuf,
    /// File system type; `bind` or empty where an option says bind.
    #[serde(rename = "type")]
    pub kind: String,
    /// Device, or the path that is bound.
    pub source: PathBuf,
    /// Flags by name, the rest is for the file system.
    pub options: Vec<String>,
    /// User ids of a mount with mapped ids.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of a mount with mapped ids.
    pub gid_mappings: Vec<IdMapping>,
}

/// The `linux` member.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// User ids of a new user namespace.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of a new user namespace.
    pub gid_mappings: Vec<IdMapping>,
    /// Kernel parameters, dots or slashes.
    pub sysctl: BTreeMap<String, String>,
    /// Limits.
    pub resources: Option<Resources>,
    /// Namespaces to make or to join.
    pub namespaces: Vec<Namespace>,
    /// Device nodes beyond the usual ones.
    pub devices: Vec<Device>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount: private, slave, shared, unbindable, with r in front or not.
    pub rootfs_propagation: String,
    /// Paths that are hidden.
    pub masked_paths: Vec<PathBuf>,
    /// Paths that are made read-only.
    pub readonly_paths: Vec<PathBuf>,
    /// Execution domain.
    pub personality: Option<Personality>,
    /// Offsets of a new time namespace, by clock.
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

/// How far a clock of a time namespace is ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TimeOffset {
    /// Seconds.
    pub secs: i64,
    /// And nanoseconds.
    pub nanosecs: u32,
}

/// One line of uid_map or gid_map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

impl IdMapping {
    /// As uid_map and gid_map take them.
    pub fn lines(mappings: &[IdMapping]) -> String {
        let line = |m: &IdMapping| format!("{} {} {}\n", m.container_id, m.host_id, m.size);
        mappings.iter().map(line).collect()
    }
}

/// A namespace to make, or with a path, to join.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Namespace {
    /// Which.
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// What to join; absent or empty: a new one.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

/// Kind of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say all")]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

/// A device node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// `c`, `u`, `b` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where, absolute in the container.
    pub path: PathBuf,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Permissions.
    pub file_mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// Execution domain.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// Names of flags, of which none is defined.
    #[serde(default)]
    pub flags: Vec<String>,
}

/// Limits of a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Which devices may be used.
    pub devices: Vec<DeviceRule>,
    /// Memory.
    pub memory: Option<Memory>,
    /// CPU time.
    pub cpu: Option<Cpu>,
    /// Number of tasks.
    pub pids: Option<Pids>,
    /// Block I/O.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// Huge pages, by size.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// RDMA resources, by device.
    pub rdma: BTreeMap<String, Rdma>,
    /// Files of the cgroup, written as they are.
    pub unified: BTreeMap<String, String>,
}

/// One rule of the device list; later rules win.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceRule {
    /// Whether the access is allowed or denied.
    pub allow: bool,
    /// `a`, `c` or `b`; absent is `a`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Major number; absent or -1 is any.
    pub major: Option<i64>,
    /// Minor number; absent or -1 is any.
    pub minor: Option<i64>,
    /// Some of `rwm`.
    pub access: Option<String>,
}

impl DeviceRule {
    /// Whether it is about every use of every device.
    pub fn is_for_all(&self) -> bool {
        let is_any = |number: Option<i64>| matches!(number, None | Some(-1));
        let access = self.access.as_deref().unwrap_or("rwm");
        matches!(self.kind.as_deref(), None | Some("a" | ""))
            && is_any(self.major)
            && is_any(self.minor)
            && "rwm".chars().all(|letter| access.contains(letter))
    }
}

/// Memory limits in bytes; -1 is none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// Soft limit.
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
    /// Whether a limit below what is in use is refused.
    pub check_before_update: bool,
}

/// CPU limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// Relative weight, 2 to 262144, 1024 is the usual one.
    pub shares: Option<u64>,
    /// Microseconds per period; not above zero: no limit.
    pub quota: Option<i64>,
    /// Microseconds that a quota may be exceeded by.
    pub burst: Option<u64>,
    /// Length of a period in microseconds.
    pub period: Option<u64>,
    /// CPUs that may be used.
    pub cpus: String,
    /// Memory nodes that may be used.
    pub mems: String,
    /// 1: idle scheduling.
    pub idle: Option<i64>,
}

/// Limit of tasks; -1: none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pids {
    /// How many.
    pub limit: i64,
}

/// Block I/O limits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    /// Relative weight, 10 to 1000.
    pub weight: Option<u16>,
    /// Bytes per second, reading.
    pub throttle_read_bps_device: Vec<Throttle>,
    /// Bytes per second, writing.
    pub throttle_write_bps_device: Vec<Throttle>,
    /// Operations per second, reading.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<Throttle>,
    /// Operations per second, writing.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<Throttle>,
}

/// Limit of one block device.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Throttle {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The limit.
    pub rate: u64,
}

/// Limit of one size of huge pages.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    /// `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// Limit of one RDMA device.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rdma {
    /// Handles.
    pub hca_handles: Option<u32>,
    /// Objects.
    pub hca_objects: Option<u32>,
}

/// A system call filter.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// What happens to a call that no rule names.
    pub default_action: String,
    /// The errno of a default action that has one.
    pub default_errno_ret: Option<u32>,
    /// Names like `SCMP_ARCH_X86_64`.
    pub architectures: Vec<String>,
    /// Names like `SECCOMP_FILTER_FLAG_LOG`; absent is not the same as none.
    pub flags: Option<Vec<String>>,
    /// The rules.
    pub syscalls: Vec<SeccompRule>,
}

/// One rule of a system call filter.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeccompRule {
    /// System calls by name; those that this kernel does not have are passed over.
    pub names: Vec<String>,
    /// What happens to them.
    pub action: String,
    /// The errno of an action that has one.
    pub errno_ret: Option<u32>,
    /// Conditions, all of which must hold.
    pub args: Vec<SeccompArg>,
}

/// A condition on one argument of a system call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompArg {
    /// Which argument, 0 to 5.
    pub index: u32,
    /// What it is compared with.
    pub value: u64,
    /// The masked value, for `SCMP_CMP_MASKED_EQ`.
    #[serde(default)]
    pub value_two: u64,
    /// Name like `SCMP_CMP_EQ`.
    pub op: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_that_is_not_an_object_is_refused() {
        assert!(serde_json::from_str::<Spec>("[1]").is_err());
        assert!(serde_json::from_str::<Spec>(r#"{"process":{"args":"sh"}}"#).is_err());
        assert!(serde_json::from_str::<Spec>(r#"{"process":{"user":{"uid":-1}}}"#).is_err());
    }

    #[test]
    fn unknown_namespace_is_refused() {
        let text = r#"{"linux":{"namespaces":[{"type":"flavour"}]}}"#;
        assert!(serde_json::from_str::<Spec>(text).is_err());
    }

    #[test]
    fn members_with_odd_spelling_are_found() {
        let text = r#"{"linux":{"uidMappings":[{"containerID":0,"hostID":5,"size":1}],
            "resources":{"blockIO":{"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":7}]}}}}"#;
        let spec: Spec = serde_json::from_str(text).unwrap();
        assert_eq!(spec.linux.uid_mappings[0].host_id, 5);
        let io = spec.linux.resources.unwrap().block_io.unwrap();
        assert_eq!(io.throttle_read_iops_device[0].rate, 7);
    }
}
