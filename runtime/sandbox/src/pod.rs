//! What CRI says of a pod in the specs of its containers, and what follows for the host.

use std::path::{Component, Path, PathBuf};

use husk_vmm_control::{MEMORY_MIB_MAX, MEMORY_MIB_MIN, VCPUS_MAX};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxNamespaceType, LinuxResources, Spec};

use crate::cgroup::CGROUP_ROOT;
use crate::spec::{self, SpecError};
use crate::{RootfsMount, VmSettings, namespaces};

/// A container's part in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is a pod of its own.
    Alone,
    /// It stands for the pod: no program of it is run, as there is nothing for one to do.
    Sandbox,
    /// One of the pod's own.
    Member,
}

/// What a pod asks of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRequest {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory of the virtual machine.
    pub memory_mib: u32,
    /// How it grows.
    pub memory_growth: MemoryGrowth,
    /// Slots for block devices of the host.
    pub disk_slots: usize,
    /// The cgroup v2 directory of the pod, if the caller has one for it.
    pub cgroup: Option<PathBuf>,
}

/// How a virtual machine's memory follows the limits of its containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryGrowth {
    /// Most that it may have, in MiB; no more than it starts with: it stays as it is.
    pub max_mib: u32,
    /// What its guest needs for itself, in MiB.
    pub overhead_mib: u32,
}

impl MemoryGrowth {
    fn of(settings: &VmSettings) -> Self {
        let host = || host_memory_mib().min(MEMORY_MIB_MAX);
        Self {
            max_mib: settings.memory_max_mib.unwrap_or_else(host),
            overhead_mib: settings.overhead_mib,
        }
    }
}

impl Role {
    /// As the annotations have it that CRI's servers write.
    pub fn of(spec: &Spec) -> Self {
        let kind = CONTAINER_TYPE
            .iter()
            .find_map(|name| annotation(spec, name));
        match kind {
            Some("sandbox") => Self::Sandbox,
            Some("container") => Self::Member,
            _ => Self::Alone,
        }
    }
}

impl PodRequest {
    /// Reads the spec of a pod's first container, and the mounts of its root.
    ///
    /// # Errors
    /// [`SpecError`] for what no pod can be given: found before anything is made.
    pub fn of(
        spec: &Spec,
        rootfs: &[RootfsMount],
        settings: &VmSettings,
    ) -> Result<Self, SpecError> {
        let disks = spec::check(spec, rootfs)?;
        let is_pod = Role::of(spec) == Role::Sandbox;
        if is_pod && namespaces::has(spec, LinuxNamespaceType::User) {
            return Err(SpecError::Unsupported {
                what: "linux.namespaces, user".to_owned(),
                reason: "a pod's containers can't share a user namespace (hostUsers: false)",
            });
        }
        Ok(Self {
            vcpus: vcpus(spec, settings)?,
            memory_mib: memory_mib(spec, settings)?,
            memory_growth: MemoryGrowth::of(settings),
            // What a pod's containers ask for, nobody knows yet.
            disk_slots: match is_pod {
                true => settings.spare_disks.into(),
                false => disks,
            },
            cgroup: if is_pod { cgroup_parent(spec)? } else { None },
        })
    }
}

/// The pod's limit, rounded up to whole CPUs, of which there are no more than the host has. A
/// container that is a pod of its own has at least the default, as its limit holds in the guest.
fn vcpus(spec: &Spec, settings: &VmSettings) -> Result<u8, SpecError> {
    let (quota, period, least) = match Role::of(spec) {
        Role::Alone => {
            let cpu = resources(spec).and_then(|all| all.cpu().as_ref());
            let quota = cpu.and_then(LinuxCpu::quota);
            let period = cpu.and_then(LinuxCpu::period).unwrap_or(DEFAULT_PERIOD);
            (quota, i64::try_from(period).ok(), settings.vcpus)
        }
        Role::Sandbox | Role::Member => (
            number(spec, SANDBOX_CPU_QUOTA)?,
            number(spec, SANDBOX_CPU_PERIOD)?,
            1,
        ),
    };
    let quota = quota.filter(|quota| *quota > 0);
    let (Some(quota), Some(period)) = (quota, period.filter(|period| *period > 0)) else {
        return Ok(settings.vcpus);
    };
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let most = u64::from(VCPUS_MAX).min(u64::try_from(host).unwrap_or(u64::MAX));
    let wanted = quota.unsigned_abs().div_ceil(period.unsigned_abs());
    let wanted = u8::try_from(wanted.clamp(1, most)).unwrap_or(VCPUS_MAX);
    Ok(wanted.max(least))
}

