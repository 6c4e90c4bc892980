//! The namespaces of a spec: which of them are the container's own, and which the pod's.
//!
//! A caller names a pod's namespaces by paths of the process that stands for the pod on the host,
//! which is the VMM. In the guest the pod's IPC and UTS namespaces and its network are the guest's
//! own, so there a container simply has none of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::spec::SpecError;

/// The namespaces of a container in the guest.
#[derive(Debug)]
pub(crate) struct GuestNamespaces {
    /// Its own.
    pub(crate) own: Vec<LinuxNamespace>,
    /// Whether its PID namespace is that of the pod or of a container in it.
    pub(crate) joins_pids: bool,
}

/// Whether a spec names a namespace of that kind.
pub(crate) fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|all| all.iter().any(|namespace| namespace.typ() == kind))
}

/// Whether a spec joins a namespace of that kind that somebody else has.
pub(crate) fn joins(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut of_kind = namespaces
        .into_iter()
        .flatten()
        .filter(|namespace| namespace.typ() == kind);
    of_kind.any(|namespace| {
        namespace
            .path()
            .as_deref()
            .is_some_and(|path| !is_empty(path))
    })
}

/// Refuses a spec that asks for the host's namespaces.
pub(crate) fn check_own(spec: &Spec) -> Result<(), SpecError> {
    for (kind, reason) in NEEDED {
        if !has(spec, kind) {
            return refuse(kind, reason);
        }
    }
    Ok(())
}

/// Sorts the namespaces out. `pod` is the pid on the host of the process that stands for the pod; none:
/// there is no pod yet, and it will live in whatever network namespace is named.
pub(crate) fn sort(
    namespaces: Vec<LinuxNamespace>,
    pod: Option<u32>,
) -> Result<GuestNamespaces, SpecError> {
    use LinuxNamespaceType as Kind;
    let mut sorted = GuestNamespaces {
        own: Vec::new(),
        joins_pids: false,
    };
    for namespace in namespaces {
        let kind = namespace.typ();
        let Some(path) = namespace.path().as_deref().filter(|path| !is_empty(path)) else {
            // The pod's network is the guest's own.
            if kind != Kind::Network {
                sorted.own.push(namespace);
            }
            continue;
        };
        if !matches!(kind, Kind::Network | Kind::Ipc | Kind::Uts | Kind::Pid) {
            return refuse(kind, "a container in a guest can't join one by a path");
        }
        let is_pods = match pod {
            Some(pod) => is_same(path, &format!("/proc/{pod}/ns/{}", file_of(kind))),
            None => kind == Kind::Network,
        };
        if !is_pods {
            return refuse(
                kind,
                "the path is not of this pod, and a guest can't join a namespace of the host",
            );
        }
        sorted.joins_pids |= kind == Kind::Pid;
    }
    Ok(sorted)
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// Whether two paths are of one namespace.
fn is_same(path: &Path, other: &str) -> bool {
    let (Ok(one), Ok(other)) = (fs::metadata(path), fs::metadata(other)) else {
        return false;
    };
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

fn refuse<T>(kind: LinuxNamespaceType, reason: &'static str) -> Result<T, SpecError> {
    Err(SpecError::Unsupported {
        what: format!("linux.namespaces, {}", name_of(kind)),
        reason,
    })
}

/// Namespaces without which a container would have the host's, and who asks for that.
const NEEDED: [(LinuxNamespaceType, &str); 5] = [
    (
        LinuxNamespaceType::Mount,
        "without it the container would share the host's, and a guest can't",
    ),
    (
        LinuxNamespaceType::Network,
        "without it the container would share the host's (hostNetwork), and a guest can't",
    ),
    (
        LinuxNamespaceType::Pid,
        "without it the container would share the host's (hostPID), and a guest can't",
    ),
    (
        LinuxNamespaceType::Ipc,
        "without it the container would share the host's (hostIPC), and a guest can't",
    ),
    (
        LinuxNamespaceType::Uts,
        "without it the container would share the host's, and a guest can't",
    ),
];

/// As config.json names it.
fn name_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Network => "network",
        kind => file_of(kind),
    }
}

/// As /proc/PID/ns names it.
fn file_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sorted(kind: &str, path: &str) -> Result<GuestNamespaces, SpecError> {
        let namespaces = json!([{ "type": "mount" }, { "type": kind, "path": path }]);
        sort(
            serde_json::from_value(namespaces).unwrap(),
            Some(std::process::id()),
        )
    }

    #[test]
    fn first_container_joins_nothing_but_a_network() {
        for kind in ["pid", "ipc", "uts", "network"] {
            let namespaces = json!([{ "type": kind, "path": "/proc/self/ns/net" }]);
            let sorted = sort(serde_json::from_value(namespaces).unwrap(), None);
            assert_eq!(sorted.is_ok(), kind == "network", "{kind}");
        }
    }

    #[test]
    fn paths_that_are_not_the_pods_are_refused() {
        for kind in ["pid", "ipc", "uts", "network"] {
            for path in ["/no/such", "/proc/self/ns/mnt", "/"] {
                let refused = sorted(kind, path).unwrap_err().to_string();
                assert!(refused.contains(kind), "{refused}");
            }
        }
    }

    #[test]
    fn kinds_that_cannot_be_joined_are_refused() {
        for (kind, file) in [("mount", "mnt"), ("user", "user"), ("cgroup", "cgroup")] {
            assert!(
                sorted(kind, &format!("/proc/self/ns/{file}")).is_err(),
                "{kind}"
            );
        }
    }

    #[test]
    fn namespaces_of_the_pod_are_not_the_containers_own() {
        for (kind, file) in [
            ("pid", "pid"),
            ("ipc", "ipc"),
            ("uts", "uts"),
            ("network", "net"),
        ] {
            let sorted = sorted(kind, &format!("/proc/self/ns/{file}")).unwrap();
            assert_eq!(sorted.own.len(), 1, "{kind}");
            assert_eq!(sorted.joins_pids, kind == "pid");
        }
    }

    #[test]
    fn own_namespaces_are_kept_but_for_the_network() {
        let sorted = sorted("network", "").unwrap();
        assert_eq!(sorted.own.len(), 1);
        assert!(!sorted.joins_pids);
    }
}
