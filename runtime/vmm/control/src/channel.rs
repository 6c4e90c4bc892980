//! One datagram out, one datagram in, with descriptors.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::{io::Errno, net};
use serde::{Serialize, de::DeserializeOwned};

use crate::NET_DEVICES_MAX;

/// Longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Most descriptors beside one message: a boot request has five, and the taps.
pub const DESCRIPTORS_MAX: usize = 5 + NET_DEVICES_MAX;

/// One end of a control socket.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// Why a message was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is closed.
    #[error("the other end of the control socket has hung up")]
    HungUp,
    /// Only for a non-blocking socket.
    #[error("the control socket is not ready")]
    WouldBlock,
    /// The socket failed.
    #[error("control socket")]
    Io(#[source] io::Error),
    /// The message is longer than [`MESSAGE_BYTES_MAX`] or carries more than [`DESCRIPTORS_MAX`].
    #[error("control message too large")]
    TooLarge,
    /// Not a message of this protocol.
    #[error("malformed control message")]
    Malformed(#[source] serde_json::Error),
}

impl Channel {
    /// A connected pair, both ends close-on-exec and blocking.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Takes over one end of a `SOCK_SEQPACKET` pair.
    pub fn from_socket(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The socket itself.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message with its descriptors.
    ///
    /// # Errors
    /// [`ChannelError`]; `WouldBlock` only where the socket was made non-blocking.
    pub fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(ChannelError::TooLarge);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(ChannelError::TooLarge);
        }
        let iov = [io::IoSlice::new(&bytes)];
        loop {
            match net::sendmsg(&self.socket, &iov, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ChannelError::WouldBlock),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    return Err(ChannelError::HungUp);
                }
                Err(errno) => return Err(ChannelError::Io(errno.into())),
            }
        }
    }

    /// Receives one message and its descriptors, which are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError`]; descriptors of a refused message are closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let iov = &mut [io::IoSliceMut::new(&mut bytes)];
            match net::recvmsg(&self.socket, iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ChannelError::WouldBlock),
                Err(Errno::CONNRESET) => return Err(ChannelError::HungUp),
                Err(errno) => return Err(ChannelError::Io(errno.into())),
            }
        };
        let descriptors = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Err(ChannelError::HungUp);
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ChannelError::TooLarge);
        }
        let message =
            serde_json::from_slice(&bytes[..received.bytes]).map_err(ChannelError::Malformed)?;
        Ok((message, descriptors))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::{Call, Request};

    #[test]
    fn message_arrives_with_its_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        a.send(
            &Request {
                id: 7,
                call: Call::Pause,
            },
            &[reader.as_fd()],
        )
        .unwrap();
        drop(reader);

        let (request, mut descriptors) = b.receive::<Request>().unwrap();

        assert!(matches!(
            request,
            Request {
                id: 7,
                call: Call::Pause
            }
        ));
        writer.write_all(b"through").unwrap();
        drop(writer);
        let mut text = String::new();
        io::PipeReader::from(descriptors.pop().unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "through");
        assert!(descriptors.is_empty());
    }

    #[test]
    fn hang_up_is_told_apart_from_failure() {
        let (a, b) = Channel::pair().unwrap();
        drop(a);
        assert!(matches!(b.receive::<Request>(), Err(ChannelError::HungUp)));
        let refused = b.send(
            &Request {
                id: 1,
                call: Call::Stop,
            },
            &[],
        );
        assert!(matches!(refused, Err(ChannelError::HungUp)));
    }

    #[test]
    fn malformed_message_is_refused() {
        let (a, b) = Channel::pair().unwrap();
        for bad in [
            "",
            "{}",
            "{\"id\":1}",
            "{\"id\":1,\"call\":{\"call\":\"fly\"}}",
        ] {
            a.send(&serde_json::json!(bad), &[]).unwrap();
            assert!(
                matches!(b.receive::<Request>(), Err(ChannelError::Malformed(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn oversized_message_is_refused_on_both_sides() {
        let (a, b) = Channel::pair().unwrap();
        let long = "x".repeat(MESSAGE_BYTES_MAX);
        assert!(matches!(a.send(&long, &[]), Err(ChannelError::TooLarge)));
        net::send(&a, &vec![b'x'; MESSAGE_BYTES_MAX + 1], SendFlags::empty()).unwrap();
        assert!(matches!(
            b.receive::<Request>(),
            Err(ChannelError::TooLarge)
        ));
    }
}
