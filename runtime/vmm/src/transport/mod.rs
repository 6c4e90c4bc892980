//! Between drivers and devices: everything that virtio leaves to the transport.
//!
//! [`Mmio`] is what the driver sees: registers, which it reads from a [`RegisterPage`], and the order in which it may use them. It hands a
//! device to its thread, through a [`worker::Worker`], only when the driver has completed the set-up
//! and every number of it was checked. [`Seat`] is that thread's side.

mod mmio;
mod page;
mod queue;
mod registers;
mod status;
#[cfg(test)]
mod tests;
mod worker;

pub(crate) use mmio::Mmio;
pub(crate) use page::RegisterPage;
pub(crate) use worker::Seat;
