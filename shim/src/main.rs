//! containerd's runtime v2 shim of Husk: a server for each pod, and the commands that start and
//! bury it (containerd, core/runtime/v2/README.md).
//!
//! containerd trusts what it says; it does not trust containerd's input to be well formed, and
//! nothing at all that comes from the guest.
#![forbid(unsafe_code)]

mod args;
mod bootstrap;
mod convert;
mod events;
mod log;
mod logger;
mod params;
mod pod;
mod pod_config;
mod pod_files;
mod pod_spec;
mod rpc;
mod sandbox_rpc;
mod server;
mod service;
mod state;
mod stats;
mod stdio;
mod task;

use std::process::ExitCode;

use anyhow::Context;
use args::{Action, Arguments};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For `start` and `delete`, containerd shows what it finds here to its user.
            eprintln!("containerd-shim-husk-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let mut raw = std::env::args_os().skip(1).peekable();
    if raw.next_if(|first| first == logger::BECOME).is_some() {
        return Err(logger::become_logger(raw)).context("cannot become the log driver");
    }
    let arguments = Arguments::parse(raw)?;
    match arguments.action {
        Action::Version => {
            println!(
                "containerd-shim-husk-v2:\n  Version: {}",
                env!("CARGO_PKG_VERSION")
            );
            Ok(())
        }
        Action::Info => bootstrap::info().context("cannot say what this runtime is"),
        Action::Start => bootstrap::start(&arguments)
            .with_context(|| format!("cannot start a shim for {:?}", arguments.id)),
        Action::Delete => bootstrap::delete(&arguments)
            .with_context(|| format!("cannot clean up after {:?}", arguments.id)),
        Action::Serve => server::serve(arguments),
    }
}
