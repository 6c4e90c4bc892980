//! Ends that nobody has asked for. Each becomes an exit with a status, and a reason in the log.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use crate::ctr::{Ctr, finish};
use crate::events::Events;
use crate::fifo::Place;
use crate::host;
use crate::shim::{Shim, Streams, granted};

/// From the cause to the user's answer, in the testbed.
const END_BOUND: Duration = Duration::from_secs(60);

/// How long a shim stands still.
const SHIM_STOPPED: Duration = Duration::from_secs(30);

/// Enough for all but what is meant to be killed.
const MEMORY_LIMIT: &str = "50331648";

/// Takes memory until it is killed, which gives all of it back.
const EATER: [&str; 2] = [
    "awk",
    "BEGIN { x = \"0123456789abcdef\"; while (1) x = x x }",
];

/// A file system that is full soon.
const SMALL_BYTES: usize = 64 * 1024;

/// The kernel panics at the OOM kill that it is told to panic at.
const PANIC: &str = "echo 2 > /proc/sys/vm/panic_on_oom
    dd if=/dev/zero of=/dev/shm/x bs=1M count=64
    sleep 1000";

/// Process 1 loses its code, and dies as it hears of the container's end. The container can't see
/// that process; but the kernel runs the program that takes core dumps outside of all containers.
const KILL_AGENT: &str = r#"cp "$(readlink -f /bin/sh)" /busybox
    cat > /k <<'END'
