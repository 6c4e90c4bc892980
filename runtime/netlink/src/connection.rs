//! The socket: requests out, answers in.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::message::{Message, Messages, Request, malformed, u32_at};

/// The kernel answers before the request's system call returns; this is for a kernel that does not.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The kernel makes no part of a dump longer than the reader's buffer, up to this.
const BUFFER_BYTES: usize = 32 * 1024;

/// How often a dump is begun again because what it tells of has changed meanwhile.
const DUMP_TRIES_MAX: u32 = 8;

/// Most entries that a dump may have: a namespace with a full Internet routing table is no pod's.
const DUMP_ENTRIES_MAX: usize = 16 * 1024;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;

/// A connection to the kernel, in the network namespace of the thread that has opened it.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens one.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is zero: the default.
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Has the kernel do something.
    pub(crate) fn call(&mut self, kind: u16, flags: u16, request: Ask<'_>) -> io::Result<()> {
        let sequence = self.send(request(kind, flags | NLM_F_ACK))?;
        loop {
            let length = self.receive()?;
            let messages = Messages {
                rest: &self.buffer[..length],
            };
            for message in messages {
                let message = message?;
                if message.sequence == sequence && message.kind == NLMSG_ERROR {
                    return result_of(message);
                }
            }
        }
    }

    /// Has the kernel list something; `parse` makes an entry of a message, or passes it over.
    pub(crate) fn dump<T>(
        &mut self,
        request: impl Fn(u16) -> Request,
        parse: impl Fn(Message<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES_MAX {
            let sequence = self.send(request(NLM_F_DUMP))?;
            if let Some(entries) = self.receive_dump(sequence, &parse)? {
                return Ok(entries);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "it changes faster than it can be read",
        ))
    }

    /// One dump to its end; `None` if it is not of one moment.
    fn receive_dump<T>(
        &mut self,
        sequence: u32,
        parse: &impl Fn(Message<'_>) -> Option<T>,
    ) -> io::Result<Option<Vec<T>>> {
        let mut entries = Vec::new();
        let mut is_whole = true;
        loop {
            let length = self.receive()?;
            let messages = Messages {
                rest: &self.buffer[..length],
            };
            for message in messages {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                is_whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => {
                        // A dump that fails under way ends with why.
                        if !message.payload.is_empty() {
                            result_of(message)?;
                        }
                        return Ok(is_whole.then_some(entries));
                    }
                    NLMSG_ERROR => result_of(message)?,
                    _ => entries.extend(parse(message)),
                }
            }
            if entries.len() > DUMP_ENTRIES_MAX {
                return Err(io::Error::other(format!(
                    "there are more than {DUMP_ENTRIES_MAX} of them"
                )));
            }
        }
    }

    fn send(&mut self, request: Request) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request.into_bytes(self.sequence);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok((_, length)) if length > self.buffer.len() => return Err(malformed()),
                Ok((_, length)) => return Ok(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Makes a request of its kind and flags.
pub(crate) type Ask<'a> = &'a dyn Fn(u16, u16) -> Request;

/// linux/netlink.h: `struct nlmsgerr` begins with the negative error number, zero for success.
fn result_of(message: Message<'_>) -> io::Result<()> {
    let number = u32_at(message.payload, 0).ok_or_else(malformed)?;
    match number.cast_signed() {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a dump is to whoever asked for it that ends with `payload`.
    fn dump_that_ends_with(payload: &[u8]) -> io::Result<Vec<u16>> {
        const ENTRY: u16 = 16;
        let flags = SocketFlags::CLOEXEC;
        let (kernel, socket) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let mut connection = Connection {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        };
        for message in [
            Request::new(ENTRY, 0, &[]),
            Request::new(NLMSG_DONE, 0, payload),
        ] {
            // The first request has the number 1.
            rustix::net::send(&kernel, &message.into_bytes(1), SendFlags::empty())?;
        }
        connection.dump(
            |flags| Request::new(ENTRY, flags, &[]),
            |message| Some(message.kind),
        )
    }

    #[test]
    fn dump_that_failed_under_way_is_no_list() {
        let error = dump_that_ends_with(&(-Errno::NOBUFS.raw_os_error()).to_ne_bytes());
        assert_eq!(
            error.unwrap_err().raw_os_error(),
            Some(Errno::NOBUFS.raw_os_error())
        );
    }

    #[test]
    fn dump_that_came_to_its_end_is_a_list() {
        assert_eq!(dump_that_ends_with(&[]).unwrap(), [16]);
        assert_eq!(dump_that_ends_with(&[0; 4]).unwrap(), [16]);
    }
}
