//! Linux network interfaces, addresses, routes, taps and loopback, without other programs.
//!
//! Speaks rtnetlink (rtnetlink(7)) to the kernel of the calling thread's network namespace. A
//! request is one datagram: a header, a structure that depends on its kind, and attributes, which may
//! nest. The kernel acts on it before the sending call returns, so nothing here waits for long, and
//! nothing needs a runtime. Knows nothing of virtual machines or containers.
//!
//! Errors are the kernel's; whoever calls says what it was about.

mod address;
mod connection;
mod counters;
mod link;
pub mod loopback;
mod message;
mod monitor;
mod neighbour;
mod route;
mod rule;
pub mod tap;
#[cfg(test)]
mod tests;
mod traffic;

pub use address::Address;
pub use connection::Connection;
pub use counters::{Counters, Passed};
pub use link::{ETHERNET, LOOPBACK, Link, LinkChange, Mac};
pub use monitor::Monitor;
pub use neighbour::Neighbour;
pub use route::{Hop, Route};
pub use rule::Rule;
