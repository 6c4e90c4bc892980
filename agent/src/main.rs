//! The agent's program; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    if arguments.next().as_deref() == Some(husk_agent::pause::NAME) {
        return husk_agent::pause::main();
    }
    match arguments.next().as_deref() {
        Some("launch") => husk_agent::stage::main(),
        _ => husk_agent::guest::main(),
    }
}
