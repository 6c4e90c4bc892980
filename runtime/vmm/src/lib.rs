//! One virtual machine: KVM, memory, vCPUs, devices, jail.

// See `last_words`. Tests may say what they skip.
#![cfg_attr(not(test), warn(clippy::print_stderr))]

mod allocator;
mod assembly;
mod boot;
pub mod boot_request;
mod bus;
pub mod control;
pub mod device;
pub mod devices;
mod end;
pub mod jail;
mod kvm;
mod last_words;
mod layout;
pub mod machine;
mod memory;
mod pio;
pub mod process;
pub mod seccomp;
mod threads;
mod transport;
mod vcpu;

pub use boot::BootError;
pub use boot::KernelError;
pub use end::EndReason;
pub use memory::GuestRam;
pub use memory::MemoryError;
pub use memory::Region;
pub use threads::StuckThread;
pub use threads::ThreadSetup;
pub use vcpu::ExitCounters;
pub use vcpu::PauseError;
pub use vcpu::SetupError;
pub use vcpu::VcpuError;
