//! What a spec asks of a kernel beside namespaces and limits: kernel parameters, labels, profiles.
//!
//! The guest has neither AppArmor nor SELinux. What container managers set for every container,
//! unasked, keeps containers off the host and off each other, as the virtual machine does: it is
//! left out. What a user has chosen may confine a program further than that, and is refused: to leave
//! it out would mislead.

use oci_spec::runtime::{Linux, LinuxSeccomp, LinuxSeccompAction, Process};

use crate::spec::SpecError;

/// Refuses profiles and labels that a process would not be confined by.
pub(crate) fn check_process(process: &Process) -> Result<(), SpecError> {
    if let Some(profile) = process.apparmor_profile()
        && !is_default_profile(profile)
    {
        return refuse(
            format!("process.apparmorProfile, {profile:?}"),
            "a guest has no AppArmor, and this is none of the profiles that every container gets",
        );
    }
    if let Some(label) = process.selinux_label()
        && !is_default_label(label)
    {
        return refuse(
            format!("process.selinuxLabel, {label:?}"),
            "a guest has no SELinux, and this is none of the types that every container gets",
        );
    }
    Ok(())
}

/// Refuses what the guest's kernel can't do for the container, or must not.
pub(crate) fn check_linux(linux: &Linux) -> Result<(), SpecError> {
    if let Some(label) = linux.mount_label()
        && !is_default_label(label)
    {
        return refuse(
            format!("linux.mountLabel, {label:?}"),
            "a guest has no SELinux, and this is none of the types that every container gets",
        );
    }
    if linux.memory_policy().is_some() {
        return refuse(
            "linux.memoryPolicy".to_owned(),
            "the memory of a guest is one node, whatever the host's is",
        );
    }
    if let Some(seccomp) = linux.seccomp() {
        check_seccomp(seccomp)?;
    }
    for key in linux.sysctl().iter().flat_map(|all| all.keys()) {
        check_sysctl(key)?;
    }
    Ok(())
}

/// Whoever answers for a program's system calls reads its memory and takes its descriptors.
fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), SpecError> {
    const REASON: &str = "no process of the host can answer for a guest's system calls";
    if seccomp.listener_path().is_some() {
        return refuse("linux.seccomp.listenerPath".to_owned(), REASON);
    }
    let of_rules = seccomp.syscalls().iter().flatten();
    let mut actions = of_rules.map(|rule| rule.action());
    let is_notify = |action| action == LinuxSeccompAction::ScmpActNotify;
    if is_notify(seccomp.default_action()) || actions.any(is_notify) {
        return refuse("linux.seccomp, SCMP_ACT_NOTIFY".to_owned(), REASON);
    }
    Ok(())
}

/// Names of profiles that Docker, nerdctl and the CRI give every container; `unconfined` is none.
fn is_default_profile(profile: &str) -> bool {
    matches!(
        profile,
        "" | "unconfined" | "docker-default" | "nerdctl-default" | "cri-containerd.apparmor.d"
    )
}

/// Labels are user:role:type:level; levels keep containers apart, types say what they may do.
fn is_default_label(label: &str) -> bool {
    label.is_empty()
        || matches!(
            label.split(':').nth(2),
            Some(
                "container_t"
                    | "container_init_t"
                    | "container_kvm_t"
                    | "svirt_lxc_net_t"
                    | "spc_t"
                    | "unconfined_t"
                    | "container_file_t"
                    | "container_ro_file_t"
                    | "container_share_t"
                    | "svirt_sandbox_file_t"
            )
        )
}

/// A pod's containers share one kernel: a container sets what is its own or the pod's network's.
/// The same ones as with runc.
fn check_sysctl(key: &str) -> Result<(), SpecError> {
    let what = || format!("linux.sysctl, {key:?}");
    // Whichever separator comes first is one; behind it, the other belongs to names.
    let separator = key.find(['.', '/']).and_then(|at| key.get(at..=at));
    let mut parts = key.split(separator.unwrap_or("."));
    let (tree, name) = (parts.next().unwrap_or_default(), parts.next());
    let is_single = parts.next().is_none();
    match (tree, name) {
        ("net", Some(_)) => Ok(()),
        ("fs", Some("mqueue")) if !is_single => Ok(()),
        ("kernel", Some("hostname")) if is_single => {
            refuse(what(), "the member hostname is what says that")
        }
        ("kernel", Some(name)) if is_single && OWN.contains(&name) => Ok(()),
        _ => refuse(what(), "it is not in a namespace of the container's own"),
    }
}

