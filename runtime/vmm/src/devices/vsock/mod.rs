//! virtio-vsock: stream sockets between the guest and descriptors of the host (virtio 1.2, 5.10).
//!
//! # Protocol
//! A packet is a header of 44 bytes and a payload. Packets of the guest come on the tx queue,
//! ours go out in buffers of the rx queue. A connection is named by both addresses, lives from
//! REQUEST and RESPONSE to RST, and carries bytes in RW. Each side says in every header how large
//! its receive buffer is (`buf_alloc`) and how much of what came it has passed on (`fwd_cnt`), so
//! that the other never sends what does not fit. SHUTDOWN closes a direction for good; after both
//! bits the connection ends with a RST from the peer.
//!
//! # What this device allows
//! The host connects to the guest, with descriptors that [`VsockHandle::connect`] brings. The
//! guest may connect once, to [`AGENT_PORT`]; every other request of it is answered with RST.
//!
//! # Trust
//! Everything in a packet is input. What breaks the rules is answered by this list, first match:
//!
//! | packet | reaction |
//! |---|---|
//! | no complete header | dropped |
//! | source CID is not the guest's | dropped: nobody to answer |
//! | RST for an unknown connection | dropped: a RST is never answered |
//! | payload shorter than announced, or in too many descriptors | RST, connection ends |
//! | destination CID is not the host's, type is not stream | RST |
//! | any other packet for an unknown connection | RST |
//! | operation that the connection's state forbids, unknown operation | RST, connection ends |
//! | data after SHUTDOWN, data beyond our `buf_alloc` | RST, connection ends |
//!
//! No packet makes the device hold more than [`RECEIVE_BUFFER_BYTES`] for a connection or
//! [`RESETS_WAITING_MAX`] answers for packets without one.

mod complaints;
mod connection;
mod credit;
mod device;
mod handle;
mod io;
mod muxer;
mod packet;
mod queues;
#[cfg(test)]
mod tests;

pub use device::VsockDevice;
pub use handle::{
    CONNECT_TIMEOUT, CONNECTS_WAITING_MAX, Connect, ConnectError, Descriptors, Refusal,
    VsockCounters, VsockEvent, VsockHandle,
};

/// The context id of the host (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// The context id of the guest.
pub const GUEST_CID: u64 = 3;
/// The only port of the host that the guest may connect to, and only once.
pub const AGENT_PORT: u32 = 1024;

/// Most connections at a time. With [`RECEIVE_BUFFER_BYTES`] it bounds what the device may hold
/// for slow readers: 256 MiB, if a thousand of them are slow.
pub const CONNECTIONS_MAX: usize = 1024;
/// What we hold of a connection whose sink is slow; advertised to the guest as `buf_alloc`.
pub const RECEIVE_BUFFER_BYTES: u32 = 256 * 1024;
/// Most RST packets that wait for an rx buffer without a connection to belong to. At the limit
/// the tx queue rests until the driver has made rx buffers available (virtio 1.2, 5.10.6.1).
pub const RESETS_WAITING_MAX: usize = 256;
