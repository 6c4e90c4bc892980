//! What a user tries first.

use std::io::Read;

use anyhow::{Context, Result, ensure};

use crate::ctr::{Ctr, finish};

/// `uname -r` is the guest's kernel with Husk and the host's with runc.
pub(super) fn own_kernel(ctr: &Ctr) -> Result<()> {
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

pub(super) fn exit_status(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["sh", "-c", "exit 7"])?;
    ensure!(
        ended.status == 7,
        "ended with {}, not 7: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

pub(super) fn signal_status(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"])?;
    ensure!(
        ended.status == 143,
        "ended with {}, not 143: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

pub(super) fn missing_command(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&[], &["no-such-command"])?;
    ensure!(ended.status != 0, "a missing command succeeded");
    ensure!(
        ended.stderr.contains("no-such-command"),
        "not named: {}",
        ended.stderr
    );
    Ok(())
}

pub(super) fn bad_user(ctr: &Ctr) -> Result<()> {
    let ended = ctr.run(&["--user", "no-such-user"], &["true"])?;
    ensure!(ended.status != 0, "an unknown user succeeded");
    ensure!(ended.stderr.contains("user"), "not named: {}", ended.stderr);
    Ok(())
}

pub(super) fn streams_apart(ctr: &Ctr) -> Result<()> {
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

pub(super) fn stdin_to_its_end(ctr: &Ctr) -> Result<()> {
    let input: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let ended = ctr.run_with_input(&[], &["cat"], Some(&input))?;
    ensure!(
        ended.status == 0,
        "ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(
        ended.stdout == input,
        "{} of {} bytes came back, or they differ",
        ended.stdout.len(),
        input.len()
    );
    Ok(())
}

/// A process that ends at once after its output loses none of it.
pub(super) fn much_output(ctr: &Ctr) -> Result<()> {
    const BYTES: usize = 100 * 1024 * 1024;
    let script = format!("yes 'much output' | head -c {BYTES}");
    let mut child = ctr.spawn(&ctr.id, &[], &["sh", "-c", &script], false)?;
    let mut stdout = child.stdout.take().context("no output")?;
    let wanted: Vec<u8> = b"much output\n".repeat(64 * 1024);
    let (mut buffer, mut count) = (vec![0; wanted.len()], 0);
    let mut is_same = true;
    loop {
        let read = stdout.read(&mut buffer)?;
        let got = buffer.get(..read).unwrap_or_default();
        if got.is_empty() {
            break;
        }
        let at = count % b"much output\n".len();
        // The last bytes of a full buffer lie beyond the pattern, which repeats.
        let repeated = wanted.iter().cycle().skip(at);
        is_same &= got.iter().zip(repeated).all(|(a, b)| a == b);
        count += read;
    }
    let status = child.wait()?;
    ensure!(status.success(), "ended with {status}");
    ensure!(
        is_same && count == BYTES,
        "{count} of {BYTES} bytes arrived, or they differ"
    );
    Ok(())
}

pub(super) fn environment(ctr: &Ctr) -> Result<()> {
    // containerd 1.6's ctr has no --user.
    let flags = ["--env", "WORD=husk", "--cwd", "/tmp"];
    let script = "echo $WORD; pwd; id -u; id -g; cat /proc/1/comm; hostname >/dev/null";
    let said = ctr.run(&flags, &["sh", "-c", script])?.success()?;
    ensure!(said == "husk\n/tmp\n0\n0\nsh", "it said {said:?}");
    Ok(())
}

/// A terminal has its user's size, follows it, and passes Ctrl-C on.
pub(super) fn terminal(ctr: &Ctr) -> Result<()> {
    let typed = ctr
        .run(&[], &["sh", "-c", "test -t 0 && echo tty || echo none"])?
        .success()?;
    ensure!(typed == "none", "without -t: {typed:?}");

    // Signals other than those of the traps don't interrupt what the shell waits for.
    let script = "test -t 0 && test -t 1 && test -t 2 && read word && echo \"the word is $word\"
        stty size
        trap 'echo interrupted; exit 9' INT; trap 'stty size' WINCH; echo ready
        sleep 1000 & while :; do wait; done";
    let mut terminal = ctr.terminal(33, 77, &["sh", "-c", script])?;
    terminal.type_in("husk\r")?;
    terminal.until("the word is husk")?;
    terminal.until("33 77")?;
    terminal.until("ready")?;
    terminal.resize_until(88, |rows, columns| format!("{rows} {columns}"))?;
    terminal.type_in("\x03")?;
    terminal.until("interrupted")?;
    let (status, seen) = terminal.end()?;
    ensure!(status == 9, "ended with {status}: {seen:?}");
    Ok(())
}

pub(super) fn exec_kill_ps_rm(ctr: &Ctr) -> Result<()> {
    let id = ctr.id.as_str();
    ctr.detach(&[], &["sleep", "1000"])?;
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
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", id])?.success()?;
    Ok(())
}

/// Ten containers that start at the same time all run, each with its own words.
pub(super) fn ten_at_once(ctr: &Ctr) -> Result<()> {
    let mut started = Vec::new();
    for number in 0..10 {
        let id = format!("{}-{number}", ctr.id);
        let script = format!("echo this is {number}; exit {number}");
        started.push((number, ctr.spawn(&id, &[], &["sh", "-c", &script], false)?));
    }
    let mut wrong = Vec::new();
    for (number, child) in started {
        let ended = finish(child, None)?;
        if ended.status != number || ended.text() != format!("this is {number}") {
            wrong.push((number, ended));
        }
    }
    ensure!(wrong.is_empty(), "not as they should be: {wrong:?}");
    Ok(())
}

pub(super) fn missing_image(ctr: &Ctr) -> Result<()> {
    let image = "example.invalid/no-such-image:latest";
    let ended = ctr.ctr(&["run", "--rm", "--runtime", ctr.runtime(), image, &ctr.id])?;
    ensure!(ended.status != 0, "a missing image was run");
    ensure!(
        ended.stderr.contains("no-such-image"),
        "not named: {}",
        ended.stderr
    );
    Ok(())
}
