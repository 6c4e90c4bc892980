//! The spec as the guest is to see it.
//!
//! The caller's spec is written for a process of the host. What it says about host paths is turned
//! into paths of the share; what only means something on the host is taken out; what a guest can't
//! give is refused, so that nobody believes to have it.

use std::path::{Component, Path, PathBuf};

use husk_protocol::DISK_FILE_SYSTEMS;
use husk_protocol::messages::MemoryVolume;
use husk_vmm_control::DISKS_MAX;
use nix::sys::statvfs::{FsFlags, statvfs};
use oci_spec::runtime::{Hooks, Linux, LinuxNamespaceType, Mount, Spec};

use crate::disks::{self, RootDisk, WantedDisk};
use crate::hooks::{Kind, Lifecycle};
use crate::mounts::Volume;
use crate::namespaces;
use crate::policy;
use crate::volumes::{self, MemoryVolumes};
use crate::{Role, RootfsMount};

/// Why a spec can't be served by a guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// A part that every container needs is missing.
    #[error("config.json: {0} is missing")]
    Missing(&'static str),
    /// A root that can be mounted neither in a guest nor on the host.
    #[error("the root file system {image:?}: {reason}")]
    Root {
        /// What it is on.
        image: PathBuf,
        /// Why it can't be mounted.
        reason: &'static str,
    },
    /// A part that can't work in a guest.
    #[error("config.json: {what}: {reason}")]
    Unsupported {
        /// The part, by its name in config.json.
        what: String,
        /// Why it can't work.
        reason: &'static str,
    },
}

/// A spec, taken apart into the guest's and the host's half.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    /// For the guest.
    pub(crate) spec: Spec,
    /// The root file system's directory, relative to the bundle; used where no mounts are given.
    pub(crate) root: PathBuf,
    /// What to bind at `mounts/<index>` of the container's directory in the share.
    pub(crate) volumes: Vec<Volume>,
    /// What of the pod's volumes in memory it mounts.
    pub(crate) memory_volumes: Vec<MemoryVolume>,
    /// The block devices of the host that it is given.
    pub(crate) disks: Vec<WantedDisk>,
    /// Whether its PID namespace is that of the pod or of a container in it. The spec for the guest
    /// names none then.
    pub(crate) joins_pids: bool,
}

impl GuestSpec {
    /// Has volumes keep what the host's mounts forbid, unless the spec allows it: set-user-id,
    /// programs and devices. The guest's mount is another one, and would not know.
    pub(crate) fn keep_flags(&mut self, bundle: &Path) {
        for mount in self.spec.mounts_mut().iter_mut().flatten() {
            let index = mount.source().as_deref().and_then(volume_index);
            let Some(volume) = index.and_then(|index| self.volumes.get(index)) else {
                continue;
            };
            let source = bundle.join(&volume.source);
            // What is not there is told of when it is mounted.
            let mut options = forbidden_at(&source).unwrap_or_default();
            options.extend(mount.options().clone().unwrap_or_default());
            mount.set_options(Some(options));
        }
    }
}

/// The number of the volume that a path in the guest is.
fn volume_index(path: &Path) -> Option<usize> {
    let in_container = path.strip_prefix(husk_protocol::SHARED_DIR).ok()?;
    let mut names = in_container.iter().skip(1);
    let is_volume = names.next()? == "mounts";
    let index = names.next()?.to_str()?.parse().ok()?;
    (is_volume && names.next().is_none()).then_some(index)
}

/// As mount options.
fn forbidden_at(path: &Path) -> Option<Vec<String>> {
    let flags = statvfs(path).ok()?.flags();
    let all = [
        (FsFlags::ST_NOSUID, "nosuid"),
        (FsFlags::ST_NOEXEC, "noexec"),
        (FsFlags::ST_NODEV, "nodev"),
    ];
    let set = all.into_iter().filter(|(flag, _)| flags.contains(*flag));
    Some(set.map(|(_, option)| option.to_owned()).collect())
}

/// Most volumes of one container.
const VOLUMES_MAX: usize = 1024;

/// Where the container's directory is in the guest.
fn guest_dir(container: &str) -> PathBuf {
    Path::new(husk_protocol::SHARED_DIR).join(container)
}

