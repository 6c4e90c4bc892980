//! What a user of Docker does, with the runtime's name and nothing else changed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::ctr::{Ctr, Ended};
use crate::docker::Docker;

use super::disks::Loop;

/// Files of a scenario, on the host.
const PLACE: &str = "/var/tmp/husk-docker-files";

/// Lets everything happen but the making of directories.
const PROFILE: &str = r#"{ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }] }"#;

/// Containers that do one thing each.
pub(super) fn containers(ctr: &Ctr) -> Result<()> {
    let docker = Docker::start(ctr.runtime())?;
    let done = make_files()
        .and_then(|()| terminal(&docker))
        .and_then(|()| confined(&docker))
        .and_then(|()| devices(&docker))
        .and_then(|()| missing_command(&docker))
        .and_then(|()| killed_and_restarted(&docker));
    fs::remove_dir_all(PLACE)?;
    done?;
    docker.stop()
}

fn make_files() -> Result<()> {
    fs::create_dir_all(Path::new(PLACE).join("volume"))?;
    fs::write(Path::new(PLACE).join("volume/file"), "from the host\n")?;
    fs::write(Path::new(PLACE).join("profile.json"), PROFILE)?;
    Ok(())
}

/// `-it`: a terminal of the user's size, and the status of what ran in it.
fn terminal(docker: &Docker) -> Result<()> {
    let script = "test -t 0 && test -t 1 && read word && echo \"the word is $word\"; exit 9";
    let mut terminal = docker.terminal(31, 71, &["sh", "-c", script])?;
    terminal.type_in("husk\r")?;
    terminal.until("the word is husk")?;
    let (status, seen) = terminal.end()?;
    ensure!(status == 9, "-it ended with {status}: {seen:?}");
    Ok(())
}

/// All that takes something away from a container, at once.
fn confined(docker: &Docker) -> Result<()> {
    let profile = format!("seccomp={PLACE}/profile.json");
    let volume = format!("{PLACE}/volume:/volume:ro");
    let flags = [
        "--read-only",
        "--network",
        "none",
        "--user",
        "1000:1001",
        "--workdir",
        "/usr",
        "--env",
        "WORD=husk",
        "--tmpfs",
        "/t:size=1m,mode=1777",
        "--volume",
        &volume,
        "--security-opt",
        &profile,
        "--security-opt",
        "no-new-privileges",
        "--hostname",
        "box",
        "--ulimit",
        "nofile=123:456",
        "--cap-drop",
        "ALL",
        "--pids-limit",
        "33",
    ];
    let script = "id -u; id -g; pwd; echo $WORD; hostname; ulimit -Sn; ulimit -Hn
        touch /x 2>/dev/null || echo root is read-only
        touch /volume/x 2>/dev/null || echo volume is read-only
        cat /volume/file
        touch /t/x && mkdir /t/d 2>/dev/null || echo no directories
        grep -E 'NoNewPrivs|Seccomp:|CapEff' /proc/self/status | tr -d '\\t'
        cat /sys/fs/cgroup/pids.max
        ls /sys/class/net";
    let said = docker.run(&flags, &["sh", "-c", script])?.success()?;
    let expected = "1000\n1001\n/usr\nhusk\nbox\n123\n456\n\
        root is read-only\nvolume is read-only\nfrom the host\nno directories\n\
        CapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n33\nlo";
    ensure!(said == expected, "a confined container says {said:?}");

    let flags = [
        "--network",
        "none",
        "--security-opt",
        "seccomp=unconfined",
        "--cap-add",
        "SYS_TIME",
    ];
    let script = "grep -E 'Seccomp:|CapEff' /proc/self/status | tr -d '\\t'";
    let said = docker.run(&flags, &["sh", "-c", script])?.success()?;
    ensure!(
        said == "CapEff:00000000aa0425fb\nSeccomp:0",
        "an unconfined container says {said:?}"
    );
    Ok(())
}

/// `--device`: a disk of the host, to write and to read only, and a device that every machine has.
fn devices(docker: &Docker) -> Result<()> {
    let file = Path::new(PLACE).join("disk");
    let disk = Loop::with(&file, "from the host\n")?;
    let disk = disk.path().display();
    let flags = |access: &str| {
        let disk = format!("{disk}:/dev/disk:{access}");
        [
            "--network",
            "none",
            "--device",
            "/dev/zero:/dev/nil",
            "--device",
            &disk,
        ]
        .map(str::to_owned)
    };
    for (access, script) in [
        (
            "rw",
            "head -n 1 /dev/disk; head -c 3 /dev/nil | wc -c
            echo written | dd of=/dev/disk conv=notrunc,fsync 2>/dev/null",
        ),
        (
            "r",
            "head -n 1 /dev/disk; head -c 3 /dev/nil | wc -c
            (: >>/dev/disk) 2>/dev/null || echo read-only",
        ),
    ] {
        let flags = flags(access);
        let flags = flags.each_ref().map(String::as_str);
        let said = docker.run(&flags, &["sh", "-c", script])?;
        let expected = match access {
            "rw" => "from the host\n3",
            _ => "written\n3\nread-only",
        };
        ensure!(said.text() == expected, "with {access} it says {said:?}");
    }
    Ok(())
}

