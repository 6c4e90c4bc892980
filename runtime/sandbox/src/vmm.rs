//! A VMM process: spawned, watched, ended.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{fs, io};

use husk_protocol::STREAM_PORT;
use husk_vmm_control::{
    Answer, BootConfig, BootTimes, Call, Channel, DiskConfig, ExitReason, PlugDisk, PlugNet,
    ResizeMemory,
};
use rustix::process::Pid;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::control::{CallError, Control, LastWord, Launched, Reader, StreamEnd};
use crate::error::{VmEnd, cap_text, describe};
use crate::netns::{Netns, on_thread};
use crate::oom_score::OomScore;
use crate::process::{Child, Ending};
use crate::state::StateDir;
use crate::{SandboxConfig, StartError};

/// What takes part in a boot, opened.
#[derive(Debug)]
pub(crate) struct BootFiles {
    kvm: File,
    kernel: File,
    initrd: File,
    console: File,
    pub(crate) vmm_log: File,
}

/// A VMM process that has its machine built, or is about to. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Vmm {
    control: Control,
    child: Child,
    pid: i32,
    ended: watch::Receiver<Option<VmEnd>>,
    /// None where it could not be set.
    oom_score: Mutex<Option<OomScore>>,
}

/// A VMM that nobody has heard of yet.
pub(crate) struct Spawned {
    control: Control,
    reading: JoinHandle<LastWord>,
    launched: oneshot::Receiver<Launched>,
    first: Child,
}

impl BootFiles {
    /// Opens everything, so that what is missing is known before there is a process.
    pub(crate) fn open(config: &SandboxConfig, state: &StateDir) -> Result<Self, StartError> {
        let install = &config.install;
        Ok(Self {
            kvm: open("the KVM device", Path::new(KVM), true)?,
            kernel: open("the guest kernel", &install.kernel, false)?,
            initrd: open("the initrd", &install.initrd, false)?,
            console: StateDir::open_log(&state.console_log())?,
            vmm_log: StateDir::open_log(&state.vmm_log())?,
        })
    }
}

impl Spawned {
    /// Starts the program in the pod's network namespace.
    pub(crate) async fn spawn(
        config: &SandboxConfig,
        netns: &Netns,
        vmm_log: &File,
    ) -> Result<Self, StartError> {
        let path = &config.install.vmm;
        let failed = |step| {
            move |source| StartError::Spawn {
                path: path.clone(),
                step,
                source,
            }
        };
        let (ours, theirs) = Channel::pair().map_err(failed("make the control socket"))?;
        let (control, reader, launched) =
            Control::new(ours).map_err(failed("watch the control socket"))?;
        let log = vmm_log.try_clone().map_err(failed("pass the log"))?;
        let mut command = Command::new(path);
        // The control socket is the standard input: see CONTROL_FD.
        command
            .stdin(theirs.into_socket())
            .stdout(Stdio::null())
            .stderr(log)
            .env_clear()
            .current_dir("/");
        let first = spawn_in(netns.clone(), command)
            .await
            .map_err(|(step, source)| failed(step)(source))?;
        Ok(Self {
            control,
            reading: tokio::spawn(Reader::run(reader)),
            launched,
            first,
        })
    }

