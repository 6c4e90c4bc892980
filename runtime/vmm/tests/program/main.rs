//! The real program, started and watched by its parent. Needs root and /dev/kvm.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod host;
mod parent;
mod process;