/// Docker tells a missing command by the runtime's words.
fn missing_command(docker: &Docker) -> Result<()> {
    let Ended { status, stderr, .. } = docker.run(&["--network", "none"], &["no-such-command"])?;
    ensure!(
        status == 127 && stderr.contains("no-such-command"),
        "a missing command ended with {status}: {stderr}"
    );
    Ok(())
}

/// `kill`, `start` again, and a restart policy that gives up.
fn killed_and_restarted(docker: &Docker) -> Result<()> {
    docker.detach("killed", &["--network", "none"], &["sleep", "1000"])?;
    docker.says(&["kill", "killed"])?;
    let state = docker.inspect("killed", "{{.State.Status}} {{.State.ExitCode}}")?;
    ensure!(state == "exited 137", "killed, it is {state}");
    docker.says(&["rm", "killed"])?;

    let flags = ["--network", "none", "--restart", "on-failure:1"];
    docker.detach("restarted", &flags, &["sh", "-c", "exit 3"])?;
    let events = docker.events(&["container=restarted", "event=die"])?;
    for _ in 0..2 {
        events.wait_for("\"exitCode\":\"3\"")?;
    }
    docker.says(&["wait", "restarted"])?;
    let count = docker.inspect("restarted", "{{.RestartCount}} {{.State.ExitCode}}")?;
    ensure!(
        count == "1 3",
        "restarted so often, with a status of: {count}"
    );
    docker.says(&["rm", "restarted"])?;
    Ok(())
}

/// One container, and all that can be asked of it while it runs.
pub(super) fn long_lived(ctr: &Ctr) -> Result<()> {
    let docker = Docker::start(ctr.runtime())?;
    let flags = [
        "--init",
        "--memory",
        "64m",
        "--cpus",
        "0.5",
        "--health-cmd",
        "test -e /tmp/healthy",
        "--health-interval",
        "1s",
        "--health-timeout",
        "60s",
        "--health-retries",
        "1000",
    ];
    let script = "echo out; echo err >&2; trap 'echo bye; exit 9' TERM
        while :; do sleep 1000 & wait $!; done";
    docker.detach("long", &flags, &["sh", "-c", script])?;
    inside(&docker)?;
    from_outside(&docker, ctr.is_husk())?;
    limits(&docker)?;
    files(&docker)?;
    network(&docker)?;
    ends(&docker)?;
    docker.stop()
}

/// `exec` and `logs`.
fn inside(docker: &Docker) -> Result<()> {
    let init = docker.says(&["exec", "long", "cat", "/proc/1/comm"])?;
    ensure!(init == "docker-init", "--init gives {init:?}");
    let flags = [
        "--user",
        "1000:1001",
        "--env",
        "A=b",
        "--workdir",
        "/bin",
        "long",
    ];
    let exec = [
        &["exec"],
        &flags[..],
        &["sh", "-c", "id -u; id -g; echo $A; pwd; exit 5"],
    ];
    let ended = docker.docker(&exec.concat())?;
    ensure!(
        ended.status == 5 && ended.text() == "1000\n1001\nb\n/bin",
        "exec ended with {}: {:?} {}",
        ended.status,
        ended.text(),
        ended.stderr
    );
    let logs = docker.docker(&["logs", "long"])?;
    ensure!(
        logs.text() == "out" && logs.stderr.trim_end() == "err",
        "logs say {:?} and {:?}",
        logs.text(),
        logs.stderr
    );
    Ok(())
}

