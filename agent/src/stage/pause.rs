//! The first process of a PID namespace that containers share: see [`crate::pause`].

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags};

use super::{OrFail, Step, console, rootfs, user};
use crate::oci::Process;
use crate::pause::NAME;
use crate::plan::{self, Report};

/// The child's steps.
pub(super) fn become_pause(channel: BorrowedFd<'_>, streams: &[OwnedFd; 3]) -> Step {
    plan::await_order(channel).or_fail(|| "wait for the agent".into())?;
    rustix::process::setsid().or_fail(|| "make a session".into())?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let program = rustix::fs::open("/proc/self/exe", flags, Mode::empty())
        .or_fail(|| "find the agent's program".into())?;
    leave_guest()?;
    console::set_streams(streams)?;
    console::close_on_exec()?;
    // Containers see it as process 1, with the same user as theirs.
    user::bound_capabilities(&Process::default())?;
    rustix::thread::set_no_new_privs(true).or_fail(|| "set no_new_privs".into())?;
    plan::send(channel, &Report::Ready, &[]).or_fail(|| "report to the agent".into())?;
    plan::await_order(channel).or_fail(|| "wait for the start".into())?;
    let name = CString::new(NAME).unwrap_or_default();
    let none: [&CStr; 0] = [];
    let at_itself = nix::fcntl::AtFlags::AT_EMPTY_PATH;
    let executed = nix::unistd::execveat(&program, c"", &[name.as_c_str()], &none, at_itself);
    match executed {
        Ok(never) => match never {},
        Err(error) => Err(error).or_fail(|| format!("execute {NAME}, {}", program.as_raw_fd())),
    }
}

/// Leaves a root behind that shows nothing: containers reach it by way of `/proc/1/root`.
fn leave_guest() -> Step {
    let none = None::<&str>;
    let step = || "leave the guest's files".to_owned();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).or_fail(step)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        "/tmp",
        Some("tmpfs"),
        flags,
        Some("mode=0555"),
    )
    .or_fail(step)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/tmp", flags, Mode::empty()).or_fail(step)?;
    rootfs::pivot(&root)
}
