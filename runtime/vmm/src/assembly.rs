//! From a boot request to a machine that stands still, in its jail, every thread confined.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use husk_virtiofs::{CachePolicy, Options, Server, ServerError};
use husk_vmm_control::{BootTimes, DiskConfig, ExitReason, Metrics, monotonic_us};

use crate::boot_request::Boot;
use crate::control::{Guest, describe};
use crate::device::{Device, StillDriven};
use crate::devices::blk::{self, BlkDevice, DiskError, Geometry};
use crate::devices::console::ConsoleDevice;
use crate::devices::fs::{FsDevice, FsError, REQUEST_QUEUES_MAX};
use crate::devices::mem::{self, MemDevice};
use crate::devices::net::{NetDevice, Socket, Traffic};
use crate::devices::rng::RngDevice;
use crate::devices::vsock::{VsockDevice, VsockHandle};
use crate::end::EndReason;
use crate::jail::{self, JailError, Jailed};
use crate::last_words;
use crate::machine::{Blueprint, BuildError, Config, LaunchError, Machine};
use crate::memory::{Growth, MemoryError};
use crate::seccomp::{Filters, SeccompError, ThreadKind};
use crate::threads::ThreadSetup;
use crate::vcpu::PauseError;

/// How long threads may take to confine themselves, on a host that is very busy.
const CONFINE_TIMEOUT: Duration = Duration::from_secs(30);

/// A machine at the disposal of the control loop.
pub(crate) struct Assembled {
    pub(crate) guest: JailedGuest,
    pub(crate) vsock: VsockHandle,
    pub(crate) times: BootTimes,
}

/// Which part could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssembleError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("cannot serve the shared directory")]
    Share(#[from] ServerError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("cannot make the vsock device")]
    Vsock(#[source] io::Error),
    #[error("cannot make the memory device")]
    Mem(#[source] io::Error),
    #[error("cannot use the tap of network device {index}")]
    Tap { index: usize, source: io::Error },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("a thread has not confined itself within {CONFINE_TIMEOUT:?}")]
    Unconfined,
}

/// Enters the jail and builds the machine. When it returns, this thread and all others are
/// confined.
pub(crate) fn assemble(boot: Boot) -> Result<Assembled, AssembleError> {
    let jailed = jail::enter(&boot.shared_dir)?;
    let jailed_us = monotonic_us();
    let filters = Filters::compile()?;
    let server = share(jailed, boot.share_cache_ms, boot.share_echo_group)?;
    let queues = usize::from(boot.vcpus).min(REQUEST_QUEUES_MAX);
    let fs = FsDevice::new(&server, queues, &filters)?;
    let (vsock, handle) = VsockDevice::new(boot.files.agent).map_err(AssembleError::Vsock)?;
    let mut devices: Vec<Box<dyn Device>> = vec![
        Box::new(vsock),
        Box::new(fs),
        Box::new(RngDevice),
        Box::new(ConsoleDevice::new(boot.files.console)),
    ];
    let memory_bytes = u64::from(boot.memory_mib) << 20;
    let memory_bytes_max = u64::from(boot.memory_max_mib) << 20;
    let mut growth = None;
    if let Some(place) = Growth::of(memory_bytes, memory_bytes_max) {
        let (device, socket) = MemDevice::new(place).map_err(AssembleError::Mem)?;
        devices.push(Box::new(device));
        growth = Some(socket);
    }
    let mut net = Vec::new();
    for (index, booted) in boot.net.into_iter().enumerate() {
        let (device, socket) =
            NetDevice::new(booted).map_err(|source| AssembleError::Tap { index, source })?;
        net.push((devices.len(), socket));
        devices.push(Box::new(device));
    }
    let mut disks = Vec::new();
    for _ in 0..boot.disks {
        let (device, socket) = BlkDevice::new();
        disks.push((devices.len(), socket));
        devices.push(Box::new(device));
    }
    let threads = devices.len() + usize::from(boot.vcpus);
    let blueprint = Blueprint::build(Config {
        vcpus: boot.vcpus,
        memory_bytes,
        memory_bytes_max,
        kernel: boot.files.kernel,
        initrd: boot.files.initrd,
        cmdline_extra: boot.cmdline_extra,
        kvm: boot.files.kvm,
        devices,
    })?;
    let times = blueprint.times();
    let machine = launch_confined(blueprint, &filters, threads)?;
    filters.install(ThreadKind::Control)?;
    Ok(Assembled {
        guest: JailedGuest {
            machine,
            server,
            memory_bytes,
            growth,
            net,
            disks,
        },
        vsock: handle,
        times: BootTimes {
            jailed_us,
            kvm_us: times.kvm_us,
            loaded_us: times.loaded_us,
            built_us: monotonic_us(),
        },
    })
}

/// The file server for the share, within the descriptors this process may have.
fn share(
    jailed: Jailed,
    cache_ms: u64,
    echo_group: Option<u32>,
) -> Result<Arc<Server>, ServerError> {
    let cache = Duration::from_millis(cache_ms);
    let mut options = Options::pod(jailed.own_descriptors);
    options.echo_group = echo_group;
    options.shared = CachePolicy {
        entry: cache,
        attributes: cache,
        ..CachePolicy::SHARED
    };
    let open_files = usize::try_from(jailed.open_files_max).unwrap_or(usize::MAX);
    if open_files < options.descriptors_max() {
        options.handles_max = open_files / 4;
        options.inodes_max = open_files / 2;
    }
    Ok(Arc::new(Server::new(jailed.root, options)?))
}

/// Starts the machine's threads and waits until each is under its filter.
fn launch_confined(
    blueprint: Blueprint,
    filters: &Filters,
    threads: usize,
) -> Result<Machine, AssembleError> {
    let (confined, results) = mpsc::channel();
    let filters = filters.clone();
    let setup: ThreadSetup = Arc::new(move |kind| {
        let result = filters.install(kind);
        let has_failed = result.is_err();
        // If nobody listens any more the process is about to end.
        let _ = confined.send(result);
        if has_failed {
            // It must not go on, and the process is about to end.
            loop {
                std::thread::park();
            }
        }
    });
    let machine = blueprint.launch(&setup)?;
    for _ in 0..threads {
        match results.recv_timeout(CONFINE_TIMEOUT) {
            Ok(result) => result?,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return Err(AssembleError::Unconfined);
            }
        }
    }
    Ok(machine)
}

