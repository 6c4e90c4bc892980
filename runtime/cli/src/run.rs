//! `husk run`: one container in its own virtual machine, without containerd.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use husk_sandbox::{
    ContainerError, ContainerRequest, Drained, Install, MemoryGrowth, ProcessIo, STATE_DIR_ROOT,
    Sandbox, SandboxConfig, Settings, StartTimings, monotonic_us,
};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::bundle::Bundle;
use crate::terminal::{self, Raw};

/// Run a command in a container in its own virtual machine
///
/// SOURCE is a directory with a root file system, or an OCI bundle (a directory with a config.json).
/// The command sees the directory itself, not a copy: what it writes is written there, unless
/// --read-only is given. Directories on which /proc, /dev and the like are mounted are made if they
/// are missing.
///
/// husk ends with the command's exit status; or with 125 if husk itself failed, 126 if the command
/// can't be executed, 127 if there is no such command, 128 + N if the command ended by signal N.
/// Signals are passed on to the command; three SIGINT or SIGTERM end the virtual machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  husk run ./rootfs uname -r
  husk run --cpus 2 --memory 1G ./rootfs -- make -j2
  husk run ./bundle")]
pub(crate) struct Arguments {
    /// Virtual CPUs [default: the host's settings, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,
    /// Memory of the virtual machine: MiB, or with K, M or G [default: the host's settings, or 256M]
    #[arg(long, short, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u32>,
    /// Set an environment variable; without a value, pass the caller's on
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Working directory in the container
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// User, and group, to run as: numbers, or names from the root file system's /etc/passwd
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Give the command a terminal [default: if standard input and output are one]
    #[arg(long, short, overrides_with = "no_tty")]
    tty: bool,
    /// Give the command no terminal
    #[arg(long, overrides_with = "tty")]
    no_tty: bool,
    /// Keep the command from writing to the root file system
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Say at the end how long each phase took
    #[arg(long)]
    timings: bool,
    /// Root file system or OCI bundle
    #[arg(value_name = "SOURCE")]
    pub(crate) source: PathBuf,
    /// Command and its arguments [default: the bundle's, or /bin/sh]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// husk itself failed.
const EXIT_HUSK_FAILED: u8 = 125;
/// The command is there but can't be executed.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// There is no such command.
const EXIT_NOT_FOUND: u8 = 127;
/// Added to the number of the signal that ended something.
const EXIT_SIGNAL: u8 = 128;

/// Keeps our sandboxes apart from those of containerd's namespaces.
const NAMESPACE: &str = "husk-run";

/// The one container of the sandbox.
const CONTAINER: &str = "main";

/// The exec id of a container's init.
const INIT: &str = "";

/// For the guest to power itself off.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// For the command's last output to be read by whoever it is for. A pager waits for a person, who can
/// end the wait by a signal.
const DRAIN_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// So many requests to end are a wish to be obeyed.
const END_REQUESTS_MAX: u32 = 3;

impl Arguments {
    /// The sandbox's id: unlike that of any other that lives.
    pub(crate) fn id(&self) -> String {
        format!("run-{}", std::process::id())
    }

    fn has_terminal(&self) -> bool {
        self.tty || (!self.no_tty && io::stdin().is_terminal() && io::stdout().is_terminal())
    }

    #[cfg(test)]
    pub(crate) fn parse_for_test(line: &[&str]) -> Self {
        use clap::{Args, FromArgMatches};
        let command = Self::augment_args(clap::Command::new("husk"));
        Self::from_arg_matches(&command.try_get_matches_from(line).unwrap()).unwrap()
    }
}

pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let runtime = prepare().and_then(|()| {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")
    });
    let ended = runtime.and_then(|runtime| {
        let ended = runtime.block_on(run_sandbox(arguments));
        // A read that blocks in a helper thread must not hold up the end.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("husk: {error:#}");
            ExitCode::from(EXIT_HUSK_FAILED)
        }
    }
}

