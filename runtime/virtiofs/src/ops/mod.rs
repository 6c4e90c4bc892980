//! The operations, by subject. Each takes its arguments, acts, and writes the body of its reply.

mod attributes;
mod create;
mod directory;
mod echo;
mod file;
mod names;
mod session;
mod transfer;
mod xattr;

/// Most bytes of file data in one READ or WRITE: `max_pages` of 4096 bytes.
pub(crate) const TRANSFER_BYTES_MAX: u32 = 1024 * 1024;

pub(crate) use echo::Echo;
#[cfg(feature = "fuser")]
pub(crate) use session::negotiate;
