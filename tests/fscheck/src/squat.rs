//! What a container without any rights can try against the vsock of its guest: to have the ports that
//! somebody else may need, and to connect to those that somebody has.
//!
//! Prints a line when it has its ports, goes on until standard input ends, and then says what came of
//! it. Exits with a failure as soon as it has got hold of a byte that is not its own.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket,
};

/// Services have their ports from 1024 on, what counts up begins where 16 bits end. Together fewer
/// than the descriptors that a process may have.
const PORTS: [Range<u32>; 2] = [1024..1152, 0x1_0000..0x1_0300];

/// The port that must not be had.
const TAKEN: u32 = 1025;

/// Of the guest itself: by loopback, by its own address; and the host.
const CIDS: [u32; 3] = [libc::VMADDR_CID_LOCAL, 3, libc::VMADDR_CID_HOST];

/// Takes what it can, until standard input ends.
pub(crate) fn squat() -> io::Result<()> {
    let mut listeners = Vec::new();
    let mut refused = Vec::new();
    for port in PORTS.into_iter().flatten() {
        match take(port) {
            Ok(listener) => listeners.push(listener),
            Err(Errno::EADDRINUSE) => refused.push(port),
            Err(error) => return Err(error.into()),
        }
    }
    let mut output = io::stdout().lock();
    writeln!(output, "has {} ports, not {refused:?}", listeners.len())?;
    output.flush()?;
    let (mut tried, mut connected) = (0_u64, 0_u64);
    while !is_something_ready(&listeners)? {
        for cid in CIDS {
            tried += 1;
            if let Some(socket) = reach(cid)? {
                connected += 1;
                let mut socket = std::fs::File::from(socket);
                let mut bytes = [0; 64];
                if socket.read(&mut bytes).is_ok_and(|length| length > 0) {
                    return Err(io::Error::other(format!("CID {cid} gave {bytes:?}")));
                }
            }
        }
    }
    writeln!(output, "tried {tried} connected {connected}")?;
    Ok(())
}

fn vsock() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
}

fn take(port: u32) -> Result<OwnedFd, Errno> {
    let listener = vsock()?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, port),
    )?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// A connection to the port, if it comes to one: that nobody answers is no error.
fn reach(cid: u32) -> Result<Option<OwnedFd>, Errno> {
    let socket = vsock()?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(cid, TAKEN)) {
        Ok(()) => Ok(Some(socket)),
        Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Whether standard input has ended. A connection to one of the ports is somebody else's, and an error.
fn is_something_ready(listeners: &[OwnedFd]) -> io::Result<bool> {
    let input = io::stdin();
    let mut watched = vec![PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    let all = listeners.iter().map(AsFd::as_fd);
    watched.extend(all.map(|listener| PollFd::new(listener, PollFlags::POLLIN)));
    let ready = poll(&mut watched, PollTimeout::ZERO)?;
    let has_input = watched
        .first()
        .is_some_and(|input| input.any() == Some(true));
    if ready > usize::from(has_input).try_into().unwrap_or_default() {
        return Err(io::Error::other(
            "a connection has come to one of the ports",
        ));
    }
    Ok(has_input)
}
