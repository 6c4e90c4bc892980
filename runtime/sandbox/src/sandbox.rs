//! A pod's life: start, end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_netlink::Monitor;
use husk_protocol::messages::HelloResponse;
use husk_vmm_control::{BootConfig, NetConfig, monotonic_us};
use tokio::time::timeout;

use crate::agent::Agent;
use crate::changes::Teller;
use crate::container::{Containers, SourcePorts};
use crate::disks::Disks;
use crate::error::{cap_text, describe};
use crate::machine_memory::MachineMemory;
use crate::netns::Netns;
use crate::network::Devices;
use crate::process::Identity;
use crate::state::{Record, StateDir};
use crate::timings::StartTimings;
use crate::vmm::{BootFiles, Spawned, Vmm};
use crate::volumes::MemoryVolumes;
use crate::{
    ChangesTold, CleanupError, Install, MemoryGrowth, StartError, VmEnd, cgroup, cleanup, clock,
    network,
};

/// What to start.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// containerd's namespace, or what else keeps equal ids apart.
    pub namespace: String,
    /// The pod's id, unique in its namespace.
    pub id: String,
    /// Where the pods' directories are: [`STATE_DIR_ROOT`](crate::STATE_DIR_ROOT) but for tests.
    pub state_dir_root: PathBuf,
    /// The files to start from.
    pub install: Install,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// How that follows the limits of containers.
    pub memory_growth: MemoryGrowth,
    /// Added to the guest kernel's command line.
    pub cmdline_extra: String,
    /// The guest's hostname; empty: the guest's own.
    pub hostname: String,
    /// The pod's network namespace, in which the VMM is to live; none: a new, empty one.
    pub netns: Option<PathBuf>,
    /// Network devices beyond those of the interfaces that are there now, for interfaces that come
    /// later.
    pub spare_net_devices: usize,
    /// Slots for block devices of the host that containers are given, at most
    /// [`DISKS_MAX`](husk_vmm_control::DISKS_MAX); see [`check_spec`](crate::check_spec).
    pub disk_slots: usize,
    /// Of which volumes the guest's inotify hears what the host changes.
    pub changes_told: ChangesTold,
    /// A cgroup v2 directory for all of the pod, below which one is made that the VMM and the caller
    /// join; none: the VMM's own is in `/sys/fs/cgroup/husk`. Where the host has no cgroup v2, the
    /// VMM stays in the caller's cgroup.
    pub cgroup: Option<PathBuf>,
}

/// A running virtual machine and the containers in it. Dropping it kills the virtual machine but
/// leaves what else there is to [`cleanup()`]; [`Sandbox::shutdown`] is the way to end one.
#[derive(Debug)]
pub struct Sandbox {
    pub(crate) state: StateDir,
    pub(crate) vmm: Vmm,
    /// The VMM lives in it, and the guest has its interfaces.
    pub(crate) netns: Netns,
    pub(crate) network: tokio::sync::Mutex<Devices>,
    /// Of the network namespace, until somebody follows it.
    pub(crate) monitor: Mutex<Option<Monitor>>,
    pub(crate) agent: Agent,
    pub(crate) disks: tokio::sync::Mutex<Disks>,
    pub(crate) machine_memory: tokio::sync::Mutex<MachineMemory>,
    pub(crate) sources: SourcePorts,
    /// Read by all that mount something, so that the end can wait for them.
    pub(crate) creating: tokio::sync::RwLock<()>,
    guest: GuestInfo,
    timings: StartTimings,
    containers: Mutex<Containers>,
    memory_volumes: Mutex<MemoryVolumes>,
    teller: Mutex<Teller>,
    /// The cgroup that this process has left for the pod's.
    left_cgroup: Mutex<Option<PathBuf>>,
}

/// What the agent said of itself and its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    /// The agent's version.
    pub agent_version: String,
    /// As `uname -r` says in the guest.
    pub kernel_release: String,
}