/// Gives the process mounts of its own, before it has a second thread: whatever ends it, they end
/// with it.
fn prepare() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(anyhow!(
            "husk run needs root, to mount the root file system and to jail the virtual machine: \
             try sudo"
        ));
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    let none = None::<&str>;
    nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .context("cannot cut the mounts off from the host's")
}

async fn run_sandbox(arguments: &Arguments) -> Result<u8> {
    let settings = Settings::load()?;
    let has_terminal = arguments.has_terminal();
    let bundle = Bundle::read(arguments, has_terminal)?;
    let disk_slots = husk_sandbox::check_spec(&bundle.spec, &[])?;
    let config = SandboxConfig {
        namespace: NAMESPACE.to_owned(),
        id: arguments.id(),
        state_dir_root: STATE_DIR_ROOT.into(),
        install: Install::locate_with(&settings)?,
        vcpus: arguments.cpus.unwrap_or(settings.vm.vcpus),
        memory_mib: arguments.memory.unwrap_or(settings.vm.memory_mib),
        // Nobody updates its container.
        memory_growth: MemoryGrowth::default(),
        cmdline_extra: settings.vm.cmdline_extra,
        hostname: arguments.id(),
        netns: None,
        spare_net_devices: 0,
        disk_slots,
        changes_told: settings.volumes.inotify,
        cgroup: None,
    };
    let mut signals = Signals::catch()?;
    remove_orphans();
    let sandbox = tokio::select! {
        sandbox = Sandbox::start(config) => sandbox?,
        number = signals.next() => {
            husk_sandbox::cleanup(STATE_DIR_ROOT.as_ref(), NAMESPACE, &arguments.id())?;
            return Ok(EXIT_SIGNAL.saturating_add(number));
        }
    };
    let mut report = Report::default();
    let ended = run_container(&sandbox, bundle, has_terminal, &mut signals, &mut report).await;
    let stopping_us = monotonic_us();
    let shut_down = sandbox.shutdown(SHUTDOWN_DEADLINE).await;
    if arguments.timings {
        report.print(sandbox.timings(), stopping_us);
    }
    let status = ended?;
    shut_down?;
    Ok(status)
}

/// What a run that was killed has left is removed by the next one.
fn remove_orphans() {
    for (id, has_owner) in
        husk_sandbox::sandboxes(STATE_DIR_ROOT.as_ref(), NAMESPACE).unwrap_or_default()
    {
        // One that is just being made has no record of its owner yet; its id has.
        let pid = id.strip_prefix("run-").unwrap_or_default();
        if !has_owner
            && !Path::new("/proc").join(pid).exists()
            && let Err(error) = husk_sandbox::cleanup(STATE_DIR_ROOT.as_ref(), NAMESPACE, &id)
        {
            eprintln!("husk: cannot remove what {id} has left: {error}");
        }
    }
}

async fn run_container(
    sandbox: &Sandbox,
    bundle: Bundle,
    has_terminal: bool,
    signals: &mut Signals,
    report: &mut Report,
) -> Result<u8> {
    let request = ContainerRequest {
        id: CONTAINER.to_owned(),
        bundle: bundle.directory,
        spec: bundle.spec,
        rootfs: Vec::new(),
        io: own_streams(has_terminal).context("cannot pass the streams on")?,
    };
    let create = async {
        sandbox.create_container(request).await?;
        resize(sandbox).await;
        report.created_us = monotonic_us();
        sandbox.start_process(CONTAINER, INIT).await?;
        report.started_us = monotonic_us();
        Ok::<(), ContainerError>(())
    };
    if let Err(error) = create.await {
        return command_failed(error);
    }
    let _raw = match has_terminal && io::stdin().is_terminal() {
        true => Some(Raw::enter().context("cannot make the terminal raw")?),
        false => None,
    };
    let status = serve(sandbox, has_terminal, signals).await?;
    tokio::select! {
        drained = sandbox.output_drained(CONTAINER, INIT, DRAIN_DEADLINE) => {
            if let Drained::NotInTime = drained? {
                eprintln!("husk: nobody reads the command's output; the rest is lost");
            }
        }
        number = signals.next() => return Ok(EXIT_SIGNAL.saturating_add(number)),
    }
    report.first_output_us = sandbox.first_output_us(CONTAINER, INIT)?;
    Ok(status)
}

