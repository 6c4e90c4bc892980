//! One system call filter for each kind of thread.
//!
//! A filter is a list of what its threads do in normal service, with arguments where the call alone
//! says too little. Anything else ends the process with `SIGSYS`; the kernel's audit log names the
//! call. No thread may execute a program, map executable memory or make a socket, and only those
//! that serve files may open any.
//!
//! The lists hold for glibc, dynamic or static: its allocator, its locks and the end of a thread are
//! in `rules::EVERY_THREAD`. Threads install their filter themselves, as their first action.

mod rules;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;
use std::sync::Arc;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET, VIRTIO_ID_VSOCK};

/// The kinds of threads of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread, once the machine is built: control messages and events.
    Control,
    /// Runs a virtual CPU.
    Vcpu,
    /// Serves a device that touches only its queues and descriptors it was given.
    Device,
    /// The vsock device: as a device, and it waits for streams.
    Vsock,
    /// A network device: moves frames between its queues and its tap.
    Net,
    /// A disk: moves bytes between its queue and its file.
    Blk,
    /// Serves FUSE requests: the only kind that opens files.
    FsWorker,
}

/// The compiled filters. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Filters {
    programs: Arc<[BpfProgram; ThreadKind::ALL.len()]>,
}

/// Why a filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The rules make no program.
    #[error("cannot compile the system call filter of {kind:?} threads")]
    Compile {
        /// Whose.
        kind: ThreadKind,
        /// Why.
        source: seccompiler::BackendError,
    },
    /// The kernel refused it.
    #[error("cannot install the system call filter of {kind:?} threads")]
    Install {
        /// Whose.
        kind: ThreadKind,
        /// Why.
        source: seccompiler::Error,
    },
}

impl ThreadKind {
    /// Every kind, in the order of declaration.
    pub const ALL: [Self; 7] = [
        Self::Control,
        Self::Vcpu,
        Self::Device,
        Self::Vsock,
        Self::Net,
        Self::Blk,
        Self::FsWorker,
    ];

    /// The kind of a virtio device's own thread, by the device's type.
    #[must_use]
    pub fn of_device(device_type: u32) -> Self {
        match device_type {
            VIRTIO_ID_VSOCK => Self::Vsock,
            VIRTIO_ID_NET => Self::Net,
            VIRTIO_ID_BLOCK => Self::Blk,
            _ => Self::Device,
        }
    }
}

impl Filters {
    /// Compiles all filters.
    ///
    /// # Errors
    /// [`SeccompError::Compile`], which means that a rule is wrong.
    pub fn compile() -> Result<Self, SeccompError> {
        let mut programs: [BpfProgram; ThreadKind::ALL.len()] = Default::default();
        for (kind, program) in ThreadKind::ALL.into_iter().zip(&mut programs) {
            *program = compile(kind)?;
        }
        Ok(Self {
            programs: Arc::new(programs),
        })
    }

    /// Binds the calling thread, forever, to the filter of its kind. Sets no-new-privs.
    ///
    /// # Errors
    /// [`SeccompError::Install`]; the thread must then not go on.
    pub fn install(&self, kind: ThreadKind) -> Result<(), SeccompError> {
        seccompiler::apply_filter(&self.programs[kind as usize])
            .map_err(|source| SeccompError::Install { kind, source })
    }
}

/// A call that is on the list whatever its arguments is found by the tree; the other rules, and what
/// becomes of all other calls, are left to the library's program.
fn compile(kind: ThreadKind) -> Result<BpfProgram, SeccompError> {
    let failed = |source| SeccompError::Compile { kind, source };
    let (plain, conditional): (BTreeMap<_, _>, BTreeMap<_, _>) = rules::of(kind)
        .map_err(failed)?
        .into_iter()
        .partition(|(_, conditions)| conditions.is_empty());
    let arch = TargetArch::x86_64;
    let rest = SeccompFilter::new(conditional, refusal(), SeccompAction::Allow, arch)
        .and_then(SeccompFilter::try_into)
        .map_err(failed)?;
    let numbers = plain
        .into_keys()
        .filter_map(|call| u32::try_from(call).ok());
    Ok(tree::allow_or_else(numbers, rest))
}

/// What happens at a call that is not on the list.
fn refusal() -> SeccompAction {
    // For whoever looks for the calls a change has added; never in what users install.
    #[cfg(debug_assertions)]
    if std::env::var_os("HUSK_SECCOMP_LOG").is_some() {
        return SeccompAction::Log;
    }
    SeccompAction::KillProcess
}
