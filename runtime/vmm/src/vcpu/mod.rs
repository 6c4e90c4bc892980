//! The virtual CPUs.
//!
//! Each is a thread that runs the guest until KVM hands an exit over. [`exit`] turns what KVM says
//! into a small enum and [`run`] asks the devices for the answer; nothing but [`exit`] and [`setup`]
//! knows KVM.

mod cpuid;
mod exit;
mod kick;
mod run;
mod setup;

pub(crate) use kick::install_handler;
pub use run::ExitCounters;
pub(crate) use run::JOIN_DEADLINE;
pub use run::PauseError;
pub(crate) use run::Vcpu;
pub(crate) use run::VcpuThread;
pub use setup::SetupError;
pub(crate) use setup::Template;

/// Why a virtual CPU can't go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused to run it.
    #[error("KVM cannot run virtual CPU {id}")]
    Run {
        /// Which one.
        id: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The processor did not accept the state of the guest.
    #[error("the processor refuses to enter the guest on virtual CPU {id}: reason {reason:#x}")]
    Entry {
        /// Which one.
        id: u8,
        /// The processor's code.
        reason: u64,
    },
    /// KVM could not emulate what the guest did.
    #[error("KVM cannot emulate what the guest does on virtual CPU {id}")]
    Emulation {
        /// Which one.
        id: u8,
    },
    /// An exit that this machine has no use for.
    #[error("virtual CPU {id} has stopped for a reason that is not known: {exit}")]
    Unknown {
        /// Which one.
        id: u8,
        /// What KVM called it.
        exit: String,
    },
}
