//! What a user types: `ctr`.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::pty::Terminal;

/// The image that scenarios run if they don't need more.
const IMAGE: &str = "docker.io/library/busybox:latest";

/// How long one `ctr` may take, in seconds. The testbed is some twenty times slower than metal.
const CTR_DEADLINE_S: u32 = 300;

/// `ctr` with one runtime and one container's name.
pub(crate) struct Ctr {
    runtime: String,
    /// The container of this scenario.
    pub(crate) id: String,
    /// What it is made from.
    pub(crate) image: &'static str,
    /// How long one command may take.
    pub(crate) deadline_s: u32,
    /// The socket of a containerd that is not the machine's own.
    pub(crate) address: Option<PathBuf>,
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// The output of a command that must have succeeded.
    pub(crate) fn success(self) -> Result<String> {
        ensure!(
            self.status == 0,
            "ended with {}: {}",
            self.status,
            self.stderr.trim()
        );
        Ok(self.text())
    }
}

impl Ctr {
    pub(crate) fn new(runtime: &str, scenario: &str) -> Self {
        Self {
            runtime: runtime.to_owned(),
            id: format!("s-{}", scenario.replace('_', "-")),
            image: IMAGE,
            deadline_s: CTR_DEADLINE_S,
            address: None,
        }
    }

    /// `ctr run --rm` of a command, with flags before the image.
    pub(crate) fn run(&self, flags: &[&str], command: &[&str]) -> Result<Ended> {
        self.run_with_input(flags, command, None)
    }

    pub(crate) fn run_with_input(
        &self,
        flags: &[&str],
        command: &[&str],
        input: Option<&[u8]>,
    ) -> Result<Ended> {
        finish(
            self.spawn(&self.id, flags, command, input.is_some())?,
            input,
        )
    }

    /// The same, of another container's name and in the background.
    pub(crate) fn spawn(
        &self,
        id: &str,
        flags: &[&str],
        command: &[&str],
        input: bool,
    ) -> Result<Child> {
        let mut arguments = vec!["run", "--rm", "--runtime", &self.runtime];
        arguments.extend(flags);
        arguments.extend([self.image, id]);
        arguments.extend(command);
        self.spawn_ctr(&arguments, input)
    }

    /// `ctr run --detach`, with nobody to hear what the container says.
    pub(crate) fn detach(&self, flags: &[&str], command: &[&str]) -> Result<()> {
        let mut arguments = vec!["run", "--detach", "--null-io", "--runtime", &self.runtime];
        arguments.extend(flags);
        arguments.extend([self.image, &self.id]);
        arguments.extend(command);
        self.ctr(&arguments)?.success()?;
        Ok(())
    }

    /// `ctr run -t`, in a terminal of that size.
    pub(crate) fn terminal(&self, rows: u16, columns: u16, command: &[&str]) -> Result<Terminal> {
        let deadline = self.deadline_s.to_string();
        let mut program = vec![
            "timeout",
            "--foreground",
            "--kill-after=5",
            &deadline,
            "ctr",
        ];
        program.extend(["run", "--rm", "-t", "--runtime", &self.runtime]);
        program.extend([self.image, &self.id]);
        program.extend(command);
        Terminal::run(rows, columns, &program)
    }

    /// The same for a further container.
    pub(crate) fn beside(&self, name: &str) -> Self {
        Self {
            runtime: self.runtime.clone(),
            id: format!("{}-{name}", self.id),
            address: self.address.clone(),
            ..*self
        }
    }

    pub(crate) fn runtime(&self) -> &str {
        &self.runtime
    }

    pub(crate) fn is_husk(&self) -> bool {
        self.runtime.contains("husk")
    }

    /// `ctr task` and others, as they are typed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<Ended> {
        finish(self.spawn_ctr(arguments, false)?, None)
    }

    /// `ctr task rm` of a task that has ended with that status, which ctr 1.x tells in a warning
    /// and ctr 2.x as its own status.
    pub(crate) fn remove_task(&self, status: i32) -> Result<()> {
        let removed = self.ctr(&["task", "rm", &self.id])?;
        ensure!(
            removed.status == status || removed.stderr.contains(&format!("code {status}")),
            "task rm gave {}: {}",
            removed.status,
            removed.stderr
        );
        Ok(())
    }

    /// Removes whatever a failed scenario has left, as far as that goes.
    pub(crate) fn bury(&self) {
        for arguments in [
            ["task", "rm", "--force", &self.id].as_slice(),
            &["container", "rm", &self.id],
            &["snapshot", "rm", &self.id],
        ] {
            let _ = self.ctr(arguments);
        }
    }

    /// The same in the background.
    pub(crate) fn spawn_ctr(&self, arguments: &[&str], input: bool) -> Result<Child> {
        let mut command = Command::new("timeout");
        if let Some(address) = &self.address {
            command.env("CONTAINERD_ADDRESS", address);
        }
        command
            .arg("--kill-after=5")
            .arg(self.deadline_s.to_string())
            .arg("ctr")
            .args(arguments)
            .stdin(if input { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ctr")
    }
}

/// Feeds the input and collects the output.
pub(crate) fn finish(mut child: Child, input: Option<&[u8]>) -> Result<Ended> {
    let stdin = child.stdin.take();
    let output: Output = thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            scope.spawn(move || stdin.write_all(input));
        }
        child.wait_with_output()
    })
    .context("ctr was lost")?;
    Ok(Ended {
        status: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
