//! Machines that run a few instructions on the host's KVM.
//!
//! Each payload is an ELF kernel of one segment that is made here. Where `/dev/kvm` does not open the
//! tests say so loudly, each of them, and pass.

#![expect(
    clippy::unwrap_used,
    reason = "in a test, also in what its functions share, a panic is a failure"
)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use husk_vmm::EndReason;
use husk_vmm::ThreadSetup;
use husk_vmm::device::Activation;
use husk_vmm::device::Device;
use husk_vmm::device::DeviceError;
use husk_vmm::device::Profile;
use husk_vmm::machine::Blueprint;
use husk_vmm::machine::BuildError;
use husk_vmm::machine::Config;
use husk_vmm::machine::Machine;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::poll;
use rustix::fs::MemfdFlags;
use rustix::fs::memfd_create;

/// How long a payload may take. A host that emulates its KVM is slow, and may be busy.
const DEADLINE: Duration = Duration::from_secs(60);

const MEMORY_BYTES: u64 = 8 << 20;
const ENTRY: u64 = 2 << 20;

/// Writes zero to port 0x600.
const POWER_OFF: &[u8] = &[
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0x30, 0xc0, // xor al, al
    0xee, // out dx, al
];

/// Writes 0xfe to port 0x64.
const RESET: &[u8] = &[
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
];

/// Raises an exception, with no table of handlers.
const TRIPLE_FAULT: &[u8] = &[
    0x0f, 0x0b, // ud2
];

/// Goes round forever.
const LOOP: &[u8] = &[
    0xeb, 0xfe, // jmp itself
];

/// Powers off if the first device's first register is "virt", and resets if not.
const READ_MAGIC: &[u8] = &[
    // mov dword [0xbff8], 0xd0000083: the last page that is mapped is that of the registers
    0xc7, 0x04, 0x25, 0xf8, 0xbf, 0x00, 0x00, 0x83, 0x00, 0x00, 0xd0, //
    0x8b, 0x1c, 0x25, 0x00, 0x00, 0xe0, 0x3f, // mov ebx, [0x3fe00000]
    0x81, 0xfb, 0x76, 0x69, 0x72, 0x74, // cmp ebx, "virt"
    0x75, 0x07, // jne past the power-off
    0x66, 0xba, 0x00, 0x06, 0x30, 0xc0, 0xee, // as POWER_OFF
    0xb0, 0xfe, 0xe6, 0x64, // as RESET
];

struct Idle;

impl Device for Idle {
    fn profile(&self) -> Profile {
        Profile {
            name: "idle",
            device_type: 42,
            features: 0,
            queue_sizes: &[16],
            is_hidden: false,
        }
    }