/// Passes signals on until the command has ended.
async fn serve(sandbox: &Sandbox, has_terminal: bool, signals: &mut Signals) -> Result<u8> {
    let mut resized = signal(SignalKind::window_change())?;
    let mut exited = std::pin::pin!(sandbox.wait_process(CONTAINER, INIT));
    let mut end_requests = 0;
    loop {
        tokio::select! {
            exit = &mut exited => {
                let exit = exit?;
                if let Some(end) = ended_early(sandbox).await {
                    eprintln!("husk: the virtual machine has ended: {end}");
                }
                return Ok(u8::try_from(exit.status).unwrap_or(u8::MAX));
            }
            _ = resized.recv(), if has_terminal => resize(sandbox).await,
            number = signals.next() => {
                end_requests += u32::from(Signals::ends(number));
                if end_requests >= END_REQUESTS_MAX {
                    return Ok(EXIT_SIGNAL.saturating_add(number));
                }
                // It has ended in this moment: that is told above.
                let _ = sandbox.signal(CONTAINER, INIT, number.into(), false).await;
            }
        }
    }
}

/// How the virtual machine ended, if it has.
async fn ended_early(sandbox: &Sandbox) -> Option<impl Display> {
    tokio::select! {
        biased;
        end = sandbox.ended() => Some(end),
        () = std::future::ready(()) => None,
    }
}

/// The status for a command that did not get to run; an error if it is not the command's fault.
fn command_failed(error: ContainerError) -> Result<u8> {
    let status = match &error {
        ContainerError::Agent { text, .. } => status_of_refusal(text),
        _ => None,
    };
    match status {
        Some(status) => {
            eprintln!("husk: {error}");
            Ok(status)
        }
        None => Err(error.into()),
    }
}

/// The agent names the step that failed. `exec` means the command, and says what is wrong with it in
/// the words of other runtimes.
fn status_of_refusal(text: &str) -> Option<u8> {
    let text = text.to_lowercase();
    if !text.contains("exec") {
        None
    } else if text.contains("not found") || text.contains("no such file") {
        Some(EXIT_NOT_FOUND)
    } else {
        Some(EXIT_NOT_EXECUTABLE)
    }
}

/// Copies of our own standard streams.
fn own_streams(has_terminal: bool) -> io::Result<ProcessIo> {
    let stdin = match copy(&io::stdin()) {
        Ok(stdin) => stdin,
        // Closed by the caller.
        Err(_) => OwnedFd::from(File::open("/dev/null")?),
    };
    Ok(ProcessIo {
        stdin: Some(stdin),
        stdin_keeper: None,
        stdout: copy(&io::stdout()).ok(),
        stderr: copy(&io::stderr()).ok().filter(|_| !has_terminal),
        terminal: has_terminal,
    })
}

