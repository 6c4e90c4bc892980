//! The launch stage: becomes one process of a container, by one plan.
//!
//! It runs as two processes. The *parent* (the program as the agent starts it) joins or makes what
//! namespaces must exist before a process is born into them, forks, and ends. The *child*, a
//! direct child of the agent's and born in the container's cgroup, does the rest and becomes the
//! program. [`main`] is the list of steps, in the order of the runtime specification; the reason
//! for a place in it stands beside it.

mod console;
mod copy;
mod disks;
mod hooks;
mod idmap;
mod mounts;
mod namespaces;
mod nodes;
mod paths;
mod pause;
mod program;
mod rootfs;
mod user;
mod volumes;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use crate::oci::{Mount, NamespaceKind, Spec};
use crate::plan::{
    self, FAILURE_TEXT_BYTES_MAX, Failure, HANDOVER_FDS, Handover, Place, Plan, Report,
};
use crate::sys::{self, Fork};
use program::Program;

/// What a step returns.
type Step<T = ()> = Result<T, Failure>;

/// Turns an error into the failure of a named step.
trait OrFail<T> {
    /// The step as "cannot …" would go on.
    fn or_fail(self, step: impl FnOnce() -> String) -> Step<T>;
}

impl<T, E: Into<io::Error>> OrFail<T> for Result<T, E> {
    fn or_fail(self, step: impl FnOnce() -> String) -> Step<T> {
        self.map_err(|error| Failure {
            text: format!("cannot {}: {}", step(), error.into()),
            is_request_at_fault: false,
        })
    }
}

/// The request asked for something that can't be.
fn refusal(text: String) -> Failure {
    Failure {
        text,
        is_request_at_fault: true,
    }
}

/// Runs the stage; returns only in the parent, or when a step failed.
pub fn main() -> ExitCode {
    let channel = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), FIRST_FREE_FD) {
        Ok(channel) => channel,
        Err(error) => {
            eprintln!("husk-agent: the launch stage has no channel: {error}");
            return ExitCode::FAILURE;
        }
    };
    match run(channel.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(mut failure) => {
            let mut end = failure.text.len().min(FAILURE_TEXT_BYTES_MAX);
            while !failure.text.is_char_boundary(end) {
                end -= 1;
            }
            failure.text.truncate(end);
            // An agent that is not there any more has nobody to tell either.
            let _ = plan::send(channel.as_fd(), &Report::Failed(failure), &[]);
            ExitCode::FAILURE
        }
    }
}

/// First descriptor that is not a standard stream.
const FIRST_FREE_FD: i32 = 3;

fn run(channel: BorrowedFd<'_>) -> Step {
    let threads = sys::thread_count().or_fail(|| "count the threads".into())?;
    assert_eq!(
        threads, 1,
        "the launch stage forks and must have one thread"
    );
    let (plan, streams) = take_plan(channel)?;
    // Takes rights over the file systems, which a user namespace does not give, and over their
    // disks, which the container's rules for devices need not allow.
    let trees = match &plan.place {
        Place::Create(spec) => Trees::of(spec, plan.root_disk.as_ref())?,
        Place::Enter { .. } | Place::Pause => Trees::default(),
    };
    if namespaces::enter_or_prepare(channel, &plan)? == Fork::Child {
        return match plan.place {
            Place::Pause => pause::become_pause(channel, &streams),
            _ => become_process(channel, &plan, &streams, &trees),
        };
    }
    Ok(())
}

/// What is mounted before there is a child, and nowhere yet.
#[derive(Default)]
struct Trees {
    /// The container's root, if it is on a disk.
    root: Option<OwnedFd>,
    /// In the places of the spec's mounts.
    mounts: Vec<Option<OwnedFd>>,
}

impl Trees {
    fn of(spec: &Spec, root_disk: Option<&Mount>) -> Step<Self> {
        let root = root_disk.map(disks::prepare_root).transpose()?;
        let mapped = idmap::prepare(spec)?;
        let mounts = spec.mounts.iter().zip(mapped);
        let mounts = mounts.map(|(mount, mapped)| match mapped {
            Some(tree) => Ok(Some(tree)),
            None => disks::prepare(mount),
        });
        Ok(Self {
            root,
            mounts: mounts.collect::<Step<_>>()?,
        })
    }
}

