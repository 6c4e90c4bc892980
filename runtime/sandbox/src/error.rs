//! What can go wrong, in the words of the callers.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, io};

/// How a virtual machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEnd {
    /// A sentence for people: who ended it, and why.
    pub reason: String,
    /// The guest powered itself off or was asked to stop, and the VMM ended cleanly.
    pub is_clean: bool,
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Why a sandbox could not be started. Everything that had been made is undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The namespace or the pod's id can't name a directory.
    #[error(
        "{name:?} can't name a {what}: letters, digits, '.', '_' and '-' only, at most {max} characters"
    )]
    Name {
        /// The offending name.
        name: String,
        /// What it was to name.
        what: &'static str,
        /// Longest allowed.
        max: usize,
    },
    /// The pod's directory is there already.
    #[error("a sandbox has its state in {path:?} already")]
    AlreadyExists {
        /// The directory.
        path: PathBuf,
    },
    /// A file or directory of the pod could not be made.
    #[error("cannot {operation} {path:?}")]
    State {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Something the machine is booted from can't be opened.
    #[error("cannot open {what} {path:?}")]
    Open {
        /// `/dev/kvm`, the guest kernel, ...
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The pod's network namespace could not be made.
    #[error("cannot make a network namespace")]
    MakeNetns(#[source] io::Error),
    /// The interfaces in it can't be given to the virtual machine.
    #[error(transparent)]
    Network(#[from] crate::NetworkError),
    /// The guest refused the pod's network.
    #[error("the guest can't have the pod's network: {text}")]
    GuestNetwork {
        /// The agent's words.
        text: String,
    },
    /// The VMM process could not be started.
    #[error("cannot start the VMM {path:?}: {step}")]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The step that failed.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM refused a call.
    #[error("the VMM could not {call}: {text}")]
    Vmm {
        /// The call, as a verb.
        call: &'static str,
        /// The VMM's words.
        text: String,
    },
    /// The virtual machine ended while it was being started.
    #[error("the virtual machine ended while it was starting: {0}")]
    VmGone(VmEnd),
    /// The agent refused or garbled the handshake.
    #[error("the guest's agent refused the handshake: {text}")]
    Agent {
        /// The agent's words.
        text: String,
    },
    /// The agent speaks another version of the protocol: initrd and binaries are not of one build.
    #[error(
        "the guest's agent speaks version {found} of the protocol, not {expected}: is the initrd of the same build?"
    )]
    AgentVersion {
        /// What it speaks.
        found: u32,
        /// What we speak.
        expected: u32,
    },
    /// A step took too long.
    #[error("{step} took longer than {deadline:?}")]
    Deadline {
        /// The step.
        step: &'static str,
        /// How long it was given.
        deadline: Duration,
    },
}

/// What kind of failure a [`ContainerError`] is; the same distinctions as gRPC codes make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are gRPC's")]
pub enum ErrorKind {
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Unimplemented,
    Unavailable,
    DeadlineExceeded,
    Internal,
}

/// Why an operation on a container or a process failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// The agent refused. The text is cut to a sane length and has no control characters.
    #[error("{text}")]
    Agent {
        /// The agent's own distinction.
        kind: ErrorKind,
        /// The agent's words.
        text: String,
    },
    /// There is no such container or process.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// `container`, `process`.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// There is one of that name already.
    #[error("{what} {id:?} already exists")]
    AlreadyExists {
        /// `container`, `process`.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The request can't be what the caller meant.
    #[error("{text}")]
    Invalid {
        /// What is wrong with it.
        text: String,
    },
    /// The spec asks for what a guest can't give.
    #[error(transparent)]
    Spec(#[from] crate::SpecError),
    /// The root file system or a volume could not be put into the share.
    #[error(transparent)]
    Mount(#[from] crate::MountError),
    /// A block device of the host can't be had.
    #[error(transparent)]
    Disk(#[from] crate::DiskError),
    /// A hook has failed.
    #[error(transparent)]
    Hook(#[from] crate::HookError),
    /// The pod's network has changed, and the guest's can't follow.
    #[error(transparent)]
    Network(#[from] crate::NetworkError),
    /// A file of the container could not be made or removed on the host.
    #[error("cannot {operation} {path:?}")]
    State {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM could not connect a stream, or refused another call.
    #[error("the VMM could not {call}: {text}")]
    Vmm {
        /// The call, as a verb.
        call: &'static str,
        /// The VMM's words.
        text: String,
    },
    /// The virtual machine has had as many streams as there are ports for.
    #[error("the virtual machine has had all the streams it can have in its life")]
    StreamsUsedUp,
    /// The virtual machine is gone, and the container with it.
    #[error("the virtual machine has ended: {0}")]
    VmGone(VmEnd),
    /// The guest did not answer in time.
    #[error("the guest did not answer {call} within {deadline:?}")]
    Deadline {
        /// The call.
        call: &'static str,
        /// How long it was given.
        deadline: Duration,
    },
}

impl ContainerError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Agent { kind, .. } => *kind,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Invalid { .. } | Self::Spec(_) => ErrorKind::InvalidArgument,
            Self::Disk(_) => ErrorKind::FailedPrecondition,
            Self::VmGone(_) | Self::StreamsUsedUp => ErrorKind::Unavailable,
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Mount(_)
            | Self::Hook(_)
            | Self::Network(_)
            | Self::State { .. }
            | Self::Vmm { .. } => ErrorKind::Internal,
        }
    }
}

/// What could not be removed. Calling again tries again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CleanupError {
    /// The namespace or the id can't name a directory, so nothing of that name was ever made.
    #[error("{name:?} can't name a sandbox")]
    Name {
        /// The offending name.
        name: String,
    },
    /// A step failed.
    #[error("cannot {operation} {path:?}")]
    Step {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM was sent SIGKILL and is still there: it hangs in the host's kernel.
    #[error("the VMM, process {pid}, has not ended within {deadline:?} of SIGKILL")]
    VmmStays {
        /// Its pid.
        pid: i32,
        /// How long it was given.
        deadline: Duration,
    },
}

/// Longest text taken over from a VMM or a guest.
const TEXT_CHARS_MAX: usize = 1024;

/// A text from a VMM or a guest, made fit for a log or a terminal: one line, no control characters,
/// no longer than a person would read.
pub(crate) fn cap_text(text: &str) -> String {
    let mut chars = text.trim().chars();
    let mut capped: String = chars
        .by_ref()
        .take(TEXT_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if chars.next().is_some() {
        capped.push('…');
    }
    capped
}

/// An error with all its causes, in one line.
pub(crate) fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_guest_is_cut_and_cleaned() {
        let capped = cap_text(&format!("\x1b[31m{}\n", "é".repeat(TEXT_CHARS_MAX)));
        assert_eq!(capped.chars().count(), TEXT_CHARS_MAX + 1);
        assert!(!capped.contains(char::is_control));
        assert!(capped.ends_with('…'));
    }

    #[test]
    fn causes_are_told() {
        let error = StartError::Open {
            what: "the initrd",
            path: "/x".into(),
            source: io::Error::other("gone"),
        };
        assert_eq!(describe(&error), "cannot open the initrd \"/x\": gone");
    }
}
