//! Calls to the guest's agent.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_protocol::PROTOCOL_VERSION;
use husk_protocol::messages::{
    AttachDiskRequest, ConfigureNetworkRequest, DetachDiskRequest, HelloRequest, HelloResponse,
    ShutdownRequest,
};
use husk_protocol::service::AgentClient;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Socket;

use crate::disks::{GuestDisk, Number};
use crate::error::{VmEnd, cap_text};
use crate::vmm::Vmm;
use crate::{ContainerError, ErrorKind, StartError};

/// The agent of one guest.
pub(crate) struct Agent {
    client: AgentClient,
}

/// No deadline of ttrpc's own: ours covers sending as well.
pub(crate) fn context() -> ttrpc::context::Context {
    ttrpc::context::Context::default()
}

impl Agent {
    /// Takes over the host's end of the agent stream.
    pub(crate) fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let client = ttrpc::asynchronous::Client::new(Socket::new(stream));
        Ok(Self {
            client: AgentClient::new(client),
        })
    }

    /// The first call. Answered when the guest is up.
    pub(crate) async fn hello(
        &self,
        vmm: &Vmm,
        hostname: &str,
        disk_slots: usize,
    ) -> Result<HelloResponse, StartError> {
        let mut request = HelloRequest::new();
        request.protocol_version = PROTOCOL_VERSION;
        request.entropy = entropy();
        hostname.clone_into(&mut request.hostname);
        request.disk_slots = number(disk_slots);
        let answered = self
            .call(vmm, "hello", Some(HELLO_DEADLINE), |client| async move {
                client.hello(context(), &request).await
            })
            .await;
        let response = answered.map_err(|error| match error {
            ContainerError::VmGone(end) => StartError::VmGone(end),
            ContainerError::Deadline { deadline, .. } => StartError::Deadline {
                step: "booting the guest",
                deadline,
            },
            other => StartError::Agent {
                text: other.to_string(),
            },
        })?;
        if response.protocol_version != PROTOCOL_VERSION {
            return Err(StartError::AgentVersion {
                found: response.protocol_version,
                expected: PROTOCOL_VERSION,
            });
        }
        Ok(response)
    }

    /// For calls that end with the virtual machine by themselves.
    pub(crate) fn client(&self) -> AgentClient {
        self.client.clone()
    }

    /// Sets the guest's network.
    pub(crate) async fn configure_network(
        &self,
        vmm: &Vmm,
        request: ConfigureNetworkRequest,
    ) -> Result<(), ContainerError> {
        let answered = self.call(
            vmm,
            "configure network",
            Some(NETWORK_DEADLINE),
            |client| async move { client.configure_network(context(), &request).await },
        );
        answered.await.map(drop)
    }

    /// Has the guest find the disk that was plugged into a slot.
    pub(crate) async fn attach_disk(
        &self,
        vmm: &Vmm,
        slot: usize,
    ) -> Result<GuestDisk, ContainerError> {
        let mut request = AttachDiskRequest::new();
        request.slot = number(slot);
        let attach =
            |client: AgentClient| async move { client.attach_disk(context(), &request).await };
        let disk = self
            .call(vmm, "attach disk", Some(DISK_DEADLINE), attach)
            .await?;
        if !disk.node.starts_with("/dev/") || disk.node.len() > NODE_BYTES_MAX {
            return Err(ContainerError::Agent {
                kind: ErrorKind::Internal,
                text: cap_text(&format!("{:?} is not the node of a disk", disk.node)),
            });
        }
        Ok(GuestDisk {
            number: Number {
                major: disk.major,
                minor: disk.minor,
            },
            node: disk.node.into(),
        })
    }

    /// Has the guest write a disk back and let go of it.
    pub(crate) async fn detach_disk(&self, vmm: &Vmm, slot: usize) -> Result<(), ContainerError> {
        let mut request = DetachDiskRequest::new();
        request.slot = number(slot);
        let detach =
            |client: AgentClient| async move { client.detach_disk(context(), &request).await };
        self.call(vmm, "detach disk", Some(DISK_DEADLINE), detach)
            .await
            .map(drop)
    }

    /// Asks the guest to power itself off. The answer may be lost with the guest.
    pub(crate) async fn shutdown(&self) {
        let _ = self
            .client
            .shutdown(context(), &ShutdownRequest::new())
            .await;
    }

    /// Makes a call. It ends with an answer, at its deadline, or with the virtual machine.
    pub(crate) async fn call<T, F>(
        &self,
        vmm: &Vmm,
        name: &'static str,
        deadline: Option<Duration>,
        make: impl FnOnce(AgentClient) -> F,
    ) -> Result<T, ContainerError>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let answer = make(self.client.clone());
        let bounded = async {
            match deadline {
                Some(deadline) => {
                    timeout(deadline, answer)
                        .await
                        .map_err(|_| ContainerError::Deadline {
                            call: name,
                            deadline,
                        })
                }
                None => Ok(answer.await),
            }
        };
        let answer = tokio::select! {
            biased;
            answer = bounded => answer?,
            end = vmm.ended() => return Err(ContainerError::VmGone(end)),
        };
        match answer {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(ContainerError::Agent {
                kind: kind_of(status.code()),
                text: cap_text(&status.message),
            }),
            Err(error) => Err(ContainerError::VmGone(lost(vmm, &error).await)),
        }
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