    /// Hands the machine over to be built and waits until the process that will be it exists.
    /// `launched` is told its pid at once.
    pub(crate) async fn boot(
        mut self,
        boot: BootConfig,
        files: &BootFiles,
        agent: UnixStream,
        taps: &[OwnedFd],
        launched: impl FnOnce(i32) -> Result<(), StartError>,
    ) -> Result<(Vmm, BootTimes), StartError> {
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![
            files.kvm.as_fd(),
            files.kernel.as_fd(),
            files.initrd.as_fd(),
            files.console.as_fd(),
            agent.as_fd(),
        ];
        descriptors.extend(taps.iter().map(AsFd::as_fd));
        let control = self.control.clone();
        let mut booted = Box::pin(control.call(Call::Boot(boot), &descriptors));
        let mut early = None;
        let jailed = loop {
            tokio::select! {
                biased;
                jailed = &mut self.launched => break jailed.ok(),
                answer = &mut booted, if early.is_none() => early = Some(answer),
                // It ends once it has made the jailed one, and has told us before that.
                _ = self.first.wait() => break timeout(LAST_WORD_DEADLINE, &mut self.launched)
                    .await.ok().and_then(Result::ok),
                () = tokio::time::sleep(BUILD_DEADLINE) => break None,
            }
        };
        let Some(jailed) = jailed else {
            return Err(self.explain(early).await);
        };
        let vmm = self.watch(jailed);
        let built = async {
            launched(vmm.pid)?;
            let answer = match early {
                Some(answer) => answer,
                None => timeout(BUILD_DEADLINE, booted)
                    .await
                    .map_err(|_| deadline("building the virtual machine", BUILD_DEADLINE))?,
            };
            answer.map_err(|error| refused("build the virtual machine", &error))
        };
        match built.await {
            Ok(Answer::Booted(times)) => Ok((vmm, times)),
            Ok(_) => {
                let text = "it says something else".to_owned();
                vmm.kill().await;
                Err(StartError::Vmm {
                    call: "build the virtual machine",
                    text,
                })
            }
            Err(error) => {
                vmm.kill().await;
                Err(error)
            }
        }
    }

    /// Ends it before it was asked for a machine.
    pub(crate) async fn abandon(self) {
        self.first.kill();
        self.first.wait().await;
    }

    /// Turns a VMM process with its jailed process into one that is watched.
    fn watch(self, jailed: Launched) -> Vmm {
        let child = Child::from_pidfd(jailed.pidfd);
        let (tell_end, ended) = watch::channel(None);
        let watched = child.clone();
        let (first, reading) = (self.first, self.reading);
        tokio::spawn(async move {
            let end = watch_to_the_end(&watched, reading).await;
            tracing::debug!(%end, "the virtual machine has ended");
            tell_end.send_replace(Some(end));
        });
        tokio::spawn(async move { first.wait().await });
        let oom_score = OomScore::of(jailed.pid)
            .inspect_err(|error| tracing::warn!(%error, "the VMM keeps containerd's OOM score"));
        Vmm {
            control: self.control,
            child,
            pid: jailed.pid,
            ended,
            oom_score: Mutex::new(oom_score.ok()),
        }
    }

    /// Why there is no jailed process.
    async fn explain(self, early: Option<Result<Answer, CallError>>) -> StartError {
        self.first.kill();
        let ending = self.first.wait().await;
        if let Some(Err(error @ CallError::Refused(_))) = early {
            return refused("build the virtual machine", &error);
        }
        let last_word = timeout(LAST_WORD_DEADLINE, self.reading).await;
        StartError::VmGone(explain_end(
            last_word.ok().and_then(Result::ok),
            ending,
            false,
        ))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.child.kill();
    }
}

impl Vmm {
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Takes the OOM score of one of its containers: see [`OomScore`].
    pub(crate) fn take_oom_score(&self, wanted: i32) {
        let mut score = self
            .oom_score
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let taken = score.as_mut().map_or(Ok(()), |score| score.take(wanted));
        if let Err(error) = taken {
            tracing::warn!(%error, wanted, "the VMM does not have its containers' OOM score");
        }
    }