/// Of `kernel`: those of IPC namespaces, and one of UTS namespaces.
const OWN: [&str; 9] = [
    "msgmax",
    "msgmnb",
    "msgmni",
    "sem",
    "shmall",
    "shmmax",
    "shmmni",
    "shm_rmid_forced",
    "domainname",
];

fn refuse(what: String, reason: &'static str) -> Result<(), SpecError> {
    Err(SpecError::Unsupported { what, reason })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn linux(name: &str, value: &serde_json::Value) -> Result<(), SpecError> {
        check_linux(&serde_json::from_value(json!({ name: value })).unwrap())
    }

    fn process(name: &str, value: &str) -> Result<(), SpecError> {
        let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/",
                              name: value });
        check_process(&serde_json::from_value(process).unwrap())
    }

    #[test]
    fn kernel_parameter_of_the_whole_pod_is_refused_by_name() {
        for key in [
            "",
            "kernel",
            "kernel.panic",
            "kernel/panic",
            "kernel.core_pattern",
            "kernel.shmmax.x",
            "vm.max_map_count",
            "vm/overcommit_memory",
            "fs.file-max",
            "fs.mqueue",
            "user.max_user_namespaces",
            "net",
            "netx.y",
            "kernel.hostname",
        ] {
            let text = linux("sysctl", &json!({ key: "1" }))
                .unwrap_err()
                .to_string();
            assert!(text.contains(&format!("{key:?}")), "{text}");
        }
    }

    #[test]
    fn kernel_parameter_of_a_namespace_is_taken() {
        for key in [
            "kernel.shmmax",
            "kernel/msgmax",
            "kernel.domainname",
            "fs.mqueue.msg_max",
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.5/forwarding",
            "net.ipv4.conf.eth0/5.forwarding",
        ] {
            assert_eq!(linux("sysctl", &json!({ key: "1" })), Ok(()), "{key}");
        }
    }

    #[test]
    fn profile_of_the_users_own_is_refused() {
        for profile in ["my-profile", "localhost/x", "docker-default2"] {
            let text = process("apparmorProfile", profile).unwrap_err().to_string();
            assert!(text.contains(profile), "{text}");
        }
        for profile in [
            "",
            "unconfined",
            "docker-default",
            "cri-containerd.apparmor.d",
        ] {
            assert_eq!(process("apparmorProfile", profile), Ok(()), "{profile}");
        }
    }

    #[test]
    fn label_of_the_users_own_is_refused() {
        for label in ["x", "a:b:c", "system_u:system_r:my_t:s0", "container_t"] {
            let text = process("selinuxLabel", label).unwrap_err().to_string();
            assert!(text.contains(label), "{text}");
            let text = linux("mountLabel", &json!(label)).unwrap_err().to_string();
            assert!(text.contains(label), "{text}");
        }
        let label = "system_u:system_r:container_t:s0:c1,c2";
        assert_eq!(process("selinuxLabel", label), Ok(()));
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        assert_eq!(linux("mountLabel", &json!(label)), Ok(()));
    }

    #[test]
    fn notifications_of_system_calls_are_refused() {
        for seccomp in [
            json!({ "defaultAction": "SCMP_ACT_NOTIFY" }),
            json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                { "names": ["write"], "action": "SCMP_ACT_ERRNO" },
                { "names": ["read"], "action": "SCMP_ACT_NOTIFY" } ] }),
        ] {
            let text = linux("seccomp", &seccomp).unwrap_err().to_string();
            assert!(text.contains("SCMP_ACT_NOTIFY"), "{text}");
        }
        let errno = json!({ "defaultAction": "SCMP_ACT_ERRNO" });
        assert_eq!(linux("seccomp", &errno), Ok(()));
    }

    #[test]
    fn memory_policy_is_refused() {
        let policy = json!({ "mode": "MPOL_BIND", "nodes": "1" });
        assert!(linux("memoryPolicy", &policy).is_err());
    }
}
