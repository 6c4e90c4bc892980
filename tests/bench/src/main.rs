//! Measures Husk beside runc and gVisor, and tells what came of it.
//!
//! `make bench` is the way to run it. `measure` runs as root in the testbed and appends what it
//! finds to a file of records, one JSON object a line; `report` and `compare` run on the machine
//! that builds, and turn such files into tables and pages.
//!
//! ```text
//! husk-bench measure SUITE... --out FILE [--quick]
//! husk-bench report --out DIRECTORY [--json] RECORDS...
//! husk-bench compare OLD NEW [--json]
//! ```
#![forbid(unsafe_code)]

mod compare;
mod inside;
mod measures;
mod record;
mod report;
mod statistics;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use inside::Plan;

const USAGE: &str = "usage: husk-bench measure SUITE... --out FILE [--quick]
       husk-bench report --out DIRECTORY [--json] RECORDS...
       husk-bench compare OLD NEW [--json]";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = Arguments::parse(std::env::args().skip(1))?;
    match arguments.verb.as_str() {
        "measure" => {
            let plan = Plan {
                is_quick: arguments.is_quick,
            };
            inside::measure(&arguments.words, &arguments.out()?, plan)
        }
        "report" => report::write(&arguments.out()?, &arguments.words, arguments.is_json),
        "compare" => {
            let new = arguments.words.pop().context(USAGE)?;
            let old = arguments.only_word()?;
            compare::print(&old, &new, arguments.is_json)
        }
        verb => bail!("unknown command {verb:?}\n{USAGE}"),
    }
}

/// The command line, parsed.
#[derive(Debug, Default)]
struct Arguments {
    verb: String,
    words: Vec<PathBuf>,
    out: Option<PathBuf>,
    is_quick: bool,
    is_json: bool,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut parsed = Self {
            verb: words.next().context(USAGE)?,
            ..Self::default()
        };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--out" => {
                    let value = words.next().context("--out needs a value")?;
                    parsed.out = Some(value.into());
                }
                "--quick" => parsed.is_quick = true,
                "--json" => parsed.is_json = true,
                flag if flag.starts_with('-') => bail!("unknown option {flag}\n{USAGE}"),
                _ => parsed.words.push(word.into()),
            }
        }
        Ok(parsed)
    }

    fn out(&self) -> Result<PathBuf> {
        self.out.clone().context("--out is missing")
    }

    fn only_word(&self) -> Result<PathBuf> {
        match self.words.as_slice() {
            [word] => Ok(word.clone()),
            words => bail!("{} arguments instead of one\n{USAGE}", words.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_line_without_sense_is_refused() {
        for line in ["", "report --out", "report --frequently"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn options_stand_anywhere() {
        let parsed = parse("report a --out there --json b").unwrap();
        assert_eq!(parsed.words, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(parsed.out().unwrap(), PathBuf::from("there"));
        assert!(parsed.is_json && !parsed.is_quick);
    }
}