    /// Runs the guest.
    pub(crate) async fn start(&self) -> Result<(), StartError> {
        let started = timeout(CALL_DEADLINE, self.control.call(Call::Start, &[])).await;
        match started {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(CallError::HungUp)) => Err(StartError::VmGone(self.kill().await)),
            Ok(Err(error)) => Err(refused("start the guest", &error)),
            Err(_) => Err(deadline("starting the guest", CALL_DEADLINE)),
        }
    }

    /// Connects the agent's port for streams, from a port of the host that is used once. The error is
    /// a sentence for people.
    pub(crate) async fn connect(
        &self,
        host_port: u32,
        source: Option<&OwnedFd>,
        sink: Option<&OwnedFd>,
    ) -> Result<StreamEnd, String> {
        answered(self.control.connect(STREAM_PORT, host_port, source, sink)).await
    }

    /// The same with a socket, both ways.
    pub(crate) async fn connect_socket(
        &self,
        host_port: u32,
        socket: &OwnedFd,
    ) -> Result<StreamEnd, String> {
        answered(self.control.connect_socket(STREAM_PORT, host_port, socket)).await
    }

    /// Plugs a tap into a network device, or pulls it out. The error is a sentence for people.
    pub(crate) async fn plug_net(&self, device: usize, tap: Option<OwnedFd>) -> Result<(), String> {
        let call = Call::PlugNet(PlugNet {
            device,
            tap: tap.is_some(),
        });
        let descriptors: Vec<_> = tap.iter().map(AsFd::as_fd).collect();
        answered(self.control.call(call, &descriptors))
            .await
            .map(drop)
    }

    /// Plugs a disk into a slot, or pulls it out. The error is a sentence for people.
    pub(crate) async fn plug_disk(
        &self,
        slot: usize,
        disk: Option<(DiskConfig, OwnedFd)>,
    ) -> Result<(), String> {
        let (disk, file) = disk.unzip();
        let descriptors: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        let call = Call::PlugDisk(PlugDisk { slot, disk });
        answered(self.control.call(call, &descriptors))
            .await
            .map(drop)
    }

    /// Has the guest take more memory, or give some back; waits until it has at least as much. The error
    /// is a sentence for people.
    pub(crate) async fn resize_memory(&self, memory_mib: u32) -> Result<(), String> {
        let call = Call::ResizeMemory(ResizeMemory { memory_mib });
        let resized = self.control.call(call, &[]);
        answered_within(GROWTH_DEADLINE, resized).await.map(drop)
    }

    /// How it ended, if it has.
    pub(crate) fn end(&self) -> Option<VmEnd> {
        self.ended.borrow().clone()
    }

    /// Becomes the end of the process.
    pub(crate) fn end_watch(&self) -> watch::Receiver<Option<VmEnd>> {
        self.ended.clone()
    }

    /// Waits for the end of the process.
    pub(crate) async fn ended(&self) -> VmEnd {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(unwatched),
            Err(_) => unwatched(),
        }
    }

    /// Asks the VMM to end, and kills it if it doesn't in time.
    pub(crate) async fn stop(&self, deadline: Duration) -> VmEnd {
        let stop = async {
            // The answer may be lost with the process.
            let _ = self.control.call(Call::Stop, &[]).await;
            self.ended().await
        };
        match timeout(deadline, stop).await {
            Ok(end) => end,
            Err(_) => self.kill().await,
        }
    }

    /// Kills the process and waits for its end.
    pub(crate) async fn kill(&self) -> VmEnd {
        self.child.kill();
        match timeout(KILL_DEADLINE, self.ended()).await {
            Ok(end) => end,
            Err(_) => VmEnd {
                reason: format!("the VMM has not ended within {KILL_DEADLINE:?} of SIGKILL"),
                is_clean: false,
            },
        }
    }
}

/// What came of a call, in time; an error is a sentence for people.
async fn answered<T>(call: impl Future<Output = Result<T, CallError>>) -> Result<T, String> {
    answered_within(CALL_DEADLINE, call).await
}

async fn answered_within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, CallError>>,
) -> Result<T, String> {
    match timeout(deadline, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(cap_text(&describe(&error))),
        Err(_) => Err(format!("no answer within {deadline:?}")),
    }
}

/// Waits for the end of the process and finds out why it came. Reaps the process.
async fn watch_to_the_end(child: &Child, mut reading: JoinHandle<LastWord>) -> VmEnd {
    let mut is_killed_by_us = false;
    let (ending, last_word) = tokio::select! {
        ending = child.wait() => {
            // All it has said is in the socket already.
            (ending, timeout(LAST_WORD_DEADLINE, &mut reading).await.ok().and_then(Result::ok))
        }
        last_word = &mut reading => {
            if !matches!(last_word, Ok(LastWord::Exited(_))) {
                // The socket is how a VMM is held: without it there is no way back.
                child.kill();
            }
            let ending = match timeout(EXIT_DEADLINE, child.wait()).await {
                Ok(ending) => ending,
                Err(_) => {
                    is_killed_by_us = true;
                    child.kill();
                    child.wait().await
                }
            };
            (ending, last_word.ok())
        }
    };
    explain_end(last_word, ending, is_killed_by_us)
}

