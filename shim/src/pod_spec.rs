//! The spec that stands for a pod which containerd's Sandbox API asks for.
//!
//! CRI's server writes one for the container that it starts first in each of its own pods, and all that
//! a pod is made from is read there ([`husk_sandbox::PodRequest`]). The Sandbox API has no such container;
//! so the same is written here, and a pod is the same one whoever asks for it.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::pod_config::{Namespaces, PodConfig};

/// The pod's spec; `netns` is the path of its network namespace, empty: one of its own, and `annotations`
/// come from the caller.
///
/// # Errors
/// What of it no spec can hold.
pub(crate) fn pod_spec(
    id: &str,
    hostname: &str,
    config: &PodConfig,
    netns: &str,
    annotations: &HashMap<String, String>,
) -> Result<Spec, serde_json::Error> {
    let mut annotations = annotations.clone();
    let mut annotate = |name: &str, value: String| {
        annotations.insert(format!("io.kubernetes.cri.{name}"), value);
    };
    annotate("container-type", "sandbox".to_owned());
    annotate("sandbox-id", id.to_owned());
    if let Some(resources) = &config.resources {
        annotate("sandbox-cpu-period", resources.cpu_period.to_string());
        annotate("sandbox-cpu-quota", resources.cpu_quota.to_string());
        annotate("sandbox-memory", resources.memory_limit.to_string());
    }
    let mut sysctls = config.sysctls.clone();
    for (name, value) in SYSCTLS {
        let unset = sysctls.entry(name.to_owned());
        unset.or_insert_with(|| value.to_owned());
    }
    let spec = json!({
        "ociVersion": "1.1.0",
        "hostname": hostname,
        "annotations": annotations,
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["/pause"], "cwd": "/" },
        "root": { "path": "rootfs", "readonly": true },
        "linux": {
            "namespaces": namespaces(&config.namespaces, netns),
            "sysctl": sysctls,
            "cgroupsPath": cgroups_path(&config.cgroup_parent, id),
        },
    });
    // Through text: to read it from there is code that the shim has already.
    husk_sandbox::parse_spec(spec.to_string().as_bytes())
}

/// Those of the host's that are asked for are not there, and are refused as in any spec.
fn namespaces(asked: &Namespaces, netns: &str) -> Vec<Value> {
    let mut all = vec![json!({ "type": "mount" }), json!({ "type": "uts" })];
    if !asked.has_hosts_pids {
        all.push(json!({ "type": "pid" }));
    }
    if !asked.has_hosts_ipc {
        all.push(json!({ "type": "ipc" }));
    }
    match netns {
        _ if asked.has_hosts_network => {}
        "" => all.push(json!({ "type": "network" })),
        netns => all.push(json!({ "type": "network", "path": netns })),
    }
    if asked.has_own_users {
        all.push(json!({ "type": "user" }));
    }
    all
}

/// Of a path, or of a slice of systemd's.
fn cgroups_path(parent: &str, id: &str) -> String {
    let name = Path::new(parent).file_name();
    match name.and_then(|name| name.to_str()) {
        None => String::new(),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        Some(_) => Path::new(parent).join(id).display().to_string(),
    }
}

/// What containerd's CRI gives each pod by default, in its words `enable_unprivileged_ports` and
/// `enable_unprivileged_icmp`. Whether a host has switched it off, the Sandbox API does not say.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

#[cfg(test)]
mod tests {
    use husk_sandbox::{PodRequest, VmSettings};

    use super::*;
    use crate::pod_config::Resources;

    fn spec(config: &PodConfig) -> Spec {
        pod_spec("p1", "web", config, "/run/netns/x", &HashMap::new()).unwrap()
    }

    fn request(config: &PodConfig) -> Result<PodRequest, String> {
        PodRequest::of(&spec(config), &[], &VmSettings::default())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        for (change, name) in [
            (
                (|n| n.has_hosts_network = true) as fn(&mut Namespaces),
                "hostNetwork",
            ),
            (|n| n.has_hosts_pids = true, "hostPID"),
            (|n| n.has_hosts_ipc = true, "hostIPC"),
            (|n| n.has_own_users = true, "hostUsers"),
        ] {
            let mut config = PodConfig::default();
            change(&mut config.namespaces);
            let refused = request(&config).unwrap_err();
            assert!(refused.contains(name), "{refused}, not {name}");
        }
    }

    #[test]
    fn cgroups_that_lead_elsewhere_are_refused() {
        for parent in ["/../x", "--.slice"] {
            let config = PodConfig {
                cgroup_parent: parent.to_owned(),
                ..PodConfig::default()
            };
            assert!(request(&config).is_err(), "{parent}");
        }
    }

    #[test]
    fn pod_without_limits_has_the_defaults() {
        let defaults = VmSettings::default();
        let request = request(&PodConfig::default()).unwrap();
        assert_eq!(request.memory_mib, defaults.memory_mib);
        assert_eq!(request.vcpus, defaults.vcpus);
        assert_eq!(request.cgroup, None);
    }

    #[test]
    fn pod_has_its_limits_and_its_cgroup() {
        let config = |parent: &str| PodConfig {
            cgroup_parent: parent.to_owned(),
            resources: Some(Resources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                memory_limit: 1 << 30,
            }),
            ..PodConfig::default()
        };
        let plain = request(&config("/kubepods/pod1")).unwrap();
        assert_eq!(plain.memory_mib, 1024 + VmSettings::default().overhead_mib);
        assert_eq!(plain.vcpus, 1);
        let cgroup = Path::new("/sys/fs/cgroup/kubepods/pod1");
        assert_eq!(plain.cgroup.as_deref(), Some(cgroup));
        let systemds = request(&config("/a.slice/a-b.slice")).unwrap();
        let cgroup = Path::new("/sys/fs/cgroup/a.slice/a-b.slice");
        assert_eq!(systemds.cgroup.as_deref(), Some(cgroup));
    }

    #[test]
    fn kernel_parameters_of_the_pod_win() {
        let mut config = PodConfig::default();
        let (name, _) = SYSCTLS[0];
        config.sysctls.insert(name.to_owned(), "80".to_owned());
        let spec = spec(&config);
        let linux = spec.linux().as_ref().unwrap();
        let sysctls = linux.sysctl().as_ref().unwrap();
        assert_eq!(sysctls[name], "80");
        assert_eq!(sysctls[SYSCTLS[1].0], SYSCTLS[1].1);
        assert_eq!(spec.hostname().as_deref(), Some("web"));
    }
}
