//! Namespaces: joining, making, and being born into them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};

use super::{OrFail, Step, has_own, refusal};
use crate::attributes::first_affinity;
use crate::oci::{NamespaceKind, Process, Spec};
use crate::plan::{self, Place, Plan, Report};
use crate::sys::{self, Fork, clone_sibling};

/// Joins or makes namespaces and forks the child.
pub(super) fn enter_or_prepare(channel: BorrowedFd<'_>, plan: &Plan) -> Step<Fork> {
    let mut cgroup = plan.cgroup.as_deref().map(open_cgroup).transpose()?;
    let mut flags = 0;
    let mut fallback = None;
    let mut cgroup_namespace = None;
    match &plan.place {
        Place::Create(spec) => {
            check(spec)?;
            if has_own(spec, NamespaceKind::User) {
                // Before all others, which then belong to it. In it, the cgroup is out of reach,
                // so the parent goes there first and the child inherits the place.
                if let Some(path) = &plan.cgroup {
                    enter_cgroup(path)?;
                    cgroup = None;
                }
                make_user_namespace(channel, spec)?;
            } else if has_own(spec, NamespaceKind::Time) {
                make_time_namespace(spec)?;
            }
            for namespace in &spec.linux.namespaces {
                if let Some(path) = namespace
                    .path
                    .as_ref()
                    .filter(|p| !p.as_os_str().is_empty())
                {
                    join(namespace.kind, path)?;
                }
            }
            for kind in BORN_INTO {
                if has_own(spec, kind) {
                    flags |= sys::flag(clone_flag(kind).bits());
                }
            }
        }
        Place::Enter { init_pid } => {
            run_on_first_cpus(&plan.process)?;
            fallback = Some(open_init_cgroup(*init_pid)?);
            cgroup_namespace = open_cgroup_namespace(*init_pid)?;
            enter_container(*init_pid)?;
        }
        Place::Pause => {
            for kind in [NamespaceKind::Pid, NamespaceKind::Mount] {
                flags |= sys::flag(clone_flag(kind).bits());
            }
        }
    }
    let mut forked = clone_sibling(flags, cgroup.as_ref().map(OwnedFd::as_fd));
    if let (Err(_), Some(Some(init_cgroup))) = (&forked, &fallback) {
        // A container that has cgroups of its own below its cgroup leaves no room beside them.
        forked = clone_sibling(flags, Some(init_cgroup.as_fd()));
    }
    let forked = forked.or_fail(|| "make a process in the container".into())?;
    if let (Fork::Child, Some(namespace)) = (&forked, cgroup_namespace) {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWCGROUP)
            .or_fail(|| "enter the container's cgroup namespace".into())?;
    }
    if let Fork::Parent(pid) = forked {
        let pid = pid.as_raw_nonzero().get();
        plan::send(channel, &Report::Forked { pid }, &[])
            .or_fail(|| "report to the agent".into())?;
    }
    Ok(forked)
}

/// What the child does about namespaces once it is in its cgroup.
pub(super) fn finish(plan: &Plan) -> Step {
    match &plan.place {
        Place::Create(spec) => {
            if has_own(spec, NamespaceKind::Cgroup) {
                // Its root is the cgroup that the process is in at this moment.
                unshare(CloneFlags::CLONE_NEWCGROUP)
                    .or_fail(|| "make a cgroup namespace".into())?;
            }
        }
        Place::Enter { .. } | Place::Pause => {}
    }
    Ok(())
}

/// Goes to the CPUs where a process is to be until it is in the container's cgroup.
fn run_on_first_cpus(process: &Process) -> Step {
    let affinity = process.exec_cpu_affinity.as_ref();
    let Some(cpus) = affinity.map_or(Ok(None), first_affinity)? else {
        return Ok(());
    };
    rustix::thread::sched_setaffinity(None, &cpus)
        .or_fail(|| "set the CPUs (process.execCPUAffinity.initial)".into())
}

/// Sets what the UTS namespace holds.
pub(super) fn name_host(spec: &Spec) -> Step {
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes())
            .or_fail(|| format!("set the hostname {:?}", spec.hostname))?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .or_fail(|| format!("set the domain name {:?}", spec.domainname))?;
    }
    Ok(())
}