/// A copy of a stream. A terminal is opened anew, so that the copy can be non-blocking, as the VMM
/// wants it, without everybody else's being it too.
fn copy(stream: &impl AsFd) -> io::Result<OwnedFd> {
    let stream = stream.as_fd();
    if !stream.is_terminal() {
        return stream.try_clone_to_owned();
    }
    let path = format!("/proc/self/fd/{}", stream.as_raw_fd());
    let mode = rustix::fs::fcntl_getfl(stream)? & OFlags::RWMODE;
    let flags = mode | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Tells the guest the size of our terminal.
async fn resize(sandbox: &Sandbox) {
    if let Some((columns, rows)) = terminal::size(io::stdout()) {
        // A command without a terminal has no use for it.
        let _ = sandbox.resize(CONTAINER, INIT, columns, rows).await;
    }
}

/// The signals that are passed on.
struct Signals(Vec<(u8, Signal)>);

impl Signals {
    fn catch() -> Result<Self> {
        let kinds = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::terminate(),
        ];
        let caught: io::Result<_> = kinds
            .into_iter()
            .map(|kind| {
                let number = u8::try_from(kind.as_raw_value()).map_err(io::Error::other)?;
                Ok((number, signal(kind)?))
            })
            .collect();
        Ok(Self(caught.context("cannot catch signals")?))
    }

    /// The number of the next one.
    async fn next(&mut self) -> u8 {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if let std::task::Poll::Ready(Some(())) = signal.poll_recv(context) {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Whether a signal is a request to end.
    fn ends(number: u8) -> bool {
        let number = i32::from(number);
        [SignalKind::interrupt(), SignalKind::terminate()]
            .iter()
            .any(|kind| kind.as_raw_value() == number)
    }
}

/// When what was done, beside what the sandbox itself keeps.
#[derive(Debug, Default)]
struct Report {
    created_us: u64,
    started_us: u64,
    first_output_us: Option<u64>,
}

impl Report {
    fn print(&self, start: StartTimings, stopping_us: u64) {
        let phases = [
            ("pod's directory, mounts, cgroup", start.prepared_us),
            ("VMM spawned", start.spawned_us),
            ("VMM jailed", start.jailed_us),
            ("KVM ready", start.kvm_us),
            ("kernel and initrd loaded", start.loaded_us),
            ("machine built", start.built_us),
            ("kernel entered", start.entered_us),
            ("agent's hello", start.hello_us),
            ("container created", self.created_us),
            ("command executed", self.started_us),
            ("first byte out", self.first_output_us.unwrap_or_default()),
            ("command ended, output drained", stopping_us),
            ("shut down and cleaned up", monotonic_us()),
        ];
        eprintln!("husk:   at ms  took ms");
        let mut before_us = start.asked_us;
        // A phase that was not reached has no moment.
        for (phase, at_us) in phases.into_iter().filter(|(_, at_us)| *at_us > 0) {
            eprintln!(
                "husk: {:>7}  {:>7}  {phase}",
                ms(at_us.saturating_sub(start.asked_us)),
                ms(at_us.saturating_sub(before_us)),
            );
            before_us = at_us;
        }
    }
}

/// Microseconds as milliseconds with one decimal.
fn ms(us: u64) -> String {
    format!("{}.{}", us / 1000, us % 1000 / 100)
}

/// `512`, `512M`, `2G`: MiB.
fn parse_memory(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is no size: expected 512, 512M or 2G, for example");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let unit = text
        .get(digits.len()..)
        .unwrap_or_default()
        .to_ascii_lowercase();
    let kib = match unit.as_str() {
        "k" | "kib" => Some(number),
        "" | "m" | "mib" => number.checked_mul(1024),
        "g" | "gib" => number.checked_mul(1024 * 1024),
        _ => return Err(wrong()),
    };
    kib.and_then(|kib| u32::try_from(kib / 1024).ok())
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_none_are_refused() {
        for text in ["", "M", "1T", "1.5G", "-1", "99999999999G", "1 G"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_mebibytes() {
        for (text, mib) in [("512", 512), ("512M", 512), ("2g", 2048), ("65536K", 64)] {
            assert_eq!(parse_memory(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn refusals_become_the_shells_statuses() {
        for (text, status) in [
            ("exec: \"x\": executable file not found in $PATH", Some(127)),
            (
                "exec: \"/x\": stat /x: no such file or directory",
                Some(127),
            ),
            ("exec /x: permission denied", Some(126)),
            ("exec /x: Exec format error", Some(126)),
            ("cannot mount /proc: no such file", None),
        ] {
            assert_eq!(status_of_refusal(text), status, "{text}");
        }
    }

    #[test]
    fn options_behind_the_source_are_the_commands() {
        let arguments = Arguments::parse_for_test(&["husk", "--cpus", "2", "/r", "ls", "--cpus"]);
        assert_eq!(arguments.cpus, Some(2));
        assert_eq!(arguments.command, ["ls", "--cpus"]);
        let arguments = Arguments::parse_for_test(&["husk", "/r", "--", "ls", "-t"]);
        assert_eq!(arguments.command, ["ls", "-t"]);
    }
}