impl Sandbox {
    /// Starts a sandbox: afterwards the guest runs and its agent has answered.
    ///
    /// # Errors
    /// [`StartError`]; everything that had been made is undone.
    pub async fn start(config: SandboxConfig) -> Result<Self, StartError> {
        let state = StateDir::locate(&config.state_dir_root, &config.namespace, &config.id)?;
        match Self::start_in(&config, &state).await {
            Ok(sandbox) => Ok(sandbox),
            // Whoever has it, it is not ours to remove.
            Err(error @ StartError::AlreadyExists { .. }) => Err(error),
            Err(error) => {
                if let Err(undo) = in_background(move || cleanup::remove_all(&state)).await {
                    tracing::warn!(
                        error = describe(&undo),
                        "a start that failed leaves something"
                    );
                }
                Err(error)
            }
        }
    }

    async fn start_in(config: &SandboxConfig, state: &StateDir) -> Result<Self, StartError> {
        let mut timings = StartTimings {
            asked_us: monotonic_us(),
            ..StartTimings::default()
        };
        state.create()?;
        let mut record = Record {
            owner: own_identity(),
            vmm: None,
            cgroup: make_cgroup(config, state)?,
            netns: config.netns.clone(),
        };
        state.write_record(&record)?;
        let files = BootFiles::open(config, state)?;

        let (ours, theirs) = UnixStream::pair().map_err(|source| StartError::Spawn {
            path: config.install.vmm.clone(),
            step: "make the agent's stream",
            source,
        })?;
        let netns = make_netns(config).await?;
        timings.prepared_us = monotonic_us();
        let (spawned, attached) = tokio::join!(
            Spawned::spawn(config, &netns, &files.vmm_log),
            network::attach_all(&netns),
        );
        let spawned = spawned?;
        let (found, monitor) = match attached {
            Ok(attached) => attached,
            Err(error) => {
                spawned.abandon().await;
                return Err(error.into());
            }
        };
        timings.spawned_us = monotonic_us();
        let (mut devices, net, taps) = Devices::of(found.attached, config.spare_net_devices);
        let teller = Teller::new(config.changes_told);
        let boot = BootConfig {
            share_echo_group: Some(teller.group()),
            ..boot_config(config, state, record.cgroup.as_deref(), net)?
        };
        let (vmm, boot_times) = spawned
            .boot(boot, &files, theirs, &taps, |pid| {
                record.vmm = Identity::of(pid).ok();
                state.write_record(&record)
            })
            .await?;
        timings.set_boot(boot_times);
        timings.entered_us = monotonic_us();
        // The VMM has its own: a tap ends with the last of its descriptors.
        drop(taps);

        let started = async {
            let (agent, hello) = Self::reach_agent(config, &vmm, ours).await?;
            devices.configure(&agent, &vmm, &found.survey).await?;
            Ok::<_, StartError>((agent, hello))
        };
        let (agent, hello) = match started.await {
            Ok(reached) => reached,
            Err(error) => {
                vmm.kill().await;
                return Err(error);
            }
        };
        tokio::spawn(clock::keep(agent.client(), vmm.end_watch()));
        timings.hello_us = monotonic_us();
        timings.guest_own = Duration::from_nanos(hello.ready_at_ns);
        Ok(Self {
            timings,
            guest: GuestInfo {
                agent_version: cap_text(&hello.agent_version),
                kernel_release: cap_text(&hello.kernel_release),
            },
            state: state.clone(),
            vmm,
            netns,
            monitor: Mutex::new(devices.has_any().then_some(monitor)),
            network: tokio::sync::Mutex::new(devices),
            agent,
            disks: tokio::sync::Mutex::new(Disks::new(config.disk_slots)),
            machine_memory: tokio::sync::Mutex::new(MachineMemory::new(
                config.memory_mib,
                config.memory_growth,
            )),
            sources: SourcePorts::default(),
            creating: tokio::sync::RwLock::default(),
            containers: Mutex::default(),
            memory_volumes: Mutex::new(MemoryVolumes::new(&config.id)),
            teller: Mutex::new(teller),
            left_cgroup: Mutex::new(enter_cgroup(config, record.cgroup.as_deref())),
        })
    }