/// The connection to the agent is gone. The agent is the guest's PID 1, so its machine is ending; one
/// that isn't can't be reached any more, and is ended.
async fn lost(vmm: &Vmm, error: &ttrpc::Error) -> VmEnd {
    if let Ok(end) = timeout(LOSS_DEADLINE, vmm.ended()).await {
        return end;
    }
    tracing::warn!(
        error = cap_text(&error.to_string()),
        "killing a virtual machine that has hung up"
    );
    vmm.kill().await
}

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::NOT_FOUND => ErrorKind::NotFound,
        Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
        Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
        Code::UNAVAILABLE => ErrorKind::Unavailable,
        Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
        _ => ErrorKind::Internal,
    }
}

/// There are few of what is counted.
fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Seeds the guest's pool. Without it the guest still has its rng device.
fn entropy() -> Vec<u8> {
    let mut bytes = vec![0; ENTROPY_BYTES];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(count) => bytes.truncate(count),
        Err(_) => bytes.clear(),
    }
    bytes
}

const ENTROPY_BYTES: usize = 64;

/// From the guest's first instruction to the agent's answer. Generous: an emulated host with ten
/// guests starting at once takes the better part of a minute.
const HELLO_DEADLINE: Duration = Duration::from_secs(120);

/// For the guest's kernel to set up some interfaces.
const NETWORK_DEADLINE: Duration = Duration::from_secs(30);

/// For the guest's kernel to look for partitions on a disk, or to write back what is left in memory of
/// it, as far as the host's device keeps up.
const DISK_DEADLINE: Duration = Duration::from_secs(60);

/// Longest name of a node that a guest may have for a disk.
const NODE_BYTES_MAX: usize = 64;

/// From the loss of the agent's connection to the end of its machine.
const LOSS_DEADLINE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_keep_their_meaning() {
        for (code, kind) in [
            (Code::NOT_FOUND, ErrorKind::NotFound),
            (Code::ALREADY_EXISTS, ErrorKind::AlreadyExists),
            (Code::FAILED_PRECONDITION, ErrorKind::FailedPrecondition),
            (Code::INVALID_ARGUMENT, ErrorKind::InvalidArgument),
            (Code::UNIMPLEMENTED, ErrorKind::Unimplemented),
            (Code::UNKNOWN, ErrorKind::Internal),
            (Code::OK, ErrorKind::Internal),
        ] {
            assert_eq!(kind_of(code), kind, "{code:?}");
        }
    }
}
