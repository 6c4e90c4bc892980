//! POSIX checks of a mounted file system: `husk-fscheck DIR [--json] [--only NAME]`.
//!
//! Each check works in a directory of its own below `DIR`, on the operations that a root file
//! system needs and on the errors that POSIX asks for. Run it as root: many checks act as other
//! users. The output for two file systems can be compared line by line. The exit status is 0 if no
//! check failed, 1 if one did, 2 if they could not be run.

mod checks;
mod harness;
mod mapping;
mod squat;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::harness::{Format, Runner};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let mut directory = None;
    let mut format = Format::Lines;
    let mut only = None;
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--json") => format = Format::Json,
            Some("--only") => {
                only = arguments.next().and_then(|name| name.into_string().ok());
                if only.is_none() {
                    return usage("--only needs a name");
                }
            }
            // The other side of a check that needs two processes.
            Some("--try-locks") => {
                let Some(path) = arguments.next() else {
                    return usage("--try-locks needs a file");
                };
                return checks::locks::try_locks(&PathBuf::from(path));
            }
            // For a scenario: what inotify tells, until a name is moved into place.
            Some("--watch") => {
                let (Some(directory), Some(last)) = (arguments.next(), arguments.next()) else {
                    return usage("--watch needs a directory and a name");
                };
                return match watch::watch(directory.as_ref(), &last.to_string_lossy()) {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => usage(&error.to_string()),
                };
            }
            // For another: what a container can do to the streams of others.
            Some("--squat") => {
                return match squat::squat() {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => usage(&error.to_string()),
                };
            }
            Some(option) if option.starts_with('-') => {
                return usage(&format!("no such option: {option}"));
            }
            _ if directory.is_none() => directory = Some(PathBuf::from(argument)),
            _ => return usage("more than one directory"),
        }
    }
    let Some(directory) = directory else {
        return usage("no directory");
    };
    match Runner::new(&directory, format, only).and_then(|runner| runner.run(checks::ALL)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("husk-fscheck: {}: {error}", directory.display());
            ExitCode::from(2)
        }
    }
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("husk-fscheck: {problem}\nusage: husk-fscheck DIR [--json] [--only NAME]");
    ExitCode::from(2)
}