    /// Runs the guest and waits for its agent.
    async fn reach_agent(
        config: &SandboxConfig,
        vmm: &Vmm,
        stream: UnixStream,
    ) -> Result<(Agent, HelloResponse), StartError> {
        let agent = Agent::new(stream).map_err(|source| StartError::Spawn {
            path: config.install.vmm.clone(),
            step: "watch the agent's stream",
            source,
        })?;
        vmm.start().await?;
        let hello = agent
            .hello(vmm, &config.hostname, config.disk_slots)
            .await?;
        Ok((agent, hello))
    }

    /// The pid of the jailed VMM process. It lives in the pod's network namespace.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid().unsigned_abs()
    }

    /// What the guest is.
    pub fn guest(&self) -> &GuestInfo {
        &self.guest
    }

    /// When the steps of the start were done.
    pub fn timings(&self) -> StartTimings {
        self.timings
    }

    /// The file that the guest's console is written to.
    pub fn console_log(&self) -> PathBuf {
        self.state.console_log()
    }

    /// The last that the guest has written to its console, and that the VMM has written to its log,
    /// each in one line, for people. Empty if there is nothing, or nothing any more.
    pub fn last_words(&self) -> (String, String) {
        (
            last_words(&self.console_log()),
            last_words(&self.state.vmm_log()),
        )
    }

    /// Waits until the virtual machine is gone, whatever the cause; answers at once, and the same,
    /// ever after. The VMM process has been reaped by then.
    pub async fn ended(&self) -> VmEnd {
        self.vmm.ended().await
    }

    /// Ends the virtual machine and removes everything: asks the agent to shut down and, as far as
    /// `deadline` allows, waits for it; then stops the VMM, then kills it. Can be repeated, and works
    /// on a virtual machine that is gone.
    ///
    /// # Errors
    /// [`CleanupError`] if something could not be removed; the virtual machine is gone all the same,
    /// except for [`CleanupError::VmmStays`].
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), CleanupError> {
        if self.vmm.end().is_none() {
            let powered_off = async {
                tokio::join!(self.agent.shutdown(), self.vmm.ended());
            };
            if timeout(deadline, powered_off).await.is_err() {
                self.vmm.stop(STOP_DEADLINE).await;
            }
        }
        // Whoever comes later finds the virtual machine gone.
        let creating = timeout(CREATES_DEADLINE, self.creating.write()).await;
        if creating.is_err() {
            let id = self.state.path().display();
            tracing::warn!(%id, "a container is still being made as its pod is removed");
        }
        self.containers().clear();
        // Whoever still holds it lets go of the host's devices as his call to the guest ends.
        if let Ok(mut disks) = self.disks.try_lock() {
            disks.clear();
        }
        self.leave_cgroup();
        let state = self.state.clone();
        in_background(move || cleanup::remove_all(&state)).await
    }

    /// What is left in the cgroup as it is removed is killed, this process as well.
    fn leave_cgroup(&self) {
        let left = self.left_cgroup.lock();
        let left = left.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(left) = left
            && let Err(error) = cgroup::go_back(&left)
        {
            tracing::error!(%error, "this process can't leave the pod's cgroup");
        }
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn teller(&self) -> MutexGuard<'_, Teller> {
        self.teller.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn memory_volumes(&self) -> MutexGuard<'_, MemoryVolumes> {
        self.memory_volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what blocks beside the runtime.
pub(crate) async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that goes down cancels, and takes this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The end of a log that somebody untrusted may have written. Of a kernel that panicked, what it
/// panicked for, and not the stack that it prints last.
fn last_words(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut log = File::open(log)?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(PANIC_BYTES_MAX)))?;
        let mut bytes = Vec::new();
        log.take(PANIC_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let panic = bytes
        .windows(PANIC.len())
        .rposition(|window| window == PANIC);
    let end = bytes.len().saturating_sub(LAST_WORDS_BYTES_MAX);
    let from = panic.unwrap_or(end);
    cap_text(&String::from_utf8_lossy(
        bytes.get(from..).unwrap_or_default(),
    ))
}

