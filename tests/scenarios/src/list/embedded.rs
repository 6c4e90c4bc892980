//! `husk run`, with no containerd there.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};

use crate::ctr::Ctr;
use crate::host;
use crate::pty::Terminal;
use crate::spec::make_root;

const PLACE: &str = "/var/tmp/husk-embedded";

/// The same commands as with containerd, on a directory.
pub(super) fn without_containerd(_: &Ctr) -> Result<()> {
    host::containerd()?.kill()?;
    let result = make_root(Path::new(PLACE)).and_then(|()| run_all());
    fs::remove_dir_all(PLACE)?;
    host::start_containerd()?;
    result
}

fn run_all() -> Result<()> {
    let host = rustix::system::uname();
    let uname = husk(&[], &["uname", "-r"])?;
    let release = String::from_utf8_lossy(&uname.stdout).trim_end().to_owned();
    ensure!(uname.status.success(), "uname ended badly: {uname:?}");
    ensure!(
        release.starts_with(char::is_numeric) && release != host.release().to_string_lossy(),
        "it runs on kernel {release:?}"
    );

    let ended = husk(
        &["--env", "WORD=husk"],
        &["sh", "-c", "echo $WORD; echo oh >&2; exit 7"],
    )?;
    ensure!(ended.status.code() == Some(7), "not 7: {ended:?}");
    ensure!(ended.stdout == b"husk\n", "its output: {ended:?}");
    ensure!(ended.stderr == b"oh\n", "its other output: {ended:?}");

    let missing = husk(&[], &["no-such-command"])?;
    ensure!(missing.status.code() == Some(127), "not 127: {missing:?}");
    let text = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(text.contains("no-such-command"), "not named: {text}");

    let script = "read word && echo \"the word is $word\"; stty size
        trap 'echo interrupted; exit 9' INT; trap 'stty size' WINCH; echo ready
        sleep 1000 & while :; do wait; done";
    let mut terminal = Terminal::run(33, 77, &["husk", "run", PLACE, "--", "sh", "-c", script])?;
    terminal.type_in("husk\r")?;
    terminal.until("the word is husk")?;
    terminal.until("33 77")?;
    terminal.until("ready")?;
    terminal.resize(44, 88)?;
    terminal.until("44 88")?;
    terminal.type_in("\x03")?;
    let (status, seen) = terminal.end()?;
    ensure!(
        status == 9,
        "in a terminal, it ended with {status}: {seen:?}"
    );
    Ok(())
}

fn husk(flags: &[&str], command: &[&str]) -> Result<Output> {
    Command::new("timeout")
        .args(["--kill-after=5", "120", "husk", "run"])
        .args(flags)
        .args([PLACE, "--"])
        .args(command)
        .stdin(Stdio::null())
        .output()
        .context("cannot run husk")
}