/// Refuses what no guest can give, before there is one. Answers with how many slots for disks
/// ([`SandboxConfig::disk_slots`](crate::SandboxConfig)) the container takes at most, its root among
/// them.
///
/// # Errors
/// [`SpecError`], as the container's creation would fail later.
pub fn check(spec: &Spec, rootfs: &[RootfsMount]) -> Result<usize, SpecError> {
    let hooks = Lifecycle::of(spec, "", Path::new(""))?;
    let guest = guest_spec(spec.clone(), "", None, &mut MemoryVolumes::new(""))?;
    for disk in &guest.disks {
        disk.check()?;
    }
    let root = match Role::of(spec) {
        // Its root is not mounted.
        Role::Sandbox => None,
        Role::Alone | Role::Member => RootDisk::of(rootfs, hooks.has(Kind::CreateContainer))?,
    };
    let wanted = guest.disks.len() + usize::from(root.is_some());
    Ok(wanted.min(DISKS_MAX))
}

/// Rewrites a spec for the guest. `pod` is the pid on the host of the process that stands for the
/// pod, if there is one yet; `memory` are its volumes in memory.
pub(crate) fn guest_spec(
    mut spec: Spec,
    container: &str,
    pod: Option<u32>,
    memory: &mut MemoryVolumes,
) -> Result<GuestSpec, SpecError> {
    namespaces::check_own(&spec)?;
    let guest_dir = guest_dir(container);
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or(SpecError::Missing("process"))?;
    policy::check_process(process)?;
    process.set_apparmor_profile(None).set_selinux_label(None);

    let root = spec.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    let host_root = root.path().clone();
    if host_root.as_os_str().is_empty() {
        return Err(SpecError::Missing("root.path"));
    }
    root.set_path(guest_dir.join("rootfs"));

    let mut volumes = Vec::new();
    let mut memory_volumes = Vec::new();
    let mut disks = Vec::new();
    // Who has the pod's IPC namespace has its shared memory.
    let joins_ipc = pod.is_some() && namespaces::joins(&spec, LinuxNamespaceType::Ipc);
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let destination = clean(mount.destination());
        mount.set_destination(destination);
        if joins_ipc && volumes::is_own_shm(mount) {
            let shm = volumes::pod_shm();
            volumes::bind(mount, &shm);
            memory_volumes.push(shm);
            continue;
        }
        if let Some(volume) = in_memory(mount, memory) {
            memory_volumes.push(volume);
            continue;
        }
        if rewrite_mount(mount, &guest_dir, &mut volumes)? == MountKind::Disk {
            disks.push(disks::of_mount(index, mount)?);
        }
    }
    let has_users = namespaces::has(&spec, LinuxNamespaceType::User);
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or(SpecError::Missing("linux"))?;
    disks.extend(disks::of_devices(linux)?);
    check_disks(&disks, has_users)?;
    let joins_pids = rewrite_linux(linux, container, pod)?;
    spec.set_hooks(spec.hooks().as_ref().and_then(guest_hooks));
    Ok(GuestSpec {
        spec,
        root: host_root,
        volumes,
        memory_volumes,
        disks,
        joins_pids,
    })
}

/// More than any machine has slots for are refused before there is one.
fn check_disks(disks: &[WantedDisk], has_users: bool) -> Result<(), SpecError> {
    let reason = match disks.len() {
        0 => return Ok(()),
        _ if has_users => "a container in a user namespace can't have block devices of the host",
        1..=DISKS_MAX => return Ok(()),
        _ => "no virtual machine has slots for so many block devices",
    };
    let what = disks.last().map(|disk| disk.what.clone());
    Err(SpecError::Unsupported {
        what: what.unwrap_or_default(),
        reason,
    })
}

/// The hooks that run in the container itself; the others are the host's programs.
fn guest_hooks(hooks: &Hooks) -> Option<Hooks> {
    let in_container = hooks.start_container().clone()?;
    let mut hooks = Hooks::default();
    hooks.set_start_container(Some(in_container));
    Some(hooks)
}