fn own_identity() -> Option<Identity> {
    Identity::of(std::process::id().cast_signed()).ok()
}

/// Opens the pod's network namespace, or makes it where nobody has.
async fn make_netns(config: &SandboxConfig) -> Result<Netns, StartError> {
    match &config.netns {
        Some(path) => Netns::open(path).map_err(|source| StartError::Open {
            what: "the network namespace",
            path: path.clone(),
            source,
        }),
        None => Netns::create().await.map_err(StartError::MakeNetns),
    }
}

/// Makes the VMM's cgroup. Where the host has none, the VMM stays in its parent's.
fn make_cgroup(config: &SandboxConfig, state: &StateDir) -> Result<Option<PathBuf>, StartError> {
    let Some(path) = cgroup::place(config.cgroup.as_deref(), &config.namespace, &config.id) else {
        tracing::info!("this host has no cgroup v2: the virtual machine is not limited by one");
        return Ok(None);
    };
    // Recorded first: what is not recorded is not removed.
    state.write_record(&Record {
        cgroup: Some(path.clone()),
        ..Record::default()
    })?;
    match cgroup::create(&path) {
        Ok(()) => Ok(Some(path)),
        Err(source) => Err(StartError::State {
            operation: "create the cgroup",
            path,
            source,
        }),
    }
}

/// Moves this process beside the VMM where the caller has a cgroup for all of the pod. The last step of
/// a start: one that fails removes the cgroup with all that is in it.
fn enter_cgroup(config: &SandboxConfig, cgroup: Option<&Path>) -> Option<PathBuf> {
    config.cgroup.as_ref()?;
    match cgroup::enter(cgroup?) {
        Ok(left) => Some(left),
        Err(error) => {
            tracing::warn!(%error, "the pod's cgroup does not account for this process");
            None
        }
    }
}

fn boot_config(
    config: &SandboxConfig,
    state: &StateDir,
    cgroup: Option<&Path>,
    net: Vec<NetConfig>,
) -> Result<BootConfig, StartError> {
    let text = |path: &Path| {
        path.to_str()
            .map(str::to_owned)
            .ok_or_else(|| StartError::State {
                operation: "name to the VMM",
                path: path.to_owned(),
                source: io::ErrorKind::InvalidFilename.into(),
            })
    };
    Ok(BootConfig {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        memory_max_mib: config.memory_growth.max_mib,
        cmdline_extra: config.cmdline_extra.clone(),
        shared_dir: text(&state.shared())?,
        cgroup_dir: cgroup.map(text).transpose()?.unwrap_or_default(),
        net,
        disks: config.disk_slots,
        share_cache_ms: SHARE_CACHE_MS,
        share_echo_group: None,
    })
}

/// How long the guest may believe the share's names and attributes. Volumes may be changed by the
/// host.
const SHARE_CACHE_MS: u64 = 1000;

/// How much of a log's end is told.
const LAST_WORDS_BYTES_MAX: usize = 1024;

/// How far before a log's end a panic is looked for.
const PANIC_BYTES_MAX: u64 = 16 * 1024;

/// What Linux says first as it panics.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// For containers that are being made to fail, once their virtual machine has gone. A hook or a host
/// directory may hold them up.
const CREATES_DEADLINE: Duration = Duration::from_secs(10);

/// For the VMM to end when it is asked to.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(log: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, log).unwrap();
        last_words(&path)
    }

    #[test]
    fn panic_is_told_by_its_reason() {
        let stack = "[    1.5]  ? do_syscall_64+0x6a/0x120\n".repeat(100);
        let words = words_of(&format!(
            "{stack}[    1.4] Kernel panic - not syncing: it was told to\n{stack}"
        ));
        assert!(
            words.starts_with("Kernel panic - not syncing: it was told to"),
            "{words}"
        );
    }

    #[test]
    fn other_logs_are_told_by_their_end() {
        let words = words_of(&format!("{}the end", "x".repeat(5000)));
        assert!(words.len() <= LAST_WORDS_BYTES_MAX && words.ends_with("the end"));
        assert_eq!(last_words(Path::new("/no/such/log")), "");
    }
}