/// `top`, `stats`, `pause`, `inspect`, health.
fn from_outside(docker: &Docker, is_husk: bool) -> Result<()> {
    let top = docker.says(&["top", "long", "-o", "pid,comm"])?;
    let shown: Vec<_> = top.lines().skip(1).collect();
    let pid = docker.inspect("long", "{{.State.Pid}}")?;
    // Docker runs `ps` on the host, where a guest's processes are not. Health checks may be among
    // the others.
    let (is_count, name) = match is_husk {
        true => (shown.len() == 1, "husk-vmm"),
        false => (shown.len() >= 3, "docker-init"),
    };
    let is_init = |line: &&str| line.contains(&pid) && line.contains(name);
    ensure!(
        is_count && shown.iter().any(is_init),
        "top shows {top:?}, and init is {pid}"
    );
    let stats = [
        "stats",
        "--no-stream",
        "--format",
        "{{.PIDs}} {{.MemUsage}}",
        "long",
    ];
    let stats = docker.says(&stats)?;
    let count = stats.split(' ').next().map(str::parse::<u32>);
    ensure!(
        matches!(count, Some(Ok(3..))) && stats.ends_with("/ 64MiB") && !stats.contains(" 0B"),
        "stats says {stats:?}"
    );
    docker.says(&["pause", "long"])?;
    let state = docker.inspect("long", "{{.State.Status}}")?;
    docker.says(&["unpause", "long"])?;
    ensure!(state == "paused", "paused, it is {state}");
    let state = docker.inspect("long", "{{.State.Status}} {{.State.Running}}")?;
    ensure!(state == "running true", "unpaused, it is {state}");

    docker.says(&["exec", "long", "touch", "/tmp/healthy"])?;
    let events = docker.events(&["container=long", "event=health_status"])?;
    events.wait_for("health_status: healthy")?;
    let health = docker.inspect("long", "{{.State.Health.Status}}")?;
    ensure!(health == "healthy", "it is {health}");
    Ok(())
}

/// `--memory`, `--cpus`, and `update`.
fn limits(docker: &Docker) -> Result<()> {
    let read = [
        "exec",
        "long",
        "sh",
        "-c",
        "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max",
    ];
    let limits = docker.says(&read)?;
    ensure!(
        limits == "67108864\n50000 100000\nmax",
        "its limits are {limits:?}"
    );
    let update = [
        "update",
        "--memory",
        "96m",
        "--memory-swap",
        "96m",
        "--cpus",
        "0.75",
    ];
    docker.says(&[&update[..], &["--pids-limit", "44", "long"]].concat())?;
    let limits = docker.says(&read)?;
    ensure!(
        limits == "100663296\n75000 100000\n44",
        "updated, its limits are {limits:?}"
    );
    Ok(())
}

/// `cp`, into it and out of it.
fn files(docker: &Docker) -> Result<()> {
    fs::create_dir_all(PLACE)?;
    let copy = || {
        let (to, from) = (format!("{PLACE}/to"), format!("{PLACE}/from"));
        fs::write(&to, "to the container\n")?;
        docker.says(&["cp", &to, "long:/tmp/to"])?;
        let seen = docker.says(&["exec", "long", "cat", "/tmp/to"])?;
        ensure!(seen == "to the container", "cp brought {seen:?}");
        docker.says(&[
            "exec",
            "long",
            "sh",
            "-c",
            "echo from the container > /tmp/from",
        ])?;
        docker.says(&["cp", "long:/tmp/from", &from])?;
        let seen = fs::read_to_string(&from)?;
        ensure!(seen == "from the container\n", "cp brought back {seen:?}");
        Ok(())
    };
    let copied = copy();
    fs::remove_dir_all(PLACE)?;
    copied
}

/// Docker puts an interface into the namespace of the pid that it was told.
fn network(docker: &Docker) -> Result<()> {
    let address = docker.inspect("long", "{{.NetworkSettings.Networks.bridge.IPAddress}}")?;
    let pid = docker.inspect("long", "{{.State.Pid}}")?;
    let seen = Command::new("nsenter")
        .args([
            "--target", &pid, "--net", "ip", "-brief", "address", "show", "eth0",
        ])
        .output()?;
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    ensure!(
        seen.contains(&address),
        "no {address} in the namespace: {seen:?}"
    );
    let hosts = docker.says(&["exec", "long", "cat", "/etc/hosts"])?;
    ensure!(
        hosts.contains(&address),
        "/etc/hosts lacks {address}: {hosts:?}"
    );
    Ok(())
}

/// `stop` is SIGTERM to the container's init, which `--init` passes on.
fn ends(docker: &Docker) -> Result<()> {
    docker.says(&["stop", "--time", "60", "long"])?;
    let state = docker.inspect("long", "{{.State.Status}} {{.State.ExitCode}}")?;
    ensure!(state == "exited 9", "stopped, it is {state}");
    let logs = docker.says(&["logs", "--tail", "1", "long"])?;
    ensure!(logs == "bye", "its last line is {logs:?}");
    docker.says(&["start", "long"])?;
    let state = docker.inspect("long", "{{.State.Status}}")?;
    ensure!(state == "running", "started again, it is {state}");
    docker.says(&["rm", "--force", "long"])?;
    Ok(())
}