/// Namespaces that clone makes. The user namespace must be there before, the cgroup namespace
/// after the process has got into its cgroup.
const BORN_INTO: [NamespaceKind; 5] = [
    NamespaceKind::Pid,
    NamespaceKind::Mount,
    NamespaceKind::Ipc,
    NamespaceKind::Uts,
    NamespaceKind::Network,
];

fn clone_flag(kind: NamespaceKind) -> CloneFlags {
    match kind {
        NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
        NamespaceKind::Network => CloneFlags::CLONE_NEWNET,
        NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
        NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        NamespaceKind::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
    }
}

fn check(spec: &Spec) -> Step {
    if !has_own(spec, NamespaceKind::Mount) {
        return Err(refusal(
            "linux.namespaces: a container needs a mount namespace of its own".into(),
        ));
    }
    if !spec.linux.time_offsets.is_empty() && !has_own(spec, NamespaceKind::Time) {
        return Err(refusal(
            "linux.timeOffsets: they need a time namespace of the container's own".into(),
        ));
    }
    let has_mappings = !spec.linux.uid_mappings.is_empty() && !spec.linux.gid_mappings.is_empty();
    if has_own(spec, NamespaceKind::User) && !has_mappings {
        return Err(refusal(
            "linux.namespaces: a user namespace needs linux.uidMappings and linux.gidMappings"
                .into(),
        ));
    }
    Ok(())
}

fn open_cgroup(path: &Path) -> Step<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .or_fail(|| format!("open the cgroup {}", path.display()))
}

fn enter_cgroup(path: &Path) -> Step {
    std::fs::write(path.join("cgroup.procs"), "0")
        .or_fail(|| format!("enter the cgroup {}", path.display()))
}

/// The cgroup that init is in now.
fn open_init_cgroup(init_pid: i32) -> Step<Option<OwnedFd>> {
    let path = format!("/proc/{init_pid}/cgroup");
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(None);
    };
    let Some(below) = text.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Ok(None);
    };
    Ok(open_cgroup(&Path::new("/sys/fs/cgroup").join(below)).ok())
}

fn make_user_namespace(channel: BorrowedFd<'_>, spec: &Spec) -> Step {
    unshare(CloneFlags::CLONE_NEWUSER).or_fail(|| "make a user namespace".into())?;
    if has_own(spec, NamespaceKind::Time) {
        // It belongs to the user namespace. And its file belongs to who this process is, who is
        // somebody else next.
        make_time_namespace(spec)?;
    }
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    plan::send(channel, &Report::NeedsMappings { pid }, &[])
        .or_fail(|| "report to the agent".into())?;
    plan::await_order(channel).or_fail(|| "wait for the id mappings".into())?;
    become_root()
}

/// Makes the time namespace that the child is born into. Its clocks can be set until then.
fn make_time_namespace(spec: &Spec) -> Step {
    let offsets = offsets_of(spec)?;
    unshare(clone_flag(NamespaceKind::Time)).or_fail(|| "make a time namespace".into())?;
    if offsets.is_empty() {
        return Ok(());
    }
    // All in one call, as the kernel wants them.
    std::fs::write("/proc/self/timens_offsets", offsets)
        .or_fail(|| "set the clocks of the time namespace (linux.timeOffsets)".into())
}

/// The lines that set the clocks.
fn offsets_of(spec: &Spec) -> Step<String> {
    let mut lines = String::new();
    for (clock, offset) in &spec.linux.time_offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(refusal(format!(
                "linux.timeOffsets: {clock:?} is neither monotonic nor boottime"
            )));
        }
        if offset.nanosecs >= NS_PER_S {
            return Err(refusal(format!(
                "linux.timeOffsets: {clock} has {} nanoseconds, which is a second or more",
                offset.nanosecs
            )));
        }
        lines.push_str(&format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
    }
    Ok(lines)
}

const NS_PER_S: u32 = 1_000_000_000;

/// Root of the user namespace; its capabilities are all there already.
fn become_root() -> Step {
    let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .or_fail(|| "become group 0 of the user namespace".into())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .or_fail(|| "become user 0 of the user namespace".into())
}

