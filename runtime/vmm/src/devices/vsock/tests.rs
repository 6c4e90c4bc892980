//! The device against a fake driver: bad packets first.

mod deadlines;
mod descriptors;
mod driver;
mod flow;
mod lifetime;
mod packets;
mod rings;
