//! Containers of each runtime, through `ctr`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::command::{self, Ended, Running};
use crate::record::Subject;

/// What runs in all of them.
pub(super) const IMAGE: &str = "docker.io/library/busybox:latest";

const RUNSC: &str = "/usr/bin/runsc";

/// Between containerd's shim and runsc, see [`install_runsc`].
const RUNSC_WRAPPER: &str = "/run/husk-bench/runsc";

/// The runtimes that this machine has, after what they need was prepared.
pub(super) fn runtimes() -> Result<Vec<Subject>> {
    let mut all = vec![Subject::Runc, Subject::Husk];
    if Path::new(RUNSC).exists() {
        install_runsc()?;
        all.push(Subject::Gvisor);
    }
    Ok(all)
}

/// runsc refuses a network of its own on kernels since 6.11: it tells the root network namespace
/// from others by a file that all of them have now. Without one it starts, and no slower.
fn install_runsc() -> Result<()> {
    let wrapper = Path::new(RUNSC_WRAPPER);
    let directory = wrapper.parent().unwrap_or(wrapper);
    let script = format!("#!/bin/sh\nexec {RUNSC} --network=none \"$@\"\n");
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(wrapper, script))
        .and_then(|()| fs::set_permissions(wrapper, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {RUNSC_WRAPPER}"))
}

/// The words that select a runtime, for `ctr run`.
fn runtime_words(subject: Subject) -> &'static [&'static str] {
    match subject {
        Subject::Husk => &["--runtime", "io.containerd.husk.v2"],
        Subject::Gvisor => &[
            "--runtime",
            "io.containerd.runc.v2",
            "--runc-binary",
            RUNSC_WRAPPER,
        ],
        Subject::Runc | Subject::Host => &["--runtime", "io.containerd.runc.v2"],
    }
}

fn ctr(words: &[&str]) -> Command {
    let mut command = Command::new("ctr");
    command.args(words);
    command
}

/// `ctr run --rm` of a command, to be started.
pub(super) fn run_command(subject: Subject, id: &str, flags: &[&str], words: &[&str]) -> Command {
    let mut command = ctr(&["run", "--rm"]);
    command
        .args(runtime_words(subject))
        .args(flags)
        .args([IMAGE, id])
        .args(words);
    command
}

/// `ctr run --rm` of a command, to its end.
pub(super) fn run(subject: Subject, id: &str, flags: &[&str], words: &[&str]) -> Result<Ended> {
    command::run(&mut run_command(subject, id, flags, words)).inspect_err(|_| bury(id))
}

/// A container in the background, removed when this goes.
pub(super) struct Container {
    pub(super) id: String,
    is_gone: bool,
}

impl Container {
    /// One that sleeps.
    pub(super) fn idle(subject: Subject, id: &str) -> Result<Self> {
        let mut command = ctr(&["run", "--detach", "--null-io"]);
        command
            .args(runtime_words(subject))
            .args([IMAGE, id, "sleep", "100000"]);
        let container = Self {
            id: id.to_owned(),
            is_gone: false,
        };
        command::run(&mut command)?;
        Ok(container)
    }

    /// `ctr task exec`.
    pub(super) fn exec(&self, exec_id: &str, words: &[&str]) -> Result<Ended> {
        let mut command = ctr(&["task", "exec", "--exec-id", exec_id, &self.id]);
        command::run(command.args(words))
    }

    /// Kills and removes its task; the rest of it goes untimed.
    pub(super) fn kill_and_delete(mut self) -> Result<Ended> {
        let ended = command::run(&mut ctr(&["task", "rm", "--force", &self.id]))?;
        self.is_gone = true;
        command::run(&mut ctr(&["container", "rm", &self.id]))?;
        Ok(ended)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.is_gone {
            bury(&self.id);
        }
    }
}

/// Removes whatever is left of a container, as far as that goes.
pub(super) fn bury(id: &str) {
    for words in [
        ["task", "rm", "--force", id].as_slice(),
        &["container", "rm", id],
        &["snapshot", "rm", id],
    ] {
        let _ = command::run(&mut ctr(words));
    }
}

/// Files that the containers see, below `/bench`.
pub(super) fn mount_words(host: &Path) -> String {
    format!(
        "type=bind,src={},dst=/bench,options=rbind:ro",
        host.display()
    )
}

/// Starts a command in a container and leaves it running.
pub(super) fn start(subject: Subject, id: &str, flags: &[&str], words: &[&str]) -> Result<Running> {
    Running::start(&mut run_command(subject, id, flags, words))
}

/// The same with an input that is open.
pub(super) fn start_with_input(
    subject: Subject,
    id: &str,
    flags: &[&str],
    words: &[&str],
) -> Result<Running> {
    Running::start_with_input(&mut run_command(subject, id, flags, words))
}

/// Where this program and the workload lie: beside each other.
pub(super) fn own_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("who am I?")?;
    Ok(program.parent().context("no directory")?.to_owned())
}