range=$($1 grep -m1 r-xp /proc/1/maps | $1 cut -d' ' -f1)
from=$((0x${range%-*} / 4096)); to=$((0x${range#*-} / 4096))
exec $1 dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$from count=$((to - from)) conv=notrunc
END
    echo 1 > /proc/sys/kernel/core_pipe_limit
    echo '|/proc/%P/root/busybox sh /proc/%P/root/k /proc/%P/root/busybox' > /proc/sys/kernel/core_pattern
    sh -c 'kill -SEGV $$'
    exit 3"#;

pub(super) fn guest_panic(ctr: &Ctr) -> Result<()> {
    end_of_guest(ctr, PANIC, "panic_on_oom")
}

pub(super) fn agent_killed(ctr: &Ctr) -> Result<()> {
    end_of_guest(ctr, KILL_AGENT, "Attempted to kill init")
}

/// A script with every right ends its guest, and the log has the kernel's last word.
fn end_of_guest(ctr: &Ctr, script: &str, last_word: &str) -> Result<()> {
    let began = Instant::now();
    let flags = ["--privileged", "--memory-limit", MEMORY_LIMIT];
    let ended = ctr.run(&flags, &["sh", "-c", script])?;
    let took = began.elapsed();
    ensure!(
        ended.status == 137,
        "it ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(took < END_BOUND, "it took {took:?}");
    let gone = host::log_line(&["virtual machine is gone", &ctr.id])?;
    ensure!(gone.contains("reset itself"), "no reason: {gone}");
    ensure!(gone.contains(last_word), "no last word: {gone}");
    Ok(())
}

/// What takes all memory of its guest is killed, and the guest lives on.
pub(super) fn guest_out_of_memory(ctr: &Ctr) -> Result<()> {
    ctr.detach(&[], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;
    let began = Instant::now();
    let status = shim.run("hungry", &Streams::default(), &EATER)?;
    let took = began.elapsed();
    ensure!(status == 137, "it ended with {status}");
    ensure!(took < END_BOUND, "it took {took:?}");
    let status = shim.run("after", &Streams::default(), &["true"])?;
    ensure!(status == 0, "afterwards an exec ended with {status}");
    ctr.bury();
    Ok(())
}

/// A process whose log is full is told so instead of waiting for ever, and a volume that is full is
/// as full in the container.
pub(super) fn full_disk(ctr: &Ctr) -> Result<()> {
    let place = Place::make("full")?;
    let small = place.at("small");
    fs::create_dir(&small)?;
    let mounted = Command::new("mount")
        .args([
            "-t",
            "tmpfs",
            "-o",
            &format!("size={SMALL_BYTES}"),
            "small",
            &small,
        ])
        .status()?;
    ensure!(mounted.success(), "cannot mount a small file system");
    let result = fill(ctr, &small);
    ctr.bury();
    let unmounted = Command::new("umount").arg(&small).status()?;
    result?;
    ensure!(unmounted.success(), "the small file system is in use");
    Ok(())
}

fn fill(ctr: &Ctr, small: &str) -> Result<()> {
    let mount = format!("type=bind,src={small},dst=/small,options=rbind:rw");
    ctr.detach(&["--mount", &mount], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;
    let count = SMALL_BYTES * 2 / 1024;
    let script = format!("dd if=/dev/zero of=/small/file bs=1k count={count} 2>&1; rm /small/file");
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "fill",
        &ctr.id,
        "sh",
        "-c",
        &script,
    ];
    let ended = ctr.ctr(&exec)?;
    ensure!(
        ended.text().contains("No space left on device"),
        "a full volume: {ended:?}"
    );
    if ctr.is_husk() {
        // runc's shim stops reading, and the process hangs.
        let streams = Streams {
            stdout: format!("file://{small}/log"),
            ..Streams::default()
        };
        let status = shim.run("log", &streams, &["head", "-c", "10000000", "/dev/zero"])?;
        // 128 + SIGPIPE, or head's own answer to the error.
        ensure!(
            [1, 141].contains(&status),
            "with a full log it ended with {status}"
        );
        let logged = host::log_line(&["output is lost", "No space left on device"])?;
        ensure!(
            logged.contains(&ctr.id),
            "the log does not say whose: {logged}"
        );
        fs::remove_file(format!("{small}/log"))?;
    }
    let status = shim.run("after", &Streams::default(), &["true"])?;
    ensure!(status == 0, "afterwards an exec ended with {status}");
    Ok(())
}

/// What ends while its shim stands still is told of when that goes on.
pub(super) fn shim_stopped(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    let child = ctr.spawn(
        &ctr.id,
        &[],
        &["sh", "-c", "sleep 3; echo done; exit 5"],
        false,
    )?;
    events.until(&["/tasks/start", &ctr.id])?;
    let shims = host::shims(&ctr.id)?;
    ensure!(!shims.is_empty(), "there is no shim");
    for shim in &shims {
        shim.signal(Signal::STOP)?;
    }
    // What is tested is that so much time passes.
    thread::sleep(SHIM_STOPPED);
    for shim in &shims {
        shim.signal(Signal::CONT)?;
    }
    let began = Instant::now();
    events.until(&["/tasks/exit", &ctr.id])?;
    let ended = finish(child, None)?;
    let took = began.elapsed();
    ensure!(took < END_BOUND, "it took {took:?}");
    ensure!(
        ended.status == 5,
        "it ended with {}: {}",
        ended.status,
        ended.stderr
    );
    ensure!(ended.text() == "done", "it said {:?}", ended.text());
    Ok(())
}

/// Every event of a container's life, in order; init's exit is the last of the exits.
pub(super) fn events_in_order(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    let flags = ["--memory-limit", MEMORY_LIMIT];
    ctr.detach(&flags, &["sleep", "1000"])?;
    let id = ctr.id.as_str();
    events.until(&["/tasks/create", id])?;
    events.until(&["/tasks/start", id])?;
    let shim = Shim::of(id)?;
    let none = Streams::default();
    let status = shim.run("hungry", &none, &EATER)?;
    ensure!(status == 137, "without memory it ended with {status}");
    events.until(&["/tasks/exec-added", id, "hungry"])?;
    events.until(&["/tasks/exec-started", id, "hungry"])?;
    // The kill and the exit are told by different parties.
    let mut last = [
        events.until(&["/tasks/", id])?,
        events.until(&["/tasks/", id])?,
    ];
    last.sort();
    ensure!(
        last.iter().any(|line| line.contains("/tasks/oom"))
            && last
                .iter()
                .any(|line| line.contains("/tasks/exit") && line.contains("137")),
        "after the kill: {last:?}"
    );
    granted(shim.exec("alive", &none, &["sleep", "1000"]))?;
    granted(shim.start("alive"))?;
    events.until(&["/tasks/exec-started", id, "alive"])?;
    granted(shim.pause())?;
    granted(shim.resume())?;
    events.until(&["/tasks/paused", id])?;
    events.until(&["/tasks/resumed", id])?;
    granted(shim.kill("", 9, true))?;
    let first = events.until(&["/tasks/exit", id])?;
    ensure!(first.contains("alive"), "init's exit came first: {first}");
    let second = events.until(&["/tasks/", id])?;
    ensure!(
        second.contains("/tasks/exit"),
        "after the exec's exit: {second}"
    );
    ctr.remove_task(137)?;
    // runc's shim is told to end as soon as it has answered, and on containerd 2.1 it sometimes does
    // before this event of its own is on its way.
    if ctr.is_husk() {
        events.until(&["/tasks/delete", id])?;
    }
    ctr.ctr(&["container", "rm", id])?.success()?;
    Ok(())
}
