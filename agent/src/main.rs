//! The agent's program; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("launch") => husk_agent::stage::main(),
        _ => husk_agent::guest::main(),
    }
}
