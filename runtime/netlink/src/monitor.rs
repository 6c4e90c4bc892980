//! Hears of changes of a network namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// linux/rtnetlink.h, a bit for each of `RTNLGRP_...`: links, neighbours, and addresses, routes and
/// routing rules of both families.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x4_0000;

/// Most messages that are taken before somebody looks at what has changed.
const MESSAGES_MAX: usize = 1024;

/// A socket that is readable when links, addresses, routes, rules or neighbours have changed. What has, is
/// for the reader to find out: messages may be lost.
#[derive(Debug)]
pub struct Monitor {
    socket: OwnedFd,
}

impl Monitor {
    /// Watches the network namespace of the calling thread.
    ///
    /// # Errors
    /// Those of socket(2) and bind(2).
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            // NETLINK_ROUTE is zero: the default.
            None,
        )?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self { socket })
    }

    /// Takes what has been said so far. Answers whether that was anything.
    ///
    /// # Errors
    /// Those of recv(2).
    pub fn take(&self) -> io::Result<bool> {
        // Nothing in a message is of interest, so none has to fit.
        let mut start = [0_u8; 16];
        let mut has_changed = false;
        for _ in 0..MESSAGES_MAX {
            match rustix::net::recv(&self.socket, &mut start[..], RecvFlags::empty()) {
                // More was said than the socket holds.
                Ok(_) | Err(Errno::NOBUFS) => has_changed = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(has_changed)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