/// The pod's limit, and what the guest needs for itself. For a container that is a pod of its own, which
/// may be limited to more than there is, no more than the host has, and no less than the default.
fn memory_mib(spec: &Spec, settings: &VmSettings) -> Result<u32, SpecError> {
    let default = settings.memory_mib;
    if Role::of(spec) == Role::Alone {
        let memory = resources(spec).and_then(|all| all.memory().as_ref());
        return Ok(match memory.and_then(LinuxMemory::limit) {
            Some(limit) if limit > 0 => {
                let most = host_memory_mib().min(MEMORY_MIB_MAX).max(default);
                let wanted = with_overhead(limit, settings.overhead_mib);
                wanted.map_or(most, |wanted| wanted.clamp(default, most))
            }
            _ => default,
        });
    }
    let Some(limit) = number(spec, SANDBOX_MEMORY)?.filter(|limit| *limit > 0) else {
        return Ok(default);
    };
    match with_overhead(limit, settings.overhead_mib) {
        Some(wanted) if wanted <= MEMORY_MIB_MAX => Ok(wanted.max(MEMORY_MIB_MIN)),
        _ => Err(SpecError::Unsupported {
            what: format!("annotation {SANDBOX_MEMORY}: {limit} bytes"),
            reason: "a virtual machine can't have so much memory",
        }),
    }
}

/// A positive limit in bytes, in MiB and with what the guest needs for itself; none if no number of MiB
/// is as high.
pub(crate) fn with_overhead(limit: i64, overhead_mib: u32) -> Option<u32> {
    let limit = limit.unsigned_abs().div_ceil(MIB);
    u32::try_from(limit.saturating_add(overhead_mib.into())).ok()
}

/// The host's memory (sysinfo(2)).
fn host_memory_mib() -> u32 {
    let info = rustix::system::sysinfo();
    let bytes = u64::from(info.mem_unit).saturating_mul(info.totalram);
    u32::try_from(bytes / MIB).unwrap_or(u32::MAX)
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// The cgroup in which the pod's containers have theirs: what is above `linux.cgroupsPath`. That is
/// a path below the root of cgroups, or `slice:prefix:name` where systemd makes them.
fn cgroup_parent(spec: &Spec) -> Result<Option<PathBuf>, SpecError> {
    let path = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref());
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(None);
    };
    let refuse = |reason| {
        Err(SpecError::Unsupported {
            what: format!("linux.cgroupsPath: {path:?}"),
            reason,
        })
    };
    let Some(text) = path.to_str() else {
        return refuse("it is not UTF-8");
    };
    let parent = match text.split(':').collect::<Vec<_>>().as_slice() {
        [slice, _, _] => match slice_path(slice) {
            Some(parent) => parent,
            None => return refuse("it does not begin with the name of a slice"),
        },
        [_] => match path.parent() {
            Some(parent) => parent.to_owned(),
            None => return refuse("it has no parent"),
        },
        _ => return refuse("it is neither a path nor slice:prefix:name"),
    };
    if parent.components().any(|part| part == Component::ParentDir) {
        return refuse("it must not lead upwards");
    }
    let below = parent.strip_prefix("/").unwrap_or(&parent);
    Ok((!below.as_os_str().is_empty()).then(|| Path::new(CGROUP_ROOT).join(below)))
}

/// `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let is_name = !name.contains('/') && name.split('-').all(|part| !part.is_empty());
    if !is_name {
        return None;
    }
    let ends = name
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([name.len()]);
    let slices = ends.filter_map(|end| name.get(..end));
    Some(slices.map(|slice| format!("{slice}.slice")).collect())
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    Some(spec.annotations().as_ref()?.get(name)?.as_str())
}

