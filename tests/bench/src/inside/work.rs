//! The workload: a static program that runs alike on the machine and in every container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::command;
use super::containers;

/// What containers see below `/bench`.
const DIRECTORY: &str = "/var/tmp/husk-bench";

const PROGRAM: &str = "husk-workload";

/// Puts the program where containers can be given it.
pub(super) fn install() -> Result<PathBuf> {
    let directory = Path::new(DIRECTORY);
    let source = containers::own_directory()?.join(PROGRAM);
    fs::create_dir_all(directory)
        .and_then(|()| fs::copy(&source, directory.join(PROGRAM)))
        .with_context(|| format!("cannot copy {} to {DIRECTORY}", source.display()))?;
    Ok(directory.to_owned())
}

/// The program, on the machine itself.
pub(super) fn on_host(words: &[&str]) -> Result<command::Ended> {
    command::run(Command::new(Path::new(DIRECTORY).join(PROGRAM)).args(words))
}

/// What the program said: lines of `NAME VALUE`.
pub(super) fn parse(output: &str) -> Result<Vec<(String, f64)>> {
    let mut values = Vec::new();
    for line in output.lines() {
        let value = line
            .split_once(' ')
            .and_then(|(name, value)| Some((name.to_owned(), value.parse::<f64>().ok()?)))
            .filter(|(_, value)| value.is_finite());
        values.push(value.with_context(|| format!("the workload said {line:?}"))?);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_no_figures_are_an_error() {
        for bad in [
            "fs_read",
            "fs_read fast",
            "fs_read NaN",
            "fs_read 1 2",
            "a 1\n\n",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn figures_are_read() {
        let values = parse("a 1.5\nb 2\n").unwrap();
        assert_eq!(values, [("a".to_owned(), 1.5), ("b".to_owned(), 2.0)]);
    }
}