fn join(kind: NamespaceKind, path: &Path) -> Step {
    let step = || format!("join the {kind:?} namespace {}", path.display());
    let file = File::open(path).or_fail(step)?;
    setns(file.as_fd(), clone_flag(kind)).or_fail(step)
}

/// The container's cgroup namespace, if it has one of its own. Only the child enters it: from
/// inside, where the parent comes from is out of sight, and the kernel lets nobody be born across
/// that border (cgroup v2, nsdelegate).
fn open_cgroup_namespace(init_pid: i32) -> Step<Option<File>> {
    let step = || "find the container's cgroup namespace".to_owned();
    let path = PathBuf::from(format!("/proc/{init_pid}/ns/cgroup"));
    let ours = inode("/proc/self/ns/cgroup".into()).or_fail(step)?;
    if inode(path.clone()).or_fail(step)? == ours {
        return Ok(None);
    }
    File::open(path).map(Some).or_fail(step)
}

/// Enters every namespace of the container's that is not the agent's own, but for that of cgroups.
fn enter_container(init_pid: i32) -> Step {
    let step = || "enter the container's namespaces".to_owned();
    let pid = Pid::from_raw(init_pid)
        .ok_or_else(|| io::Error::other("init has no pid"))
        .or_fail(step)?;
    let init = rustix::process::pidfd_open(pid, PidfdFlags::empty()).or_fail(step)?;
    let mut flags = CloneFlags::empty();
    for (kind, name) in NAMES {
        let theirs = inode(PathBuf::from(format!("/proc/{init_pid}/ns/{name}"))).or_fail(step)?;
        let ours = inode(PathBuf::from(format!("/proc/self/ns/{name}"))).or_fail(step)?;
        // None: a kind that this kernel does not have.
        if theirs != ours && kind != NamespaceKind::Cgroup {
            flags |= clone_flag(kind);
        }
    }
    setns(init.as_fd(), flags).or_fail(step)?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        become_root()?;
    }
    Ok(())
}

fn inode(path: PathBuf) -> io::Result<Option<u64>> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

const NAMES: [(NamespaceKind, &str); 8] = [
    (NamespaceKind::User, "user"),
    (NamespaceKind::Pid, "pid"),
    (NamespaceKind::Mount, "mnt"),
    (NamespaceKind::Ipc, "ipc"),
    (NamespaceKind::Uts, "uts"),
    (NamespaceKind::Network, "net"),
    (NamespaceKind::Cgroup, "cgroup"),
    (NamespaceKind::Time, "time"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"linux":{linux}}}"#)).unwrap()
    }

    #[test]
    fn namespaces_that_can_not_be_are_refused() {
        for (linux, word) in [
            (r#"{"namespaces":[{"type":"pid"}]}"#, "mount namespace"),
            (
                r#"{"namespaces":[{"type":"mount"}],"timeOffsets":{"monotonic":{"secs":1}}}"#,
                "timeOffsets",
            ),
            (
                r#"{"namespaces":[{"type":"mount"},{"type":"user"}]}"#,
                "uidMappings",
            ),
        ] {
            let failure = check(&spec(linux)).unwrap_err();
            assert!(
                failure.is_request_at_fault && failure.text.contains(word),
                "{failure}"
            );
        }
    }

    #[test]
    fn offsets_that_are_none_are_refused() {
        for offsets in [
            r#"{"realtime":{"secs":1}}"#,
            r#"{"monotonic":{"secs":1,"nanosecs":1000000000}}"#,
        ] {
            let spec = spec(&format!(r#"{{"timeOffsets":{offsets}}}"#));
            assert!(
                offsets_of(&spec).unwrap_err().is_request_at_fault,
                "{offsets}"
            );
        }
    }

    #[test]
    fn offsets_are_lines() {
        let offsets = r#"{"timeOffsets":{"monotonic":{"secs":-5},"boottime":{"nanosecs":7}}}"#;
        let lines = offsets_of(&spec(offsets)).unwrap();
        assert_eq!(lines, "boottime 0 7\nmonotonic -5 0\n");
    }
}
