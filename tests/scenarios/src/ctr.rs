//! What a user types: `ctr`.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};

/// The image every scenario runs.
const IMAGE: &str = "docker.io/library/busybox:latest";

/// How long one `ctr` may take, in seconds. The testbed is some twenty times slower than metal.
const CTR_DEADLINE_S: &str = "120";

/// `ctr` with one runtime and one container's name.
pub(crate) struct Ctr {
    runtime: String,
    /// The container of this scenario.
    pub(crate) id: String,
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
        arguments.extend([IMAGE, id]);
        arguments.extend(command);
        spawn(&arguments, input)
    }

    /// `ctr run --detach`.
    pub(crate) fn detach(&self, command: &[&str]) -> Result<()> {
        let mut arguments = vec![
            "run",
            "--detach",
            "--runtime",
            &self.runtime,
            IMAGE,
            &self.id,
        ];
        arguments.extend(command);
        // A container that stays holds the output open: nothing of it is wanted.
        let status = command_of(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("cannot run ctr")?;
        ensure!(status.success(), "ctr run --detach ended with {status}");
        Ok(())
    }

    pub(crate) fn is_husk(&self) -> bool {
        self.runtime.contains("husk")
    }

    /// `ctr run -t` in a terminal of 33 rows and 77 columns, which script(1) makes.
    pub(crate) fn run_in_terminal(&self, command: &[&str]) -> Result<String> {
        let quoted: Vec<_> = command
            .iter()
            .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
            .collect();
        let line = format!(
            "stty rows 33 cols 77; exec ctr run --rm -t --runtime {} {IMAGE} {} {}",
            self.runtime,
            self.id,
            quoted.join(" ")
        );
        let child = Command::new("timeout")
            .args([
                "--kill-after=5",
                CTR_DEADLINE_S,
                "script",
                "-qec",
                &line,
                "/dev/null",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run script(1)")?;
        finish(child, None)?.success()
    }

    /// `ctr task` and others, as they are typed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<Ended> {
        finish(spawn(arguments, false)?, None)
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
}

fn command_of(arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", CTR_DEADLINE_S, "ctr"])
        .args(arguments);
    command
}

fn spawn(arguments: &[&str], input: bool) -> Result<Child> {
    command_of(arguments)
        .stdin(if input { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ctr")
}

/// Feeds the input and collects the output.
fn finish(mut child: Child, input: Option<&[u8]>) -> Result<Ended> {
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
