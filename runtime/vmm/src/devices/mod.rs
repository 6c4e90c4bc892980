//! The virtio devices. Each is a thread that owns its queues; none of them sees a register.

pub mod blk;
pub mod console;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod fd;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
mod simple;
pub mod vsock;