fn explain_end(last_word: Option<LastWord>, ending: Ending, is_killed_by_us: bool) -> VmEnd {
    let not_clean = |reason| VmEnd {
        reason,
        is_clean: false,
    };
    match (last_word, ending) {
        (Some(LastWord::Exited(ExitReason::Stopped)), _) if !is_killed_by_us => VmEnd {
            reason: "the virtual machine was stopped".to_owned(),
            is_clean: true,
        },
        (Some(LastWord::Exited(ExitReason::Stopped)), _) => {
            not_clean("the VMM was killed: it did not end after its machine had".to_owned())
        }
        (Some(LastWord::Exited(ExitReason::Reset)), _) => {
            not_clean("the guest reset itself, as its kernel does when it panics".to_owned())
        }
        (Some(LastWord::Exited(ExitReason::TripleFault)), _) => {
            not_clean("the guest's CPU met a triple fault".to_owned())
        }
        (Some(LastWord::Exited(ExitReason::Error { text })), _) => {
            not_clean(format!("the VMM gave up: {}", cap_text(&text)))
        }
        (Some(LastWord::Nonsense(text)), _) => {
            not_clean(format!("the VMM was killed, as it spoke nonsense: {text}"))
        }
        (_, Ending::Signal(signal)) => not_clean(format!("the VMM was killed by signal {signal}")),
        (_, Ending::Code(code)) => not_clean(format!("the VMM ended with code {code}")),
        (_, Ending::Unknown) => not_clean("the VMM has ended".to_owned()),
    }
}

/// The runtime that watched the process is going down.
fn unwatched() -> VmEnd {
    VmEnd {
        reason: "the VMM is not watched any more".to_owned(),
        is_clean: false,
    }
}

/// Spawns from a thread that has moved into the namespace: a child starts where its parent's thread
/// is.
async fn spawn_in(netns: Netns, mut command: Command) -> Result<Child, (&'static str, io::Error)> {
    let spawn = move || {
        netns
            .enter()
            .map_err(|error| ("join the network namespace", error))?;
        let spawned = command.spawn().map_err(|error| ("execute", error))?;
        let pid = i32::try_from(spawned.id()).ok().and_then(Pid::from_raw);
        pid.ok_or_else(|| io::Error::other("no pid"))
            .and_then(Child::from_pid)
            .map_err(|error| ("watch", error))
    };
    let spawned = on_thread("spawn", spawn).await;
    spawned.map_err(|error| ("make a thread", error))?
}

fn open(what: &'static str, path: &Path, is_writable: bool) -> Result<File, StartError> {
    fs::OpenOptions::new()
        .read(true)
        .write(is_writable)
        .open(path)
        .map_err(|source| StartError::Open {
            what,
            path: path.to_owned(),
            source,
        })
}

fn refused(call: &'static str, error: &CallError) -> StartError {
    StartError::Vmm {
        call,
        text: cap_text(&describe(error)),
    }
}

pub(crate) fn deadline(step: &'static str, deadline: Duration) -> StartError {
    StartError::Deadline { step, deadline }
}

const KVM: &str = "/dev/kvm";

/// From the boot request to a machine that is built and jailed.
const BUILD_DEADLINE: Duration = Duration::from_secs(60);
/// For a call that a VMM answers at once, were it not for the host's load.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// For a guest to take more memory: it has blocks to set up, and itself makes room for their tables.
const GROWTH_DEADLINE: Duration = Duration::from_secs(30);
/// From a VMM's last message to its end.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);
/// From SIGKILL to the end.
pub(crate) const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// For what an ended process has left in its socket.
const LAST_WORD_DEADLINE: Duration = Duration::from_secs(5);
