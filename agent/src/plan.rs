//! What the agent and a launch stage say to each other.
//!
//! The two share one `SOCK_SEQPACKET` pair; the stage finds its end as standard input. The first
//! datagram is a [`Handover`]: a memfd with the [`Plan`] and the process's three streams. From then
//! on the stage sends [`Report`]s and the agent sends [`Order`]s. The stage's end closes on exec:
//! end of file without [`Report::Failed`] says that the program runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::oci;

/// All that a stage needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// What to run, and as whom.
    pub process: oci::Process,
    /// Its system call filter.
    pub seccomp: Option<oci::Seccomp>,
    /// Its execution domain.
    pub personality: Option<oci::Personality>,
    /// Directory of the container's cgroup; none where there is no cgroup v2.
    pub cgroup: Option<PathBuf>,
    /// Where to run it.
    pub place: Place,
    /// The file system on a disk that is a new container's root; none: the root is there.
    pub root_disk: Option<oci::Mount>,
    /// What to run before it.
    pub start_hooks: Option<StartHooks>,
}

/// Programs to be run before the process, and what they are told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StartHooks {
    /// In their order.
    pub hooks: Vec<husk_hook::Hook>,
    /// But for the pid.
    pub state: HookState,
}

/// The state of a container, as the specification has hooks read it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HookState {
    /// The version of the specification.
    pub oci_version: String,
    /// The container's.
    pub id: String,
    /// Where it is in its life.
    pub status: String,
    /// Of its process, in the PID namespace of who reads it.
    pub pid: i32,
    /// Where its owner keeps it on the host.
    pub bundle: String,
    /// What its owner wants to be known of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl StartHooks {
    /// Those of a container, if it has any.
    pub fn of(spec: &oci::Spec, id: &str, bundle: &str) -> Option<Self> {
        if spec.hooks.start_container.is_empty() {
            return None;
        }
        Some(Self {
            hooks: spec.hooks.start_container.clone(),
            state: HookState {
                oci_version: spec.oci_version.clone(),
                id: id.to_owned(),
                status: "created".to_owned(),
                pid: 0,
                bundle: bundle.to_owned(),
                annotations: spec.annotations.clone(),
            },
        })
    }

    /// How long they may take, all together.
    pub fn time_limit(&self) -> Duration {
        self.hooks.iter().map(husk_hook::Hook::time_limit).sum()
    }
}

/// Where a process runs.
#[derive(Debug, Serialize, Deserialize)]
pub enum Place {
    /// In a new container.
    Create(Box<oci::Spec>),
    /// In the namespaces of a container whose init has this pid.
    Enter {
        /// Init's pid in the agent's PID namespace.
        init_pid: i32,
    },
    /// In a new PID namespace that containers are to join, as its first process.
    Pause,
}

/// What the stage tells.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// It sits in a new user namespace whose id maps the agent must write; waits for an order.
    NeedsMappings {
        /// The stage's pid.
        pid: i32,
    },
    /// The process exists; it waits for an order.
    Forked {
        /// Its pid in the agent's PID namespace.
        pid: i32,
    },
    /// One descriptor comes along: the terminal's master side.
    Console,
    /// Everything is prepared; it waits for an order to run the program.
    Ready,
    /// The last report of a stage that gives up.
    Failed(Failure),
}

/// Why a launch came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// The step and what went wrong, for people.
    pub text: String,
    /// Whether the request asked for something that can't be, as opposed to a fault of ours.
    pub is_request_at_fault: bool,
}

/// What the agent answers: go on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order;

/// First datagram to a stage. Descriptors: the plan, standard input, output and error.
#[derive(Debug, Serialize, Deserialize)]
pub struct Handover;

/// Descriptors that come with a [`Handover`].
pub const HANDOVER_FDS: usize = 4;

/// Longest datagram.
const MESSAGE_BYTES_MAX: usize = 16 * 1024;

/// Longest text of a failure; the rest of it is cut off.
pub const FAILURE_TEXT_BYTES_MAX: usize = 4 * 1024;

/// Longest plan: a spec is at most one RPC message of 4 MiB, and JSON may grow when written again.
const PLAN_BYTES_MAX: u64 = 32 * 1024 * 1024;

impl Plan {
    /// Writes the plan into a memfd.
    pub fn to_memfd(&self) -> io::Result<OwnedFd> {
        let mut file = File::from(rustix::fs::memfd_create("plan", MemfdFlags::CLOEXEC)?);
        serde_json::to_writer(io::BufWriter::new(&mut file), self)?;
        file.rewind()?;
        Ok(file.into())
    }

    /// Reads it back.
    pub fn from_memfd(fd: OwnedFd) -> io::Result<Plan> {
        let mut text = Vec::new();
        File::from(fd).take(PLAN_BYTES_MAX).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Sends one message with descriptors.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if fds.is_empty() {
        // Not sendmsg: the process's own filter may be in force already, and write is what every
        // program needs anyway.
        rustix::io::write(socket, &text)?;
        return Ok(());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HANDOVER_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    sendmsg(
        socket,
        &[IoSlice::new(&text)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives one message and what descriptors came with it; `None` at the end.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(HANDOVER_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut text)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let text = text.get(..received.bytes).unwrap_or_default();
    Ok(Some((serde_json::from_slice(text)?, fds)))
}

/// Waits for an order without more system calls than a plain read.
pub fn await_order(socket: impl AsFd) -> io::Result<()> {
    let mut text = [0; 64];
    let length = rustix::io::read(socket, &mut text[..])?;
    if length == 0 {
        return Err(io::Error::other("the agent gave the launch up"));
    }
    let Order = serde_json::from_slice(text.get(..length).unwrap_or_default())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    #[test]
    fn message_that_is_none_is_an_error() {
        let (a, b) = pair();
        rustix::io::write(&a, b"{\"Forked\":").unwrap();
        assert!(receive::<Report>(b.as_fd()).is_err());
    }

    #[test]
    fn closed_peer_is_the_end() {
        let (a, b) = pair();
        drop(a);
        assert!(receive::<Report>(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn order_of_a_closed_peer_is_an_error() {
        let (a, b) = pair();
        drop(a);
        assert!(await_order(&b).is_err());
    }

    #[test]
    fn descriptors_come_along() {
        let (a, b) = pair();
        send(a.as_fd(), &Report::Console, &[a.as_fd()]).unwrap();
        let (report, fds) = receive::<Report>(b.as_fd()).unwrap().unwrap();
        assert_eq!(report, Report::Console);
        assert_eq!(fds.len(), 1);
    }
}
