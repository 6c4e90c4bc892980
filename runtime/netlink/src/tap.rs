//! Taps: interfaces whose other end is a descriptor.
//!
//! Beside [`crate::loopback`] the only module with unsafe code: the ioctls of /dev/net/tun.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// Longest name of an interface.
pub const NAME_BYTES_MAX: usize = 15;

/// Before each packet there is `struct virtio_net_hdr_v1`, as virtio 1.2, 5.1.6 has it.
pub const HEADER_BYTES: i32 = 12;

/// `_IOW('T', 202, int)`
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `_IOW('T', 216, int)`
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// linux/if_tun.h `IFF_TUN_EXCL`, whose value is the sign bit.
const IFF_TUN_EXCL: i16 = i16::MIN;

/// linux/if.h: the part of `struct ifreq` that TUNSETIFF reads and writes, at the full size.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES_MAX + 1],
    flags: i16,
    rest: [u8; 22],
}

/// Makes a tap in the network namespace of the calling thread. It exists for as long as its
/// descriptor, which does not block.
///
/// # Errors
/// `EBUSY` if the name is taken; else those of open(2) and ioctl(2).
pub fn create(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut request = Request {
        name: [0; NAME_BYTES_MAX + 1],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let tap: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `request` is as large as and which
    // nothing else refers to.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes: libc::c_int = HEADER_BYTES;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap.into())
}
