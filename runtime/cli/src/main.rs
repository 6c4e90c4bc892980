//! husk: run a container in its own virtual machine, check a machine.

#![forbid(unsafe_code)]

mod bundle;
mod check;
mod ps;
mod run;
mod terminal;
mod user;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use husk_sandbox::Settings;
use tracing_subscriber::EnvFilter;

/// Containers in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(name = "husk", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Arguments),
    Check(check::Arguments),
    Ps(ps::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log_to_stderr();
    match arguments.command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Ps(arguments) => ps::run(&arguments),
    }
}

/// Warnings go to standard error, and what `RUST_LOG` or the settings ask for.
fn log_to_stderr() {
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).ok();
    // What is wrong with the settings is told by the command that needs them.
    let settings = Settings::load().unwrap_or_default();
    let level = match wanted {
        Some(wanted) => wanted,
        None if settings.log.level == Settings::default().log.level => "warn".to_owned(),
        None => settings.log.level,
    };
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .init();
}
