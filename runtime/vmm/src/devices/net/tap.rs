//! The tap: frames between it and guest memory, and what it may leave undone to them.
//!
//! The only module of the device with unsafe code: system calls on iovecs that point into guest
//! memory, to which no Rust reference may exist, and one ioctl.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};
use vm_memory::VolatileSlice;

/// A piece of guest memory.
pub(super) type Slice<'m> = VolatileSlice<'m, ()>;

/// Most pieces of one frame (`IOV_MAX`).
pub(super) const PIECES_MAX: usize = 1024;

/// linux/if_tun.h: `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;

/// linux/if_tun.h: `TUN_F_...`, each with the feature of a driver that can take such frames.
const OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, 0x01),
    (VIRTIO_NET_F_GUEST_TSO4, 0x02),
    (VIRTIO_NET_F_GUEST_TSO6, 0x04),
    (VIRTIO_NET_F_GUEST_ECN, 0x08),
    (VIRTIO_NET_F_GUEST_USO4, 0x20),
    (VIRTIO_NET_F_GUEST_USO6, 0x40),
];
/// `TUN_F_CSUM`, without which the others count for nothing.
const CHECKSUM: u32 = 0x01;
/// `TUN_F_USO4` and `TUN_F_USO6`, since Linux 6.2 and together only.
const UDP: u32 = 0x60;

/// What came of handing a frame to the tap or asking for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// That many bytes, of which a reader's memory may have held fewer.
    Bytes(usize),
    /// There is nothing now.
    Nothing,
    /// This frame can't be had.
    Refused,
    /// The interface does not exist any more.
    Gone,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Can leave checksums and the segmentation of TCP undone.
    Tcp,
    /// And that of UDP.
    TcpAndUdp,
    /// A socket in place of a tap.
    #[cfg(test)]
    Socket,
}

impl Tap {
    /// Takes a tap.
    ///
    /// # Errors
    /// It is none.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = match set_offloads(&fd, CHECKSUM | UDP) {
            Ok(()) => Kind::TcpAndUdp,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Kind::Tcp,
            Err(error) => return Err(error),
        };
        set_offloads(&fd, 0)?;
        Ok(Self { fd, kind })
    }

    #[cfg(test)]
    pub(super) fn of_socket(fd: OwnedFd) -> Self {
        let kind = Kind::Socket;
        Self { fd, kind }
    }

    pub(super) fn can_segment_udp(&self) -> bool {
        self.kind == Kind::TcpAndUdp
    }

    pub(super) fn borrow(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Lets the tap leave undone what the driver can do.
    pub(super) fn set_offloads(&self, has_feature: impl Fn(u32) -> bool) -> io::Result<()> {
        let mut offloads = OFFLOADS
            .iter()
            .filter(|(feature, _)| has_feature(*feature))
            .fold(0, |offloads, (_, offload)| offloads | offload);
        if offloads & CHECKSUM == 0 {
            offloads = 0;
        }
        if offloads & UDP != UDP {
            offloads &= !UDP;
        }
        match self.kind {
            #[cfg(test)]
            Kind::Socket => Ok(()),
            Kind::Tcp | Kind::TcpAndUdp => set_offloads(&self.fd, offloads),
        }
    }

    /// Reads one frame. Its bytes may be more than there was memory for.
    pub(super) fn read(&self, into: &[Slice<'_>], iovecs: &mut Iovecs) -> Moved {
        let (parts, count) = iovecs.of(into);
        // SAFETY: each part lies in guest memory that `into` borrows; the kernel writes only there,
        // and Rust holds no reference to it.
        let done = unsafe { libc::readv(self.fd.as_raw_fd(), parts, count) };
        moved(done)
    }

    /// Reads one frame into memory of our own.
    pub(super) fn read_bytes(&self, into: &mut [u8]) -> Moved {
        match rustix::io::read(&self.fd, into) {
            Ok(bytes) => Moved::Bytes(bytes),
            Err(errno) => not_moved(errno.raw_os_error()),
        }
    }

    /// Writes one frame.
    pub(super) fn write(&self, from: &[Slice<'_>], iovecs: &mut Iovecs) -> Moved {
        let (parts, count) = iovecs.of(from);
        // SAFETY: each part lies in guest memory that `from` borrows, and the kernel only reads it.
        let done = unsafe { libc::writev(self.fd.as_raw_fd(), parts, count) };
        moved(done)
    }
}

/// Room for the pieces of one frame at a time. They are of use only to the call they are made for.
#[derive(Debug, Default)]
pub(super) struct Iovecs {
    parts: Vec<libc::iovec>,
}

impl Iovecs {
    fn of(&mut self, slices: &[Slice<'_>]) -> (*const libc::iovec, libc::c_int) {
        let parts = slices.iter().take(PIECES_MAX).map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        self.parts.clear();
        self.parts.extend(parts);
        let count = libc::c_int::try_from(self.parts.len()).unwrap_or_default();
        (self.parts.as_ptr(), count)
    }
}

fn set_offloads(fd: &OwnedFd, offloads: u32) -> io::Result<()> {
    let argument = libc::c_ulong::from(offloads);
    // SAFETY: TUNSETOFFLOAD takes a number and touches no memory of ours.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn moved(done: isize) -> Moved {
    match usize::try_from(done) {
        Ok(bytes) => Moved::Bytes(bytes),
        Err(_) => not_moved(
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or_default(),
        ),
    }
}

fn not_moved(errno: i32) -> Moved {
    match errno {
        libc::EAGAIN | libc::EINTR => Moved::Nothing,
        // What a tap answers once its interface was removed, or its namespace.
        libc::EBADFD => Moved::Gone,
        _ => Moved::Refused,
    }
}
