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
pub(crate) struct Arguments {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
struct Listed {
    namespace: String,
    id: String,
    state: &'static str,
}

pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let listed = match list(Path::new(STATE_DIR_ROOT)) {
        Ok(listed) => listed,
        Err(error) => {
            eprintln!("husk: cannot list {STATE_DIR_ROOT}: {error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.json {
        match serde_json::to_string_pretty(&listed) {
            Ok(json) => println!("{json}"),
            Err(error) => {
                eprintln!("husk: cannot write JSON: {error}");
                return ExitCode::FAILURE;
            }
        }
        return ExitCode::SUCCESS;
    }
    println!("{:<16} {:<32} STATE", "NAMESPACE", "ID");
    for Listed {
        namespace,
        id,
        state,
    } in listed
    {
        println!("{namespace:<16} {id:<32} {state}");
    }
    ExitCode::SUCCESS
}

fn list(root: &Path) -> std::io::Result<Vec<Listed>> {
    let mut listed = Vec::new();
    let namespaces = match fs::read_dir(root) {
        Ok(namespaces) => namespaces,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(listed),
        Err(error) => return Err(error),
    };
    for namespace in namespaces {
        let Ok(namespace) = namespace?.file_name().into_string() else {
            continue;
        };
        for (id, has_owner) in husk_sandbox::sandboxes(root, &namespace)? {
            listed.push(Listed {
                namespace: namespace.clone(),
                id,
                state: if has_owner { "running" } else { "orphaned" },
            });
        }
    }
    listed.sort();
    Ok(listed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandboxes_are_listed_and_sockets_are_not() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(list(&root.path().join("none")).unwrap(), []);
        fs::create_dir_all(root.path().join("default/t1")).unwrap();
        fs::create_dir(root.path().join("s")).unwrap();
        fs::write(root.path().join("s/0123"), "").unwrap();

        let listed = list(root.path()).unwrap();

        let expected = Listed {
            namespace: "default".to_owned(),
            id: "t1".to_owned(),
            state: "orphaned",
        };
        assert_eq!(listed, [expected]);
    }
}
