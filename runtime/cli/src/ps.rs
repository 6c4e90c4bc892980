//! `husk ps`: the sandboxes that have a directory on this host.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use husk_sandbox::STATE_DIR_ROOT;

/// List the sandboxes of this host
///
/// STATE is "running" while the process that started the sandbox is there, and "orphaned" when it
/// was killed and nobody has cleaned up yet.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> ExitCode {
    match list(Path::new(STATE_DIR_ROOT)) {
        Ok(lines) => {
            println!("{:<16} {:<32} STATE", "NAMESPACE", "ID");
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("husk: cannot list {STATE_DIR_ROOT}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list(root: &Path) -> std::io::Result<Vec<String>> {
    let mut lines = Vec::new();
    let namespaces = match fs::read_dir(root) {
        Ok(namespaces) => namespaces,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(lines),
        Err(error) => return Err(error),
    };
    for namespace in namespaces {
        let Ok(namespace) = namespace?.file_name().into_string() else {
            continue;
        };
        for (id, has_owner) in husk_sandbox::sandboxes(root, &namespace)? {
            let state = if has_owner { "running" } else { "orphaned" };
            lines.push(format!("{namespace:<16} {id:<32} {state}"));
        }
    }
    lines.sort();
    Ok(lines)
}