/// Turns a mount of what is a volume in memory into one of the guest's.
fn in_memory(mount: &mut Mount, memory: &mut MemoryVolumes) -> Option<MemoryVolume> {
    if mount.destination().is_relative() {
        return None;
    }
    let (volume, inside) = memory.find(mount.source().as_deref()?)?;
    let place = volumes::guest_path(&volume).join(inside);
    mount.set_source(Some(place));
    Some(volume)
}

/// Where what is mounted comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MountKind {
    /// The guest's kernel, or a volume.
    Own,
    /// A block device of the host.
    Disk,
}

fn rewrite_mount(
    mount: &mut Mount,
    guest_dir: &Path,
    volumes: &mut Vec<Volume>,
) -> Result<MountKind, SpecError> {
    let refuse = |reason| {
        Err(SpecError::Unsupported {
            what: format!("mount at {:?}", mount.destination()),
            reason,
        })
    };
    if mount.destination() == Path::new("/") {
        return refuse("it would hide the container's root");
    }
    let options = mount.options().clone().unwrap_or_default();
    let has = |option: &str| options.iter().any(|set| set == option);
    let is_mapped = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    if is_mapped || has("idmap") || has("ridmap") {
        return refuse("mounts with mapped ids are not supported");
    }
    if has("remount") {
        return refuse("the option remount is not supported: no mount is there before");
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    let is_bind = kind == "bind" || has("bind") || has("rbind");
    if !is_bind {
        if DISK_FILE_SYSTEMS.contains(&kind) {
            return Ok(MountKind::Disk);
        }
        return match GUEST_FILE_SYSTEMS.contains(&kind) {
            true => Ok(MountKind::Own),
            false => refuse(
                "a guest has no such file system, or it would look for its source in the guest; \
                 mount it on the host and bind it",
            ),
        };
    }
    if has("shared") || has("rshared") {
        return refuse("what is mounted in a guest can't appear on the host");
    }
    let Some(source) = mount.source().clone() else {
        return refuse("a bind mount needs a source");
    };
    if volumes.len() == VOLUMES_MAX {
        return refuse("too many bind mounts");
    }
    let guest_source = guest_dir.join("mounts").join(volumes.len().to_string());
    volumes.push(Volume {
        source,
        is_recursive: has("rbind"),
        is_slave: has("slave") || has("rslave"),
        // Kept on the host as well, where a guest can't undo it. The last one wins.
        is_read_only: options
            .iter()
            .rfind(|option| matches!(option.as_str(), "ro" | "rw" | "rro"))
            .is_some_and(|option| option != "rw"),
    });
    mount.set_source(Some(guest_source));
    Ok(MountKind::Own)
}

/// Those that a kernel fills by itself.
const GUEST_FILE_SYSTEMS: [&str; 17] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "proc",
    "ramfs",
    "securityfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// A destination from the root, as other runtimes read it: a relative one starts there as well, and
/// `..` leads no higher.
fn clean(destination: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in destination.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Answers whether the container joins a PID namespace.
fn rewrite_linux(linux: &mut Linux, container: &str, pod: Option<u32>) -> Result<bool, SpecError> {
    let refuse = |what: &str, reason| {
        Err(SpecError::Unsupported {
            what: what.to_owned(),
            reason,
        })
    };
    if linux.intel_rdt().is_some() {
        return refuse("linux.intelRdt", "a guest can't allocate the host's cache");
    }
    if linux.net_devices().as_ref().is_some_and(|d| !d.is_empty()) {
        return refuse(
            "linux.netDevices",
            "a guest can't take a device of the host",
        );
    }
    policy::check_linux(linux)?;
    linux.set_mount_label(None);
    linux.set_cgroups_path(Some(Path::new("/husk").join(container)));
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let sorted = namespaces::sort(namespaces, pod)?;
    linux.set_namespaces(Some(sorted.own));
    Ok(sorted.joins_pids)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/",
                         "apparmorProfile": "docker-default",
                         "selinuxLabel": "system_u:system_r:container_t:s0" },
            "root": { "path": "rootfs", "readonly": true },
            "hostname": "h",
            "hooks": { "prestart": [{ "path": "/bin/true" }] },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "rw"] },
                { "destination": "/b", "source": "b", "options": ["bind", "ro"] },
            ],
            "linux": {
                "cgroupsPath": "/default/x",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                    { "type": "network", "path": "/proc/self/ns/net" },
                ],
            },
        });
        change(&mut spec);
        serde_json::from_value(spec).unwrap()
    }

    fn rewritten(change: impl FnOnce(&mut Value)) -> Result<GuestSpec, SpecError> {
        let mut memory = MemoryVolumes::new("p1");
        guest_spec(spec(change), "c1", Some(std::process::id()), &mut memory)
    }

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        rewritten(change).unwrap_err().to_string()
    }

    fn remove(part: &'static str) -> impl FnOnce(&mut Value) {
        move |spec| {
            spec.as_object_mut().unwrap().remove(part);
        }
    }

    #[test]
    fn missing_parts_are_named() {
        for part in ["process", "root", "linux"] {
            assert!(refusal(remove(part)).contains(part), "{part}");
        }
    }

    #[test]
    fn namespaces_of_the_host_are_refused() {
        for (index, kind) in ["pid", "ipc", "uts", "mount"].into_iter().enumerate() {
            let text = refusal(|spec| {
                spec["linux"]["namespaces"][index]["path"] = json!("/proc/1/ns/x");
            });
            assert!(text.contains(kind), "{text}");
        }
    }

    #[test]
    fn missing_namespaces_are_refused() {
        for (index, kind) in ["pid", "ipc", "uts", "mount", "network"]
            .into_iter()
            .enumerate()
        {
            let text = refusal(|spec| {
                spec["linux"]["namespaces"]
                    .as_array_mut()
                    .unwrap()
                    .remove(index);
            });
            assert!(text.contains(kind), "{text}");
        }
    }

    #[test]
    fn what_a_guest_cannot_give_is_refused() {
        for (name, value) in [
            ("intelRdt", json!({ "closID": "x" })),
            ("netDevices", json!({ "eth0": { "name": "eth1" } })),
            (
                "seccomp",
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x" }),
            ),
        ] {
            let text = refusal(|spec| spec["linux"][name] = value);
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn mounts_that_cannot_be_are_refused() {
        for bad in [
            json!({ "destination": "/a", "type": "bind" }),
            json!({ "destination": "/a", "options": ["rbind"] }),
            json!({ "destination": "/a", "source": "/b", "options": ["bind", "idmap"] }),
            json!({ "destination": "/a/..", "type": "tmpfs" }),
            json!({ "destination": "/a", "type": "xfs", "source": "/dev/sda" }),
            json!({ "destination": "/a", "type": "ext4", "source": "disk" }),
            json!({ "destination": "/a", "type": "overlay", "options": ["lowerdir=/b:/c"] }),
            json!({ "destination": "/a" }),
            json!({ "destination": "/a", "type": "bind", "source": "/b", "options": ["rshared"] }),
        ] {
            assert!(
                rewritten(|spec| spec["mounts"][0] = bad.clone()).is_err(),
                "{bad}"
            );
        }
    }

    fn with_disks(change: impl FnOnce(&mut Value)) -> Result<GuestSpec, SpecError> {
        rewritten(|spec| {
            spec["linux"]["devices"] =
                json!([{ "type": "b", "path": "/dev/disk", "major": 8, "minor": 0 }]);
            spec["mounts"][0] =
                json!({ "destination": "/d", "type": "ext4", "source": "/dev/loop0" });
            change(spec);
        })
    }

    #[test]
    fn block_devices_in_a_user_namespace_are_refused() {
        let text = with_disks(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(json!({ "type": "user" }));
        });
        let text = text.unwrap_err().to_string();
        assert!(text.contains("/dev/disk"), "{text}");
    }

    #[test]
    fn more_block_devices_than_slots_are_refused() {
        let device = json!({ "type": "b", "path": "/dev/many", "major": 8, "minor": 0 });
        let text = with_disks(|spec| spec["linux"]["devices"] = vec![device; DISKS_MAX].into());
        let text = text.unwrap_err().to_string();
        assert!(text.contains("/dev/many"), "{text}");
    }

    #[test]
    fn block_device_that_the_host_lacks_is_refused_before_there_is_a_guest() {
        let spec = spec(|spec| {
            spec["linux"]["devices"] =
                json!([{ "type": "b", "path": "/dev/disk", "major": 4095, "minor": 0 }]);
        });
        let text = check(&spec, &[]).unwrap_err().to_string();
        assert!(text.contains("/dev/disk"), "{text}");
    }

    #[test]
    fn block_devices_of_devices_and_mounts_are_wanted() {
        let disks = with_disks(|_| {}).unwrap().disks;
        let whats: Vec<_> = disks.iter().map(|disk| disk.what.as_str()).collect();
        assert_eq!(whats, ["mount at \"/d\"", "linux.devices, \"/dev/disk\""]);
    }

    #[test]
    fn annotations_and_clocks_reach_the_guest() {
        let guest = rewritten(|spec| {
            spec["annotations"] = json!({ "org.example/key": "value" });
            spec["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 7 } });
        })
        .unwrap();
        let text = serde_json::to_string(&guest.spec).unwrap();
        assert!(text.contains(r#""org.example/key":"value""#), "{text}");
        assert!(
            text.contains(r#""timeOffsets":{"monotonic":{"secs":7}}"#),
            "{text}"
        );
    }

    #[test]
    fn destinations_stay_below_the_root() {
        for (path, expected) in [
            ("a/b", "/a/b"),
            ("/../a", "/a"),
            ("/a/../../b/.", "/b"),
            ("", "/"),
        ] {
            assert_eq!(clean(Path::new(path)), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn paths_become_the_guests() {
        let guest = rewritten(|_| {}).unwrap();
        let root = guest.spec.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/run/husk/shared/c1/rootfs"));
        assert_eq!(root.readonly(), Some(true));
        assert_eq!(guest.root, Path::new("rootfs"));
        let sources: Vec<_> = guest
            .spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| mount.source().clone().unwrap())
            .collect();
        let expected = [
            "proc",
            "/run/husk/shared/c1/mounts/0",
            "/run/husk/shared/c1/mounts/1",
        ];
        assert_eq!(sources, expected.map(PathBuf::from));
    }

    #[test]
    fn volumes_keep_what_was_asked_for() {
        let guest = rewritten(|_| {}).unwrap();
        let expected = [
            Volume {
                source: "/host/a".into(),
                is_recursive: true,
                is_slave: false,
                is_read_only: false,
            },
            Volume {
                source: "b".into(),
                is_recursive: false,
                is_slave: false,
                is_read_only: true,
            },
        ];
        assert_eq!(guest.volumes, expected);
    }

    #[test]
    fn shared_memory_goes_with_the_ipc_namespace() {
        let shm = |path: &str| {
            let spec = spec(|spec| {
                spec["linux"]["namespaces"][1]["path"] = json!(path);
                spec["mounts"][0] =
                    json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
            });
            let memory = &mut MemoryVolumes::new("p1");
            let guest = guest_spec(spec, "c1", Some(std::process::id()), memory).unwrap();
            let source = guest.spec.mounts().as_ref().unwrap()[0].source().clone();
            (guest.memory_volumes.len(), source.unwrap())
        };
        assert_eq!(shm(""), (0, "shm".into()));
        let pods = shm("/proc/self/ns/ipc");
        assert_eq!(pods, (1, "/run/husk/volumes/0".into()));
    }

    #[test]
    fn hooks_of_the_container_are_the_guests() {
        let guest = rewritten(|spec| {
            spec["hooks"]["startContainer"] = json!([{ "path": "/in/container" }]);
        });
        let text = serde_json::to_string(guest.unwrap().spec.hooks()).unwrap();
        assert_eq!(text, r#"{"startContainer":[{"path":"/in/container"}]}"#);
    }

    #[test]
    fn what_belongs_to_the_host_is_gone() {
        let guest = rewritten(|_| {}).unwrap();
        let text = serde_json::to_string(&guest.spec).unwrap();
        for gone in [
            "network",
            "netns",
            "hooks",
            "apparmor",
            "selinux",
            "/default/x",
            "/host/a",
        ] {
            assert!(!text.contains(gone), "{gone} in {text}");
        }
    }
}
