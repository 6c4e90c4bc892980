//! The scenarios.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use anyhow::{Context, Result, ensure};

use crate::ctr::Ctr;

type Scenario = fn(&Ctr) -> Result<()>;

/// All of them, in the order they run.
pub(crate) const SCENARIOS: [(&str, Scenario); 11] = [
    ("own_kernel", own_kernel),
    ("exit_status", exit_status),
    ("signal_status", signal_status),
    ("missing_command", missing_command),
    ("bad_user", bad_user),
    ("streams_apart", streams_apart),
    ("stdin_to_its_end", stdin_to_its_end),
    ("much_output", much_output),
    ("environment", environment),
    ("terminal", terminal),
    ("exec_kill_ps_rm", exec_kill_ps_rm),
];

/// `uname -r` is the guest's kernel with Husk and the host's with runc.
fn own_kernel(ctr: &Ctr) -> Result<()> {
    let host = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let seen = ctr.run(&[], &["uname", "-r"])?.success()?;
    ensure!(
        (seen == host) != ctr.is_husk(),
        "the container sees kernel {seen:?}, the host has {host:?}"
    );
    ensure!(
        seen.starts_with(char::is_numeric),
        "not a kernel release: {seen:?}"
    );
    Ok(())
}

fn exit_status(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["sh", "-c", "exit 7"])?;
    ensure!(
        ended.status == 7,
        "ended with {}, not 7: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

fn signal_status(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"])?;
    ensure!(
        ended.status == 143,
        "ended with {}, not 143: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

fn missing_command(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["no-such-command"])?;
    ensure!(ended.status != 0, "a missing command succeeded");
    ensure!(
        ended.stderr.contains("no-such-command"),
        "not named: {}",
        ended.stderr
    );
    Ok(())
}

fn bad_user(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&["--user", "no-such-user"], &["true"])?;
    ensure!(ended.status != 0, "an unknown user succeeded");
    ensure!(ended.stderr.contains("user"), "not named: {}", ended.stderr);
    Ok(())
}

fn streams_apart(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["sh", "-c", "echo out; echo err >&2"])?;
    ensure!(
        ended.status == 0,
        "ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(ended.text() == "out", "stdout: {:?}", ended.text());
    ensure!(
        ended.stderr.trim_end() == "err",
        "stderr: {:?}",
        ended.stderr
    );
    Ok(())
}

fn stdin_to_its_end(ctr: &Ctr) -> Result<()> {
    let input: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let ended = ctr.run_with_input(&[], &["cat"], Some(&input))?;
    ensure!(
        ended.status == 0,
        "ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(
        digest(&ended.stdout) == digest(&input),
        "{} of {} bytes came back, or they differ",
        ended.stdout.len(),
        input.len()
    );
    Ok(())
}

/// A process that ends at once after its output loses none of it.
fn much_output(ctr: &Ctr) -> Result<()> {
    const BYTES: usize = 8 * 1024 * 1024;
    let script = format!("yes husk | head -c {BYTES}");
    let ended = ctr.run(&[], &["sh", "-c", &script])?;
    ensure!(
        ended.status == 0,
        "ended with {}: {}",
        ended.status,
        ended.stderr
    );
    let wanted: Vec<u8> = b"husk\n".iter().copied().cycle().take(BYTES).collect();
    ensure!(
        digest(&ended.stdout) == digest(&wanted),
        "{} of {BYTES} bytes arrived, or they differ",
        ended.stdout.len()
    );
    Ok(())
}

fn environment(ctr: &Ctr) -> Result<()> {
    let flags = ["--env", "WORD=husk", "--cwd", "/tmp", "--user", "1000:1001"];
    let script = "echo $WORD; pwd; id -u; id -g; cat /proc/1/comm; hostname >/dev/null";
    let said = ctr.run(&flags, &["sh", "-c", script])?.success()?;
    ensure!(said == "husk\n/tmp\n1000\n1001\nsh", "it said {said:?}");
    Ok(())
}

/// ctr insists on a terminal of its own, so `script` gives it one.
fn terminal(ctr: &Ctr) -> Result<()> {
    let typed = ctr
        .run(&[], &["sh", "-c", "test -t 0 && echo tty || echo none"])?
        .success()?;
    ensure!(typed == "none", "without -t: {typed:?}");
    let said = ctr.run_in_terminal(&["sh", "-c", "test -t 0 && test -t 1 && stty size"])?;
    ensure!(
        said.contains("33 77"),
        "with -t and a terminal of 33 by 77: {said:?}"
    );
    Ok(())
}

fn exec_kill_ps_rm(ctr: &Ctr) -> Result<()> {
    let id = ctr.id.as_str();
    ctr.detach(&["sleep", "1000"])?;
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "e1",
        id,
        "sh",
        "-c",
        "echo inside; exit 3",
    ];
    let ended = ctr.ctr(&exec)?;
    ensure!(
        ended.status == 3,
        "exec ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(ended.text() == "inside", "exec said {:?}", ended.text());
    let missing = ctr.ctr(&["task", "exec", "--exec-id", "e2", id, "no-such-command"])?;
    ensure!(missing.status != 0, "exec of a missing command succeeded");
    ensure!(
        missing.stderr.contains("no-such-command"),
        "not named: {}",
        missing.stderr
    );

    let listed = ctr.ctr(&["task", "ls"])?.success()?;
    let line = listed
        .lines()
        .find(|line| line.starts_with(id))
        .context("task ls lacks it")?;
    ensure!(line.ends_with("RUNNING"), "task ls says {line:?}");
    let processes = ctr.ctr(&["task", "ps", id])?.success()?;
    ensure!(processes.lines().count() >= 2, "task ps says {processes:?}");

    ctr.ctr(&["task", "kill", "--signal", "SIGKILL", id])?
        .success()?;
    let removed = ctr.ctr(&["task", "rm", id])?;
    ensure!(
        removed.status == 137,
        "task rm gave {}: {}",
        removed.status,
        removed.stderr
    );
    ctr.ctr(&["container", "rm", id])?.success()?;
    Ok(())
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