/// The machine, as the control loop sees it.
pub(crate) struct JailedGuest {
    machine: Machine,
    server: Arc<Server>,
    /// What the guest has booted with.
    memory_bytes: u64,
    /// What it may have more, if it may.
    growth: Option<mem::Socket>,
    /// With the index of their device.
    net: Vec<(usize, Socket)>,
    /// As well.
    disks: Vec<(usize, blk::Socket)>,
}

/// Why the machine did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error("cannot have the guest take {memory_mib} MiB of memory")]
    ResizeMemory {
        memory_mib: u32,
        source: MemoryError,
    },
    #[error("the machine has no network device {device}")]
    NoNetDevice { device: usize },
    #[error("cannot plug a tap into network device {device}")]
    PlugNet { device: usize, source: io::Error },
    #[error("the machine has no slot {slot} for disks")]
    NoDiskSlot { slot: usize },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot plug a disk into slot {slot}")]
    PlugDisk { slot: usize, source: StillDriven },
}

impl Guest for JailedGuest {
    type Error = GuestError;

    fn start(&mut self) -> Result<(), GuestError> {
        self.machine.resume();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.pause()?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.resume();
        Ok(())
    }

    fn plug_net(&mut self, device: usize, tap: Option<OwnedFd>) -> Result<(), GuestError> {
        let place = self.net.get(device);
        let (index, socket) = place.ok_or(GuestError::NoNetDevice { device })?;
        let is_there = tap.is_some();
        socket
            .plug(tap)
            .map_err(|source| GuestError::PlugNet { device, source })?;
        self.machine.show_device(*index, is_there);
        Ok(())
    }

    fn plug_disk(
        &mut self,
        slot: usize,
        disk: Option<(DiskConfig, OwnedFd)>,
    ) -> Result<(), GuestError> {
        let place = self.disks.get(slot);
        let (index, socket) = place.ok_or(GuestError::NoDiskSlot { slot })?;
        let Some((config, file)) = disk else {
            self.machine.show_device(*index, false);
            socket.pull();
            return Ok(());
        };
        let DiskConfig {
            bytes,
            block_bytes,
            is_read_only,
            can_zero,
            serial,
        } = config;
        let looks = socket.plug(
            file,
            Geometry {
                bytes,
                block_bytes,
                is_read_only,
                can_zero,
                serial,
            },
        )?;
        // The disk is there before the guest can see it.
        self.machine
            .show_device_as(*index, &looks)
            .map_err(|source| {
                socket.pull();
                GuestError::PlugDisk { slot, source }
            })
    }

    fn resize_memory(&mut self, memory_mib: u32) -> Result<bool, GuestError> {
        let bytes = (u64::from(memory_mib) << 20).saturating_sub(self.memory_bytes);
        let Some(growth) = &self.growth else {
            return match bytes {
                0 => Ok(true),
                _ => Err(GuestError::ResizeMemory {
                    memory_mib,
                    source: MemoryError::Growth {
                        bytes,
                        bytes_max: 0,
                    },
                }),
            };
        };
        let usable = self
            .machine
            .give_memory(bytes)
            .map_err(|source| GuestError::ResizeMemory { memory_mib, source })?;
        Ok(growth.request(bytes, usable))
    }

    fn memory_fd(&self) -> Option<BorrowedFd<'_>> {
        self.growth.as_ref().map(mem::Socket::reached_fd)
    }

    fn has_memory(&mut self) -> bool {
        self.growth.as_ref().is_some_and(mem::Socket::take_reached)
    }

    fn shut_down(&mut self) {
        if let Err(stuck) = self.machine.stop() {
            // The end of the process ends it too.
            last_words::print(format_args!("husk-vmm: {}", describe(&stuck)));
        }
    }

    fn end_fd(&self) -> BorrowedFd<'_> {
        self.machine.end_fd()
    }

    fn end(&mut self) -> Option<ExitReason> {
        let reason = self.machine.take_end()?;
        Some(match reason {
            EndReason::Stopped => ExitReason::Stopped,
            EndReason::Reset => ExitReason::Reset,
            EndReason::TripleFault => ExitReason::TripleFault,
            EndReason::Failed(error) => ExitReason::Error {
                text: describe(&error),
            },
        })
    }

    fn metrics(&self) -> Metrics {
        let exits = self.machine.exits();
        let files = self.server.counters();
        let net = self.net.iter().map(|(_, socket)| socket.traffic());
        let net = net.fold(Traffic::default(), Traffic::plus);
        Metrics {
            net_received_frames: net.received_frames,
            net_received_bytes: net.received_bytes,
            net_sent_frames: net.sent_frames,
            net_sent_bytes: net.sent_bytes,
            net_dropped_frames: net.dropped_frames,
            exits_io: exits.io(),
            exits_mmio: exits.mmio(),
            memory_plugged_bytes: self.growth.as_ref().map_or(0, mem::Socket::plugged_bytes),
            fs_requests: files.requests,
            fs_read_bytes: files.bytes_read,
            fs_written_bytes: files.bytes_written,
            fs_inodes: files.inodes,
            ..Metrics::default()
        }
    }
}
