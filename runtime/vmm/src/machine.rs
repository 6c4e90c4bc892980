//! The recipe of a virtual machine, and its life as a whole.
//!
//! [`Blueprint::build`] asks everything of KVM that takes privileges and makes no thread, so it can
//! come before or after the process is jailed. [`Blueprint::launch`] makes the threads, which stand
//! still until [`Machine::resume`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use husk_vmm_control::monotonic_us;
use kvm_ioctls::IoEventAddress;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EFD_CLOEXEC;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::boot;
use crate::boot::BootError;
use crate::bus::Bus;
use crate::device::Device;
use crate::device::Looks;
use crate::device::StillDriven;
use crate::end::End;
use crate::end::EndReason;
use crate::kvm;
use crate::last_words;
use crate::layout::DEVICES_MAX;
use crate::layout::IDENTITY_MAP_GPA;
use crate::layout::MMIO_BYTES;
use crate::layout::MMIO_GPA;
use crate::layout::TSS_GPA;
use crate::layout::irq_of;
use crate::memory::Growth;
use crate::memory::Memory;
use crate::memory::MemoryError;
use crate::memory::ReadOnlyPages;
use crate::seccomp::ThreadKind;
use crate::threads::StuckThread;
use crate::threads::Thread;
use crate::threads::ThreadSetup;
use crate::transport::Mmio;
use crate::transport::RegisterPage;
use crate::transport::Seat;
use crate::vcpu;
use crate::vcpu::ExitCounters;
use crate::vcpu::PauseError;
use crate::vcpu::SetupError;
use crate::vcpu::Template;
use crate::vcpu::Vcpu;
use crate::vcpu::VcpuThread;

/// The machine to build.
pub struct Config {
    /// Number of virtual CPUs, at least one.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of the page size.
    pub memory_bytes: u64,
    /// Most memory it may be given while it runs; no more than the above: none.
    pub memory_bytes_max: u64,
    /// The guest's kernel, an ELF executable.
    pub kernel: File,
    /// The guest's first file system, a cpio archive.
    pub initrd: File,
    /// Added to the kernel's command line.
    pub cmdline_extra: String,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The devices, in the order in which the guest meets them.
    pub devices: Vec<Box<dyn Device>>,
}