    fn run(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// `/dev/kvm`, or a loud skip.
fn kvm() -> Option<OwnedFd> {
    static SKIPPED: AtomicU32 = AtomicU32::new(0);
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Some(kvm.into()),
        Err(error) => {
            let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
            eprintln!("SKIPPED ({count} so far): /dev/kvm does not open: {error}");
            None
        }
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

/// An ELF executable with one segment.
fn kernel(code: &[u8]) -> File {
    let mut image = vec![0; 120];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(24, &ENTRY.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &1_u16.to_le_bytes());
    put(64, &1_u32.to_le_bytes());
    put(72, &120_u64.to_le_bytes());
    put(88, &ENTRY.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &4096_u64.to_le_bytes());
    image.extend(code);
    file_of(&image)
}

fn config(kvm: OwnedFd, code: &[u8]) -> Config {
    Config {
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
        memory_bytes_max: 0,
        kernel: kernel(code),
        initrd: file_of(b"initrd"),
        cmdline_extra: String::new(),
        kvm,
        devices: vec![Box::new(Idle)],
    }
}

fn no_setup() -> ThreadSetup {
    Arc::new(|_| {})
}

fn build(config: Config) -> Machine {
    let blueprint = Blueprint::build(config).unwrap();
    blueprint.launch(&no_setup()).unwrap()
}

fn has_ended(machine: &Machine, deadline: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(machine.end_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&deadline.try_into().unwrap())).unwrap() == 1
}

fn run(config: Config) -> EndReason {
    let mut machine = build(config);
    machine.resume();
    assert!(has_ended(&machine, DEADLINE));
    let reason = machine.take_end().unwrap();
    machine.stop().unwrap();
    reason
}

#[test]
fn a_machine_without_virtual_cpus_is_refused() {
    let Some(kvm) = kvm() else { return };
    let config = Config {
        vcpus: 0,
        ..config(kvm, POWER_OFF)
    };

    assert!(matches!(Blueprint::build(config), Err(BuildError::NoVcpus)));
}

#[test]
fn more_devices_than_lines_are_refused() {
    let Some(kvm) = kvm() else { return };
    let mut config = config(kvm, POWER_OFF);
    config.devices.resize_with(33, || Box::new(Idle));

    assert!(matches!(
        Blueprint::build(config),
        Err(BuildError::TooManyDevices { devices: 33 })
    ));
}

#[test]
fn a_descriptor_that_is_not_kvm_is_refused() {
    let nothing = File::open("/dev/null").unwrap().into();

    assert!(matches!(
        Blueprint::build(config(nothing, POWER_OFF)),
        Err(BuildError::NotKvm { .. })
    ));
}

#[test]
fn an_exception_without_handler_is_a_triple_fault() {
    let Some(kvm) = kvm() else { return };

    assert!(matches!(
        run(config(kvm, TRIPLE_FAULT)),
        EndReason::TripleFault
    ));
}

#[test]
fn the_reset_command_is_a_reset() {
    let Some(kvm) = kvm() else { return };

    assert!(matches!(run(config(kvm, RESET)), EndReason::Reset));
}

#[test]
fn the_power_port_powers_off() {
    let Some(kvm) = kvm() else { return };

    assert!(matches!(run(config(kvm, POWER_OFF)), EndReason::Stopped));
}

#[test]
fn the_guest_sees_the_registers_of_its_first_device() {
    let Some(kvm) = kvm() else { return };

    assert!(matches!(run(config(kvm, READ_MAGIC)), EndReason::Stopped));
}

#[test]
fn nothing_runs_before_it_is_told_to() {
    let Some(kvm) = kvm() else { return };
    let machine = build(config(kvm, POWER_OFF));

    machine.pause().unwrap();

    assert!(machine.take_end().is_none());
    assert_eq!(machine.exits().io(), 0);
}

#[test]
fn a_guest_that_never_exits_is_paused_and_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut machine = build(config(kvm, LOOP));

    machine.resume();
    machine.pause().unwrap();
    machine.resume();
    machine.stop().unwrap();
    machine.stop().unwrap();

    assert!(machine.take_end().is_none());
}

#[test]
fn a_second_virtual_cpu_waits_and_is_stopped() {
    let Some(kvm) = kvm() else { return };
    let config = Config {
        vcpus: 2,
        ..config(kvm, LOOP)
    };
    let mut machine = build(config);

    machine.resume();
    machine.pause().unwrap();
    machine.stop().unwrap();
}

#[test]
fn every_thread_is_set_up() {
    let Some(kvm) = kvm() else { return };
    let seen = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&seen);
    let setup: ThreadSetup = Arc::new(move |kind| {
        list.lock().unwrap().push(format!("{kind:?}"));
    });
    let blueprint = Blueprint::build(config(kvm, POWER_OFF)).unwrap();

    let mut machine = blueprint.launch(&setup).unwrap();
    machine.stop().unwrap();

    let mut seen = seen.lock().unwrap().clone();
    seen.sort();
    assert_eq!(seen, ["Device", "Vcpu"]);
}

#[test]
fn the_end_event_can_be_waited_for_with_others() {
    let Some(kvm) = kvm() else { return };
    let machine = build(config(kvm, POWER_OFF));
    let (reader, _writer) = std::io::pipe().unwrap();

    machine.resume();
    let mut fds =
        [machine.end_fd(), reader.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    poll(&mut fds, Some(&DEADLINE.try_into().unwrap())).unwrap();

    assert!(fds[0].revents().contains(PollFlags::IN));
}
