//! PID 1 of the guest: launches containers on the host's behalf.
//!
//! The program is two. Without arguments it is the guest's init ([`guest`]): it prepares the
//! machine, connects to the host and serves [`service`] on that connection, single-threaded and
//! asynchronous. With the argument `launch` it is a stage ([`stage`]): a plain program with one
//! thread that turns itself into one process of a container by the plan it is given. Under the name
//! of [`pause`] it is process 1 of a PID namespace that containers share.
//!
//! What the host sends is trusted with the guest, but not to be well-formed. What containers do is
//! not trusted at all: nothing here follows a path inside a container's root outside of it.

pub mod arrivals;
pub mod attributes;
pub mod cgroup;
pub mod container;
pub mod devices;
pub mod disks;
pub mod echo;
pub mod forward;
pub mod guest;
pub mod launch;
pub mod network;
pub mod oci;
pub mod pause;
pub mod plan;
pub mod pod;
pub mod reaper;
pub mod sandbox;
pub mod seccomp;
pub mod service;
mod slots;
pub mod stage;
pub mod stdio;
pub mod sys;
mod syscalls;
