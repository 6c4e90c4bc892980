//! Docker, and what its user types.
//!
//! The daemon runs beside the machine's own containerd, with a directory of its own, for as long as
//! a scenario needs it. The image is the one that `ctr` runs.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::ctr::{Ended, finish};
use crate::host;
use crate::pty::Terminal;

/// What Docker calls the image.
pub(crate) const IMAGE: &str = "busybox:latest";

const DATA: &str = "/var/tmp/husk-docker";
const RUN: &str = "/run/docker";
const SOCKET: &str = "/run/docker.sock";
const CONTAINERD: &str = "/run/containerd/containerd.sock";
const LOG: &str = "/var/log/dockerd.log";

/// A daemon that does not end with its scenario ends then, in seconds.
const DAEMON_DEADLINE: &str = "1500";

/// For one `docker`, in seconds.
const DOCKER_DEADLINE: &str = "240";

/// For the daemon to be there, and for an event that is due.
const DEADLINE: Duration = Duration::from_secs(180);

/// A daemon, and the runtime it is asked for.
pub(crate) struct Docker {
    runtime: String,
    daemon: Child,
}

impl Docker {
    /// Starts the daemon and gives it the image.
    pub(crate) fn start(runtime: &str) -> Result<Self> {
        // What an earlier run has left.
        let _ = fs::remove_file(SOCKET);
        fs::create_dir_all(DATA)?;
        let log = File::create(LOG).context("cannot make a log for dockerd")?;
        let daemon = Command::new("timeout")
            .args(["--kill-after=30", DAEMON_DEADLINE, "dockerd"])
            .args(["--data-root", DATA, "--exec-root", RUN])
            .args(["--containerd", CONTAINERD, "--storage-driver", "overlay2"])
            .args(["--host", &format!("unix://{SOCKET}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot run dockerd")?;
        let docker = Self {
            runtime: runtime.to_owned(),
            daemon,
        };
        let is_there = host::path_becomes(Path::new(SOCKET), true, Instant::now() + DEADLINE)?;
        ensure!(is_there, "dockerd makes no socket: {}", last_words());
        // Answered as soon as it is ready.
        let ready = docker.docker(&["version"])?;
        ensure!(
            ready.status == 0,
            "dockerd does not answer: {}",
            last_words()
        );
        docker.load_image()?;
        Ok(docker)
    }

    fn load_image(&self) -> Result<()> {
        let archive = format!("{DATA}/image.tar");
        let name = "docker.io/library/busybox:latest";
        let exported = Command::new("timeout")
            .args([DOCKER_DEADLINE, "ctr", "image", "export", &archive, name])
            .status()?;
        ensure!(exported.success(), "ctr image export ended with {exported}");
        self.docker(&["load", "--input", &archive])?.success()?;
        Ok(())
    }

    /// `docker`, as it is typed.
    pub(crate) fn docker(&self, arguments: &[&str]) -> Result<Ended> {
        finish(spawn(arguments)?, None)
    }

    /// The same, which must succeed, and what it says.
    pub(crate) fn says(&self, arguments: &[&str]) -> Result<String> {
        let ended = self.docker(arguments)?;
        let command = arguments.join(" ");
        ended.success().with_context(|| format!("docker {command}"))
    }

    /// `docker run --rm` of the image, with flags before it.
    pub(crate) fn run(&self, flags: &[&str], command: &[&str]) -> Result<Ended> {
        self.docker(&self.run_arguments(&["--rm"], flags, command))
    }

    /// `docker run --detach`, under a name.
    pub(crate) fn detach(&self, name: &str, flags: &[&str], command: &[&str]) -> Result<()> {
        let named = ["--detach", "--name", name];
        self.says(&self.run_arguments(&named, flags, command))?;
        Ok(())
    }

    /// `docker run --rm -it`, in a terminal.
    pub(crate) fn terminal(&self, rows: u16, columns: u16, command: &[&str]) -> Result<Terminal> {
        let mut program = vec!["timeout", "--foreground", DOCKER_DEADLINE, "docker"];
        program.extend(self.run_arguments(&["--rm", "-it"], &["--network", "none"], command));
        Terminal::run(rows, columns, &program)
    }

    fn run_arguments<'a>(
        &'a self,
        kind: &[&'a str],
        flags: &[&'a str],
        command: &[&'a str],
    ) -> Vec<&'a str> {
        let runtime = ["run", "--runtime", &self.runtime];
        [&runtime[..], kind, flags, &[IMAGE], command].concat()
    }

    /// `docker inspect` of one thing.
    pub(crate) fn inspect(&self, name: &str, template: &str) -> Result<String> {
        self.says(&["inspect", "--format", template, name])
    }

    /// Listens to events of one kind, from the daemon's start on.
    pub(crate) fn events(&self, filters: &[&str]) -> Result<Events> {
        let mut arguments = vec!["events", "--since", "1", "--format", "{{json .}}"];
        for filter in filters {
            arguments.extend(["--filter", filter]);
        }
        Events::of(spawn(&arguments)?)
    }

    /// Ends the daemon and removes all that it has made.
    pub(crate) fn stop(mut self) -> Result<()> {
        let all = self.says(&["ps", "--all", "--quiet"])?;
        if !all.is_empty() {
            let remove = [
                &["rm", "--force", "--volumes"],
                &all.lines().collect::<Vec<_>>()[..],
            ];
            self.says(&remove.concat())?;
        }
        self.end()?;
        ensure!(all.is_empty(), "containers were left: {all}");
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if self.daemon.try_wait()?.is_none() {
            let pid = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw);
            // `timeout` passes it on.
            kill_process(pid.context("no pid")?, Signal::TERM)?;
            self.daemon.wait()?;
        }
        let _ = Command::new("ip")
            .args(["link", "delete", "docker0"])
            .stderr(Stdio::null())
            .status()?;
        // What it leaves would drop the frames of bridges that are not Docker's.
        let _ = Command::new("nft").args(["flush", "ruleset"]).status()?;
        for directory in [DATA, RUN] {
            remove_directory(Path::new(directory))?;
        }
        for path in [SOCKET, "/run/docker.pid"] {
            let _ = fs::remove_file(path);
        }
        remove_cgroups(Path::new("/sys/fs/cgroup/docker"));
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // After `stop` there is nothing left to do; else the scenario has failed already.
        let _ = self.end();
    }
}

/// What the daemon says of some things.
pub(crate) struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    fn of(mut child: Child) -> Result<Self> {
        let stdout = child.stdout.take().context("docker events has no output")?;
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The next event that holds this word.
    pub(crate) fn wait_for(&self, word: &str) -> Result<String> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(word) => return Ok(line),
                Ok(_) => {}
                Err(_) => bail!("no event tells of {word:?}"),
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(arguments: &[&str]) -> Result<Child> {
    Command::new("timeout")
        .args(["--kill-after=5", DOCKER_DEADLINE, "docker"])
        .args(["--host", &format!("unix://{SOCKET}")])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run docker")
}

/// The daemon's complaints.
fn last_words() -> String {
    let log = fs::read_to_string(LOG).unwrap_or_default();
    let mut lines: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("level=info"))
        .collect();
    let surplus = lines.len().saturating_sub(6);
    lines.drain(..surplus);
    lines.join(" | ")
}

/// With what is still mounted there.
fn remove_directory(directory: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mut points: Vec<_> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(directory))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        Command::new("umount")
            .args([OsStr::new("-l"), point.as_ref()])
            .status()?;
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {directory:?}"))
        }
        _ => Ok(()),
    }
}

/// The inner ones first; one that is in use stays.
fn remove_cgroups(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}