/// Why there is no machine. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The machine has no virtual CPU.
    #[error("a machine needs at least one virtual CPU")]
    NoVcpus,
    /// The machine has more devices than there is room for.
    #[error("{devices} devices are more than the {DEVICES_MAX} that a machine can have")]
    TooManyDevices {
        /// How many were given.
        devices: usize,
    },
    /// A step of KVM.
    #[error("KVM cannot {step}")]
    Kvm {
        /// What was to be done.
        step: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The descriptor is not one of KVM.
    #[error("the KVM descriptor has API version {version}, not 12")]
    NotKvm {
        /// What it answered.
        version: i32,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd, tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A virtual CPU.
    #[error(transparent)]
    Vcpu(#[from] SetupError),
    /// The host has no events left.
    #[error("cannot make the events of the {what}")]
    Events {
        /// Whose.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Why the threads of a machine do not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The signal that interrupts virtual CPUs.
    #[error("cannot install the signal handler of virtual CPUs")]
    Signal(#[source] io::Error),
    /// A thread.
    #[error("cannot start the thread of {name}")]
    Thread {
        /// Whose.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A complete machine without threads.
pub struct Blueprint {
    vm: VmFd,
    memory: Memory,
    vcpus: Vec<VcpuFd>,
    bus: Arc<Bus>,
    seats: Vec<Seat>,
    end: Arc<End>,
    times: BuildTimes,
}

/// When parts of a machine were there, as [`monotonic_us`] counts.
#[derive(Debug, Clone, Copy)]
pub struct BuildTimes {
    /// KVM has made the machine.
    pub kvm_us: u64,
    /// Kernel, initrd and tables are in guest memory.
    pub loaded_us: u64,
}

/// A machine whose threads exist. Its virtual CPUs stand still at first.
pub struct Machine {
    // The fields are dropped in this order: nothing may use the memory after its end.
    vcpus: Vec<VcpuThread>,
    devices: Vec<Thread>,
    bus: Arc<Bus>,
    end: Arc<End>,
    exits: Arc<ExitCounters>,
    vm: VmFd,
    memory: Memory,
}

impl Blueprint {
    /// Builds a machine.
    ///
    /// # Errors
    /// [`BuildError`], naming the step.
    pub fn build(config: Config) -> Result<Self, BuildError> {
        if config.vcpus == 0 {
            return Err(BuildError::NoVcpus);
        }
        if config.devices.len() > DEVICES_MAX {
            let devices = config.devices.len();
            return Err(BuildError::TooManyDevices { devices });
        }
        let command_line = boot::device_command_line(config.devices.len(), &config.cmdline_extra);
        let kvm = kvm::open(config.kvm)?;
        let memory = Memory::map_to_grow(
            config.memory_bytes,
            Growth::of(config.memory_bytes, config.memory_bytes_max),
        )?;
        let vm = create_vm(&kvm)?;
        memory.register(&vm)?;
        let kvm_us = monotonic_us();
        let entry = boot::load(
            &memory,
            &config.kernel,
            &config.initrd,
            &command_line,
            config.vcpus,
        )?;
        let loaded_us = monotonic_us();
        // Virtual CPUs get their local interrupt controllers from that of the machine.
        let template = Template::new(&kvm, config.vcpus)?;
        let vcpus = (0..config.vcpus)
            .map(|id| template.create(&vm, id, entry))
            .collect::<Result<_, _>>()?;
        let (devices, seats) = attach(&vm, &memory, config.devices)?;
        let end = End::new().map_err(|source| BuildError::Events {
            what: "machine",
            source,
        })?;
        Ok(Self {
            vm,
            memory,
            vcpus,
            bus: Arc::new(Bus::new(devices)),
            seats,
            end: Arc::new(end),
            times: BuildTimes { kvm_us, loaded_us },
        })
    }

    /// When its parts were there.
    #[must_use]
    pub fn times(&self) -> BuildTimes {
        self.times
    }

    /// Starts all threads; each calls `setup` first.
    ///
    /// # Errors
    /// [`LaunchError`]. Threads that were started have ended.
    pub fn launch(self, setup: &ThreadSetup) -> Result<Machine, LaunchError> {
        vcpu::install_handler().map_err(LaunchError::Signal)?;
        let mut machine = Machine {
            vcpus: Vec::with_capacity(self.vcpus.len()),
            devices: Vec::with_capacity(self.seats.len()),
            bus: self.bus,
            end: self.end,
            exits: Arc::default(),
            vm: self.vm,
            memory: self.memory,
        };
        for seat in self.seats {
            let name = seat.name();
            let kind = ThreadKind::of_device(seat.device_type());
            let thread = Thread::spawn(kind, name, setup, || seat.serve());
            let failed = |source| LaunchError::Thread {
                name: name.to_owned(),
                source,
            };
            machine.devices.push(thread.map_err(failed)?);
        }
        for (id, fd) in (0..).zip(self.vcpus) {
            let vcpu = Vcpu {
                id,
                fd,
                bus: Arc::clone(&machine.bus),
                end: Arc::clone(&machine.end),
                exits: Arc::clone(&machine.exits),
            };
            let failed = |source| LaunchError::Thread {
                name: format!("virtual CPU {id}"),
                source,
            };
            let thread = VcpuThread::spawn(vcpu, setup).map_err(failed)?;
            machine.vcpus.push(thread);
        }
        Ok(machine)
    }
}

impl Machine {
    /// Lets the guest run, for the first time or after a pause.
    pub fn resume(&self) {
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Stops the guest between two instructions of each virtual CPU.
    ///
    /// # Errors
    /// One of them runs on.
    pub fn pause(&self) -> Result<(), PauseError> {
        for vcpu in &self.vcpus {
            vcpu.ask_to_pause();
        }
        self.vcpus.iter().try_for_each(VcpuThread::await_still)
    }

    /// Lets the guest meet the device of that index, or a placeholder in its place, whenever it looks
    /// for one. One that it drives already it has until it lets go.
    pub fn show_device(&self, index: usize, is_there: bool) {
        if let Some(device) = self.bus.devices().nth(index) {
            device.appear(is_there);
        }
    }

    /// Lets the guest meet the device of that index, as it looks now, whenever it looks for one.
    ///
    /// # Errors
    /// A driver has not let go of it as it was before.
    pub fn show_device_as(&self, index: usize, looks: &Looks) -> Result<(), StillDriven> {
        match self.bus.devices().nth(index) {
            Some(mut device) => device.appear_as(looks),
            None => Ok(()),
        }
    }

    /// Lets the guest reach `bytes` bytes more than it booted with, if it can't yet. Answers with the
    /// bytes that it can reach. They are nothing to it until a device offers them.
    ///
    /// # Errors
    /// The machine was not made to have as many, or the host does not provide them.
    pub fn give_memory(&self, bytes: u64) -> Result<u64, MemoryError> {
        self.memory.give(&self.vm, bytes)
    }

    /// Ends all threads: first the virtual CPUs, then the devices, which pass on what they hold.
    /// May be called again, to no effect.
    ///
    /// # Errors
    /// A thread does not end. All the others have been asked to.
    pub fn stop(&mut self) -> Result<(), StuckThread> {
        for vcpu in &self.vcpus {
            vcpu.ask_to_end();
        }
        let mut result = Ok(());
        for vcpu in self.vcpus.drain(..) {
            result = result.and(vcpu.join());
        }
        for mut device in self.bus.devices() {
            device.dismiss();
        }
        for device in self.devices.drain(..) {
            result = result.and(device.join_within(vcpu::JOIN_DEADLINE));
        }
        result
    }

    /// Readable when the guest has ended.
    #[must_use]
    pub fn end_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Why the guest has ended, once.
    #[must_use]
    pub fn take_end(&self) -> Option<EndReason> {
        self.end.take()
    }

    /// Exits of virtual CPUs to this process so far.
    #[must_use]
    pub fn exits(&self) -> &ExitCounters {
        &self.exits
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(stuck) = self.stop() {
            last_words::print(format_args!("{stuck}"));
        }
    }
}

/// A virtual machine with KVM's interrupt controllers. There is no PIT: the kernel learns the
/// frequencies of its clocks from KVM and has the local APIC's timer.
fn create_vm(kvm: &Kvm) -> Result<VmFd, BuildError> {
    let failed = |step| move |source| BuildError::Kvm { step, source };
    let vm = kvm
        .create_vm()
        .map_err(failed("create a virtual machine"))?;
    // Before the virtual CPUs, says KVM.
    vm.set_identity_map_address(IDENTITY_MAP_GPA)
        .map_err(failed("place its identity map"))?;
    let tss = usize::try_from(TSS_GPA).unwrap_or(usize::MAX);
    vm.set_tss_address(tss)
        .map_err(failed("place its task state segment"))?;
    vm.create_irq_chip()
        .map_err(failed("create the interrupt controllers"))?;
    Ok(vm)
}

/// Puts the devices on the bus, each with its registers, its line and the kicks of its queues.
fn attach(
    vm: &VmFd,
    memory: &Memory,
    devices: Vec<Box<dyn Device>>,
) -> Result<(Vec<Mmio>, Vec<Seat>), BuildError> {
    let mut attached = (Vec::new(), Vec::new());
    let pages = Arc::new(ReadOnlyPages::map(devices.len())?);
    pages.register(vm, MMIO_GPA)?;
    let acknowledged =
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| BuildError::Events {
            what: "transport",
            source,
        })?;
    let places = (MMIO_GPA..).step_by(usize::try_from(MMIO_BYTES).unwrap_or(usize::MAX));
    for ((index, device), place) in (0..).zip(devices).zip(places) {
        let irq = irq_of(index);
        let what = device.profile().name;
        let page = RegisterPage::new(Arc::clone(&pages), index);
        let (mmio, seat) = Mmio::new(device, memory.shared(), page)
            .map_err(|source| BuildError::Events { what, source })?;
        vm.register_irqfd(mmio.line(), irq)
            .map_err(|source| BuildError::Kvm {
                step: "connect an interrupt line",
                source,
            })?;
        let notify = IoEventAddress::Mmio(place + Mmio::notify_offset());
        for (index, kick) in (0_u32..).zip(mmio.kicks()) {
            vm.register_ioevent(kick, &notify, index)
                .map_err(|source| BuildError::Kvm {
                    step: "connect a queue's kick",
                    source,
                })?;
        }
        // Nobody listens: KVM takes the write, and the virtual CPU runs on.
        let (register, value) = Mmio::acknowledgement();
        let acknowledgement = IoEventAddress::Mmio(place + register);
        vm.register_ioevent(&acknowledged, &acknowledgement, value)
            .map_err(|source| BuildError::Kvm {
                step: "take acknowledgements of interrupts",
                source,
            })?;
        attached.0.push(mmio);
        attached.1.push(seat);
    }
    Ok(attached)
}