fn take_plan(channel: BorrowedFd<'_>) -> Step<(Plan, [OwnedFd; 3])> {
    let received = plan::receive::<Handover>(channel).or_fail(|| "receive the plan".into())?;
    let fds = received.map(|(_, fds)| fds).unwrap_or_default();
    let Ok([plan, stdin, stdout, stderr]) = <[OwnedFd; HANDOVER_FDS]>::try_from(fds) else {
        return Err(io::Error::other("descriptors are missing"))
            .or_fail(|| "receive the plan".into());
    };
    let plan = Plan::from_memfd(plan).or_fail(|| "read the plan".into())?;
    Ok((plan, [stdin, stdout, stderr]))
}

/// The child's steps.
fn become_process(
    channel: BorrowedFd<'_>,
    plan: &Plan,
    streams: &[OwnedFd; 3],
    trees: &Trees,
) -> Step {
    // The agent must know the pid before anything can end this process on its own account.
    plan::await_order(channel).or_fail(|| "wait for the agent".into())?;
    let process = &plan.process;
    rustix::process::setsid().or_fail(|| "make a session".into())?;
    // Files that are made here get the modes they are asked for.
    rustix::process::umask(rustix::fs::Mode::empty());
    namespaces::finish(plan)?;
    if let Place::Create(spec) = &plan.place {
        build_container(spec, trees)?;
    }
    if process.terminal {
        let name_console = matches!(plan.place, Place::Create(_));
        console::attach(channel, process, name_console)?;
    } else {
        user::own_streams(process, streams)?;
        console::set_streams(streams)?;
    }
    if let Place::Create(spec) = &plan.place {
        seal_container(spec)?;
    }
    if let Some(personality) = &plan.personality {
        program::set_personality(personality)?;
    }
    console::close_on_exec()?;
    // Needs privileges that the next step takes away.
    user::bound_capabilities(process)?;
    let filter = plan.seccomp.as_ref().map(program::compile).transpose()?;
    if let (Some(filter), false) = (&filter, process.no_new_privileges) {
        // Without no_new_privs only a privileged process may filter itself.
        program::install(filter)?;
    }
    let is_cwd_left = program::try_cwd(process)?;
    user::switch(process)?;
    if is_cwd_left {
        program::enter_cwd(process)?;
    }
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).or_fail(|| "set no_new_privs".into())?;
    }
    let program = Program::prepare(process)?;
    plan::send(channel, &Report::Ready, &[]).or_fail(|| "report to the agent".into())?;
    plan::await_order(channel).or_fail(|| "wait for the start".into())?;
    if let (Some(filter), true) = (&filter, process.no_new_privileges) {
        program::install(filter)?;
    }
    if let Some(hooks) = &plan.start_hooks {
        // They are the container's: what confines its process confines them.
        hooks::run(hooks)?;
    }
    program.execute()
}

/// Everything up to the point where the container's root is the only one.
fn build_container(spec: &Spec, trees: &Trees) -> Step {
    let root = rootfs::prepare(spec, trees.root.as_ref())?;
    let mut sealed_later = Vec::new();
    for (index, mount) in spec.mounts.iter().enumerate() {
        let tree = trees.mounts.get(index).and_then(Option::as_ref);
        mounts::mount(root.as_fd(), mount, tree, &mut sealed_later)?;
    }
    nodes::create(root.as_fd(), spec)?;
    mounts::seal(&sealed_later)?;
    rootfs::pivot(&root)?;
    rootfs::set_propagation(spec)?;
    if has_own(spec, NamespaceKind::Uts) || joins(spec, NamespaceKind::Uts) {
        namespaces::name_host(spec)?;
    }
    // Before the root may become read-only.
    program::make_cwd(&spec.process)
}

/// What must come after the console's mount, and before privileges are dropped.
fn seal_container(spec: &Spec) -> Step {
    // Kernel parameters lie below paths that become read-only next.
    paths::set_sysctls(spec)?;
    for path in &spec.linux.readonly_paths {
        paths::make_readonly(path)?;
    }
    for path in &spec.linux.masked_paths {
        paths::mask(path)?;
    }
    if spec.root.readonly {
        rootfs::make_readonly()?;
    }
    Ok(())
}

fn has_own(spec: &Spec, kind: NamespaceKind) -> bool {
    spec.linux
        .namespaces
        .iter()
        .any(|ns| ns.kind == kind && ns.path.as_ref().is_none_or(|p| p.as_os_str().is_empty()))
}

fn joins(spec: &Spec, kind: NamespaceKind) -> bool {
    spec.linux
        .namespaces
        .iter()
        .any(|ns| ns.kind == kind && ns.path.as_ref().is_some_and(|p| !p.as_os_str().is_empty()))
}
