//! What came of the scenarios, as one table: scenario by runtime and version of containerd.
//!
//! Each machine that runs scenarios appends lines to a file, fields parted by tabs: version,
//! runtime, scenario, outcome, seconds, and why it failed. The files of a whole run make the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};

use crate::list;

/// What came of one scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As it should be.
    Passed,
    /// Not, for this reason, which is one line.
    Failed(String),
}

impl Outcome {
    /// A failure; what parts the lines and fields of a file is taken out of the reason.
    pub(crate) fn failed(reason: &str) -> Self {
        let words: Vec<_> = reason.split_whitespace().collect();
        Self::Failed(words.join(" "))
    }
}

/// One line of a file of results.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    /// The version of containerd, as the testbed names it.
    pub(crate) version: String,
    /// The runtime as containerd names it.
    pub(crate) runtime: String,
    pub(crate) scenario: String,
    pub(crate) outcome: Outcome,
    pub(crate) seconds: f32,
}

impl Line {
    pub(crate) fn write(&self) -> String {
        let (outcome, reason) = match &self.outcome {
            Outcome::Passed => ("passed", ""),
            Outcome::Failed(reason) => ("failed", reason.as_str()),
        };
        format!(
            "{}\t{}\t{}\t{outcome}\t{:.1}\t{reason}\n",
            self.version, self.runtime, self.scenario, self.seconds
        )
    }

    fn parse(text: &str) -> Result<Self> {
        let fields: Vec<_> = text.split('\t').collect();
        let [version, runtime, scenario, outcome, seconds, reason] = fields.as_slice() else {
            bail!("{} fields instead of 6: {text:?}", fields.len());
        };
        Ok(Self {
            version: (*version).to_owned(),
            runtime: (*runtime).to_owned(),
            scenario: (*scenario).to_owned(),
            outcome: match *outcome {
                "passed" => Outcome::Passed,
                "failed" => Outcome::failed(reason),
                other => bail!("{other:?} is no outcome"),
            },
            seconds: seconds
                .parse()
                .with_context(|| format!("{seconds:?} are no seconds"))?,
        })
    }
}

/// All lines of some files' texts.
pub(crate) fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<Line>> {
    texts
        .into_iter()
        .flat_map(str::lines)
        .map(Line::parse)
        .collect()
}

/// The table in Markdown. Scenarios are in the order they run in.
pub(crate) fn markdown(lines: &[Line]) -> String {
    let columns: BTreeSet<_> = lines
        .iter()
        .map(|line| (line.version.as_str(), short(&line.runtime)))
        .collect();
    let mut cells = BTreeMap::new();
    for line in lines {
        let key = (
            line.scenario.as_str(),
            line.version.as_str(),
            short(&line.runtime),
        );
        cells.insert(key, &line.outcome);
    }
    let mut table = "| scenario |".to_owned();
    for (version, runtime) in &columns {
        // A String takes whatever is written to it.
        let _ = write!(table, " {runtime}, {version} |");
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(columns.len()));
    table.push('\n');
    for scenario in list::ALL {
        let _ = write!(table, "| {} |", scenario.name);
        for (version, runtime) in &columns {
            let cell = match cells.get(&(scenario.name, *version, *runtime)) {
                Some(Outcome::Passed) => "passed",
                Some(Outcome::Failed(_)) => "**failed**",
                None if scenario.is_husk_only && *runtime != "husk" => "",
                None => "–",
            };
            let _ = write!(table, " {cell} |");
        }
        table.push('\n');
    }
    table
}

/// What failed and why, a line each; nothing if all passed.
pub(crate) fn failures(lines: &[Line]) -> String {
    let mut text = String::new();
    for line in lines {
        if let Outcome::Failed(reason) = &line.outcome {
            let (version, runtime) = (&line.version, short(&line.runtime));
            // A String takes whatever is written to it.
            let _ = writeln!(
                text,
                "FAILED {} ({runtime}, containerd {version}): {reason}",
                line.scenario
            );
        }
    }
    text
}

/// What people call a runtime.
fn short(runtime: &str) -> &str {
    runtime
        .trim_start_matches("io.containerd.")
        .trim_end_matches(".v2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_that_is_none_is_refused() {
        for text in [
            "",
            "1.7\tio.containerd.husk.v2\town_kernel\tpassed\t1.0",
            "1.7\tio.containerd.husk.v2\town_kernel\tskipped\t1.0\t",
            "1.7\tio.containerd.husk.v2\town_kernel\tpassed\tlong\t",
        ] {
            assert!(Line::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn written_line_is_read_back() {
        let line = Line {
            version: "1.7".into(),
            runtime: "io.containerd.husk.v2".into(),
            scenario: "own_kernel".into(),
            outcome: Outcome::failed("one\tline,\n  and another"),
            seconds: 1.5,
        };
        let lines = parse([line.write().as_str()]).unwrap();
        assert_eq!(lines, [line]);
        assert_eq!(
            failures(&lines),
            "FAILED own_kernel (husk, containerd 1.7): one line, and another\n"
        );
    }

    #[test]
    fn table_tells_passed_failed_and_not_run_apart() {
        let text = "1.7\tio.containerd.husk.v2\town_kernel\tpassed\t1.0\t\n\
                    1.7\tio.containerd.runc.v2\town_kernel\tfailed\t1.0\twhy\n";
        let table = markdown(&parse([text]).unwrap());
        assert!(
            table.starts_with("| scenario | husk, 1.7 | runc, 1.7 |\n"),
            "{table}"
        );
        assert!(
            table.contains("| own_kernel | passed | **failed** |\n"),
            "{table}"
        );
        assert!(table.contains("| exit_status | – | – |\n"), "{table}");
        assert!(
            table.contains("| vmm_killed_while_running | – |  |\n"),
            "{table}"
        );
    }

    #[test]
    fn readme_has_a_row_for_each_scenario() {
        let readme = include_str!("../../../README.md");
        for scenario in list::ALL {
            let row = format!("| {} |", scenario.name);
            assert!(
                readme.contains(&row),
                "README.md's table lacks {}: see `make scenario-table`",
                scenario.name
            );
        }
    }
}
