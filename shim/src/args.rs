//! The command line of a containerd shim (containerd, core/runtime/v2/README.md).
//!
//! Go's flag syntax: one dash or two, the value in the same argument after `=` or in the next
//! one, and the action as the first argument that is no flag.

use std::ffi::OsString;
use std::path::PathBuf;

/// What containerd wants this process to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make sure that a server for the task's pod is running, and print its address.
    Start,
    /// Clean up after a server that is gone.
    Delete,
    /// Print a `RuntimeInfo`.
    Info,
    /// Print the version.
    Version,
    /// Serve the Task API. What `start` runs; nobody types it.
    Serve,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    /// containerd's namespace of the task. Empty for `-info` and `-v`.
    pub(crate) namespace: String,
    /// The task's id. Empty for `-info` and `-v`.
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// The bundle's path, where containerd gives it (`delete`).
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
    /// When `start` began that runs this server, as `monotonic_us` counts; 0: not said.
    pub(crate) began_us: u64,
}

/// Why a command line was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgumentsError {
    #[error("argument {0:?} is not valid UTF-8")]
    NotUtf8(OsString),
    #[error("unknown flag -{0}")]
    UnknownFlag(String),
    #[error("flag -{0} needs a value")]
    NoValue(&'static str),
    #[error("flag -{flag} takes true or false, not {value:?}")]
    NotABool { flag: &'static str, value: String },
    #[error("unknown action {0:?}: expected start, delete, -info or -v")]
    UnknownAction(String),
    #[error("no action: expected start, delete, -info or -v")]
    NoAction,
    #[error("unexpected argument {0:?} after the action")]
    Surplus(String),
    #[error("flag -{flag}: {value:?} is not a number")]
    NotANumber { flag: &'static str, value: String },
    #[error("flag -{flag}: {value:?} is not a valid identifier")]
    BadIdentifier { flag: &'static str, value: String },
}

/// Longest namespace or id, as containerd's identifiers package has it.
const IDENTIFIER_BYTES_MAX: usize = 76;

/// The flags that take a value, and where it goes.
const VALUE_FLAGS: [&str; 7] = [
    "namespace",
    "id",
    "address",
    "bundle",
    "publish-binary",
    "socket",
    "began-us",
];
const BOOL_FLAGS: [&str; 4] = ["debug", "info", "v", "serve"];

impl Arguments {
    /// Parses what follows the program's name.
    pub(crate) fn parse(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, ArgumentsError> {
        let mut values: [String; VALUE_FLAGS.len()] = Default::default();
        let mut switches = [false; BOOL_FLAGS.len()];
        let mut arguments = arguments.into_iter();
        let mut word = None;
        while let Some(argument) = next(&mut arguments)? {
            let Some((name, value)) = flag(&argument) else {
                word = Some(argument);
                break;
            };
            if let Some(index) = VALUE_FLAGS.iter().position(|known| *known == name) {
                values[index] = match value {
                    Some(value) => value.to_owned(),
                    None => {
                        next(&mut arguments)?.ok_or(ArgumentsError::NoValue(VALUE_FLAGS[index]))?
                    }
                };
            } else if let Some(index) = BOOL_FLAGS.iter().position(|known| *known == name) {
                switches[index] = boolean(BOOL_FLAGS[index], value)?;
            } else {
                return Err(ArgumentsError::UnknownFlag(name.to_owned()));
            }
        }
        if let Some(surplus) = next(&mut arguments)? {
            return Err(ArgumentsError::Surplus(surplus));
        }
        let [debug, info, version, serve] = switches;
        let action = match word.as_deref() {
            _ if version => Action::Version,
            _ if info => Action::Info,
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => return Err(ArgumentsError::UnknownAction(other.to_owned())),
            None if serve => Action::Serve,
            None => return Err(ArgumentsError::NoAction),
        };
        let [namespace, id, address, bundle, _, _, began_us] = values;
        if !matches!(action, Action::Info | Action::Version) {
            identifier("namespace", &namespace)?;
            identifier("id", &id)?;
        }
        Ok(Self {
            action,
            namespace,
            id,
            address,
            bundle: bundle.into(),
            debug,
            began_us: microseconds(began_us)?,
        })
    }
}

fn microseconds(value: String) -> Result<u64, ArgumentsError> {
    match value.as_str() {
        "" => Ok(0),
        text => text.parse().map_err(|_| ArgumentsError::NotANumber {
            flag: "began-us",
            value,
        }),
    }
}

fn next(arguments: &mut impl Iterator<Item = OsString>) -> Result<Option<String>, ArgumentsError> {
    arguments
        .next()
        .map(|raw| raw.into_string().map_err(ArgumentsError::NotUtf8))
        .transpose()
}

/// Splits `-name`, `--name`, `-name=value`; `None` for anything else.
fn flag(argument: &str) -> Option<(&str, Option<&str>)> {
    let name = argument
        .strip_prefix("--")
        .or_else(|| argument.strip_prefix('-'))?;
    Some(match name.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (name, None),
    })
}

fn boolean(flag: &'static str, value: Option<&str>) -> Result<bool, ArgumentsError> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(value) => Err(ArgumentsError::NotABool {
            flag,
            value: value.to_owned(),
        }),
    }
}

/// The names become names of directories, so they must be what containerd itself lets through:
/// letters and digits, with single `-`, `_` or `.` between them.
fn identifier(flag: &'static str, value: &str) -> Result<(), ArgumentsError> {
    let good = value.len() <= IDENTIFIER_BYTES_MAX
        && value
            .split(['-', '_', '.'])
            .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    if good {
        Ok(())
    } else {
        Err(ArgumentsError::BadIdentifier {
            flag,
            value: value.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, ArgumentsError> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn bad_command_lines_are_refused_by_name() {
        let named = "-namespace n -id i";
        for (line, wanted) in [
            ("", "no action: expected start, delete, -info or -v"),
            ("-wrong start", "unknown flag -wrong"),
            ("-namespace", "flag -namespace needs a value"),
            (
                "-debug=maybe start",
                "flag -debug takes true or false, not \"maybe\"",
            ),
            (
                "-id i start",
                "flag -namespace: \"\" is not a valid identifier",
            ),
            (
                "-namespace n -id ../i start",
                "flag -id: \"../i\" is not a valid identifier",
            ),
            (
                "-namespace n -id a..b start",
                "flag -id: \"a..b\" is not a valid identifier",
            ),
        ] {
            assert_eq!(parse(line).unwrap_err().to_string(), wanted, "{line}");
        }
        let long = format!("-namespace n -id {} start", "x".repeat(77));
        assert!(matches!(
            parse(&long),
            Err(ArgumentsError::BadIdentifier { .. })
        ));
        assert!(parse(&format!("{named} stop")).is_err());
        assert!(parse(&format!("{named} start again")).is_err());
    }

    #[test]
    fn containerds_own_lines_are_understood() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id web-1 -debug start",
        )
        .unwrap();
        assert_eq!(start.action, Action::Start);
        assert_eq!(start.namespace, "k8s.io");
        assert_eq!(start.id, "web-1");
        assert!(start.debug);

        let delete = parse("--namespace=default --id=t1 --bundle=/b/t1 delete").unwrap();
        assert_eq!(delete.action, Action::Delete);
        assert_eq!(delete.bundle, PathBuf::from("/b/t1"));

        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }
}