fn number(spec: &Spec, name: &str) -> Result<Option<i64>, SpecError> {
    let Some(text) = annotation(spec, name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(SpecError::Unsupported {
            what: format!("annotation {name}: {text:?}"),
            reason: "it is not a number",
        }),
    }
}

/// containerd's name, and CRI-O's.
const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// In bytes.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The kernel's, in microseconds, where a quota comes without one.
const DEFAULT_PERIOD: u64 = 100_000;

const MIB: u64 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(annotations: &Value, cgroups_path: &str) -> Spec {
        serde_json::from_value(spec_json(annotations, cgroups_path)).unwrap()
    }

    fn spec_json(annotations: &Value, cgroups_path: &str) -> Value {
        json!({
            "ociVersion": "1.1.0",
            "annotations": annotations,
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "linux": {
                "cgroupsPath": cgroups_path,
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                    { "type": "network", "path": "/run/netns/x" },
                ],
            },
        })
    }

    /// A pod of CRI's.
    fn request(annotations: &Value) -> Result<PodRequest, SpecError> {
        let mut annotations = annotations.clone();
        annotations[CONTAINER_TYPE[0]] = "sandbox".into();
        PodRequest::of(&spec(&annotations, ""), &[], &VmSettings::default())
    }

    /// A container alone, with resources of its own.
    fn alone(resources: &Value) -> PodRequest {
        let mut spec = spec_json(&json!({}), "");
        spec["linux"]["resources"] = resources.clone();
        let spec = serde_json::from_value(spec).unwrap();
        PodRequest::of(&spec, &[], &VmSettings::default()).unwrap()
    }

    #[test]
    fn limit_of_a_container_alone_fits_in_its_machine() {
        let VmSettings {
            vcpus,
            memory_mib,
            overhead_mib,
            ..
        } = VmSettings::default();
        let of_memory = |limit: i64| alone(&json!({ "memory": { "limit": limit } })).memory_mib;
        for limit in [-1, 0, 1, 32 << 20] {
            assert_eq!(of_memory(limit), memory_mib, "{limit}");
        }
        assert_eq!(of_memory(300 << 20), 300 + overhead_mib);
        let most = host_memory_mib();
        assert!(most > 300 + overhead_mib, "this host is too small");
        for limit in [1 << 50, i64::MAX] {
            assert_eq!(of_memory(limit), most.min(MEMORY_MIB_MAX), "{limit}");
        }
        assert_eq!(alone(&json!({})).memory_mib, memory_mib);

        let host = std::thread::available_parallelism().unwrap().get();
        let of_cpu = |cpu: Value| usize::from(alone(&json!({ "cpu": cpu })).vcpus);
        assert_eq!(of_cpu(json!({ "quota": 1000 })), usize::from(vcpus));
        assert_eq!(of_cpu(json!({ "quota": -1 })), usize::from(vcpus));
        assert_eq!(of_cpu(json!({ "quota": 150_000 })), host.min(2));
        assert_eq!(of_cpu(json!({ "quota": 20, "period": 10 })), host.min(2));
    }

    #[test]
    fn limits_that_are_no_numbers_are_refused_by_name() {
        for name in [SANDBOX_CPU_QUOTA, SANDBOX_CPU_PERIOD, SANDBOX_MEMORY] {
            let refused = request(&json!({ name: "much" })).unwrap_err().to_string();
            assert!(
                refused.contains(name) && refused.contains("much"),
                "{refused}"
            );
        }
        let refused = request(&json!({ SANDBOX_MEMORY: i64::MAX.to_string() })).unwrap_err();
        assert!(refused.to_string().contains("so much memory"), "{refused}");
    }

    #[test]
    fn cgroups_that_lead_elsewhere_are_refused() {
        for path in [
            "/../x/y",
            "a:b",
            "a:b:c:d",
            "x.slice/..:b:c",
            "x:b:c",
            "--.slice:b:c",
        ] {
            assert!(cgroup_parent(&spec(&json!({}), path)).is_err(), "{path}");
        }
    }

    #[test]
    fn pod_without_limits_has_the_defaults() {
        let settings = VmSettings::default();
        for value in [
            json!({}),
            json!({ SANDBOX_MEMORY: "0", SANDBOX_CPU_QUOTA: "-1" }),
        ] {
            let request = request(&value).unwrap();
            assert_eq!(request.vcpus, settings.vcpus);
            assert_eq!(request.memory_mib, settings.memory_mib);
        }
    }

    #[test]
    fn pod_has_slots_for_disks_and_a_container_what_it_needs() {
        let spare = VmSettings::default().spare_disks;
        assert_eq!(request(&json!({})).unwrap().disk_slots, usize::from(spare));
        assert_eq!(alone(&json!({})).disk_slots, 0);
    }

    #[test]
    fn root_in_a_file_takes_a_slot_of_a_container_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let slots = |annotations: &Value, fstype: &str| {
            let root = RootfsMount {
                fstype: fstype.to_owned(),
                source: file.path().display().to_string(),
                ..RootfsMount::default()
            };
            let settings = VmSettings::default();
            PodRequest::of(&spec(annotations, ""), &[root], &settings).map(|pod| pod.disk_slots)
        };
        assert_eq!(slots(&json!({}), "ext4"), Ok(1));
        assert_eq!(slots(&json!({}), "overlay"), Ok(0));
        let of_a_pod = json!({ CONTAINER_TYPE[0]: "sandbox" });
        let spare = VmSettings::default().spare_disks;
        assert_eq!(slots(&of_a_pod, "ext4"), Ok(spare.into()));

        file.as_file().set_len(0).unwrap();
        let text = slots(&json!({}), "ext4").unwrap_err().to_string();
        assert!(text.contains("it is empty"), "{text}");
        // Its root is never mounted.
        assert_eq!(slots(&of_a_pod, "ext4"), Ok(spare.into()));
    }

    #[test]
    fn memory_is_the_limit_and_the_overhead() {
        let bytes = (100 * MIB + 1).to_string();
        let request = request(&json!({ SANDBOX_MEMORY: bytes })).unwrap();
        let overhead = VmSettings::default().overhead_mib;
        assert_eq!(request.memory_mib, 101 + overhead);
    }

    #[test]
    fn cpus_are_whole_and_no_more_than_the_host_has() {
        for (quota, most) in [
            ("1", 1),
            ("50000", 1),
            ("100001", 2),
            ("99999999999", u8::MAX),
        ] {
            let limits = json!({ SANDBOX_CPU_QUOTA: quota, SANDBOX_CPU_PERIOD: "100000" });
            let vcpus = request(&limits).unwrap().vcpus;
            assert!((1..=most).contains(&vcpus), "{quota}: {vcpus}");
        }
    }

    #[test]
    fn parents_of_both_cgroup_drivers_are_found() {
        for (path, parent) in [
            ("/kubepods/pod1/c1", "/sys/fs/cgroup/kubepods/pod1"),
            (
                "a-b-c.slice:cri-containerd:c1",
                "/sys/fs/cgroup/a.slice/a-b.slice/a-b-c.slice",
            ),
        ] {
            let found = cgroup_parent(&spec(&json!({}), path)).unwrap();
            assert_eq!(found.as_deref(), Some(Path::new(parent)));
        }
        for path in ["", "/c1", "-.slice:x:c1"] {
            assert_eq!(
                cgroup_parent(&spec(&json!({}), path)).unwrap(),
                None,
                "{path}"
            );
        }
    }

    #[test]
    fn roles_are_as_annotated() {
        let role = |name: &str, value: &str| Role::of(&spec(&json!({ name: value }), ""));
        assert_eq!(
            role("io.kubernetes.cri.container-type", "sandbox"),
            Role::Sandbox
        );
        assert_eq!(
            role("io.kubernetes.cri-o.ContainerType", "container"),
            Role::Member
        );
        assert_eq!(role("io.kubernetes.cri.container-type", "x"), Role::Alone);
    }
}
