//! What came of the scenarios, as one table: scenario by runtime and version of containerd.
//!
//! Each machine that runs scenarios appends lines to a file, fields parted by tabs: version,
//! runtime, scenario, outcome, seconds, and why it failed. The files of a whole run make the table.
//! A scenario's line is written when it begins, too, so that one whose machine stood still is told,
//! and the next machine goes on behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};

use crate::list;

/// Why a scenario failed that has no line of its end.
const NOT_ENDED: &str = "it began and did not end: the machine stood still, or went away";

/// What came of one scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As it should be.
    Passed,
    /// As it should be, but at a second try only.
    PassedAgain,
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
    /// That a scenario begins: it has failed until a line of its end is written.
    pub(crate) fn begun(version: &str, runtime: &str, scenario: &str) -> Self {
        Self {
            version: version.to_owned(),
            runtime: runtime.to_owned(),
            scenario: scenario.to_owned(),
            outcome: Outcome::failed(NOT_ENDED),
            seconds: 0.0,
        }
    }

    /// Whether it tells of this scenario with this runtime.
    pub(crate) fn is_of(&self, runtime: &str, scenario: &str) -> bool {
        self.runtime == runtime && self.scenario == scenario
    }

    pub(crate) fn write(&self) -> String {
        let (outcome, reason) = match &self.outcome {
            Outcome::Passed => ("passed", ""),
            Outcome::PassedAgain => ("passed-again", ""),
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
                "passed-again" => Outcome::PassedAgain,
                "failed" => Outcome::failed(reason),
                other => bail!("{other:?} is no outcome"),
            },
            seconds: seconds
                .parse()
                .with_context(|| format!("{seconds:?} are no seconds"))?,
        })
    }
}

/// The lines of some files' texts: of each scenario in a file the last.
pub(crate) fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<Line>> {
    let mut all = Vec::new();
    for text in texts {
        let mut lines: Vec<Line> = Vec::new();
        for text in text.lines() {
            let line = Line::parse(text)?;
            lines.retain(|earlier| !earlier.is_of(&line.runtime, &line.scenario));
            lines.push(line);
        }
        all.append(&mut lines);
    }
    Ok(all)
}

/// What names one cell of the table: scenario, version of containerd, runtime.
type Key<'a> = (&'a str, &'a str, &'a str);

/// What came of each at last: a second try counts more than a first.
fn cells(lines: &[Line]) -> BTreeMap<Key<'_>, &Outcome> {
    let mut cells = BTreeMap::new();
    for line in lines {
        let key = (
            line.scenario.as_str(),
            line.version.as_str(),
            short(&line.runtime),
        );
        if cells.get(&key) != Some(&&Outcome::PassedAgain) {
            cells.insert(key, &line.outcome);
        }
    }
    cells
}

/// The table in Markdown. Scenarios are in the order they run in.
pub(crate) fn markdown(lines: &[Line]) -> String {
    let columns: BTreeSet<_> = lines
        .iter()
        .map(|line| (line.version.as_str(), short(&line.runtime)))
        .collect();
    let cells = cells(lines);
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
                Some(Outcome::PassedAgain) => "passed at a second try",
                Some(Outcome::Failed(_)) => "**failed**",
                None if scenario.is_husk_only && *runtime != "husk" => "",
                None if !scenario.is_for(version) => "",
                None => "–",
            };
            let _ = write!(table, " {cell} |");
        }
        table.push('\n');
    }
    table
}

/// Most scenarios of a run that may need a second try. The emulated machine is at fault now and
/// then; more than that is not chance.
const SECOND_TRIES_MAX: usize = 3;

/// What a whole run comes to.
pub(crate) struct Summary {
    /// What failed and why, a line each, and how many there are of each outcome.
    pub(crate) text: String,
    pub(crate) is_good: bool,
}

/// Tells of all that failed, if only at the first try.
pub(crate) fn summary(lines: &[Line]) -> Summary {
    let cells = cells(lines);
    let mut text = String::new();
    for line in lines {
        let Outcome::Failed(reason) = &line.outcome else {
            continue;
        };
        let (version, runtime) = (line.version.as_str(), short(&line.runtime));
        let verdict = match cells.get(&(line.scenario.as_str(), version, runtime)) {
            Some(Outcome::PassedAgain) => "FAILED AT FIRST",
            _ => "FAILED",
        };
        // A String takes whatever is written to it.
        let _ = writeln!(
            text,
            "{verdict} {} ({runtime}, containerd {version}): {reason}",
            line.scenario
        );
    }
    let count = |wanted: fn(&Outcome) -> bool| cells.values().filter(|it| wanted(it)).count();
    let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
    let again = count(|outcome| matches!(outcome, Outcome::PassedAgain));
    if again > 0 {
        let _ = writeln!(
            text,
            "{again} passed at a second try only, of {SECOND_TRIES_MAX} that may"
        );
    }
    let passed = cells.len() - failed;
    let _ = writeln!(text, "{passed} passed, {failed} failed");
    Summary {
        text,
        is_good: passed > 0 && failed == 0 && again <= SECOND_TRIES_MAX,
    }
}

/// What is to be tried again: version, runtime and scenario, a line each. Nothing, if more failed
/// than may.
pub(crate) fn second_tries(lines: &[Line]) -> String {
    let failed: Vec<_> = lines
        .iter()
        .filter(|line| matches!(line.outcome, Outcome::Failed(_)))
        .map(|line| format!("{} {} {}\n", line.version, line.runtime, line.scenario))
        .collect();
    match failed.len() <= SECOND_TRIES_MAX {
        true => failed.concat(),
        false => String::new(),
    }
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
        assert_eq!(parse([line.write().as_str()]).unwrap(), [line]);
    }

    #[test]
    fn scenario_that_began_and_did_not_end_has_failed() {
        let runtime = "io.containerd.husk.v2";
        let ended = Line {
            outcome: Outcome::Passed,
            ..Line::begun("1.7", runtime, "own_kernel")
        };
        let text = [
            Line::begun("1.7", runtime, "own_kernel").write(),
            ended.write(),
            Line::begun("1.7", runtime, "exit_status").write(),
        ]
        .concat();
        let lines = parse([text.as_str()]).unwrap();
        assert_eq!(lines, [ended, Line::begun("1.7", runtime, "exit_status")]);
        assert_eq!(second_tries(&lines), format!("1.7 {runtime} exit_status\n"));
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

    /// Lines of scenarios that failed at first, and of second tries of some of them.
    fn some_tries(first: usize, second: usize) -> Vec<Line> {
        let line = |number: usize, outcome| Line {
            version: "1.7".into(),
            runtime: "io.containerd.husk.v2".into(),
            scenario: format!("s{number}"),
            outcome,
            seconds: 1.0,
        };
        let mut lines = vec![line(99, Outcome::Passed)];
        lines.extend((0..second).map(|number| line(number, Outcome::PassedAgain)));
        lines.extend((0..first).map(|number| line(number, Outcome::failed("why"))));
        lines
    }

    #[test]
    fn second_try_counts_but_is_told() {
        let lines = some_tries(1, 1);
        let summary = summary(&lines);
        assert!(summary.is_good);
        assert_eq!(
            summary.text,
            "FAILED AT FIRST s0 (husk, containerd 1.7): why\n\
             1 passed at a second try only, of 3 that may\n\
             2 passed, 0 failed\n"
        );
    }

    #[test]
    fn few_failures_are_tried_again_and_many_are_not() {
        assert_eq!(
            second_tries(&some_tries(1, 0)),
            "1.7 io.containerd.husk.v2 s0\n"
        );
        assert_eq!(second_tries(&some_tries(4, 0)), "");
    }

    #[test]
    fn run_with_a_failure_or_many_second_tries_or_nothing_is_bad() {
        for lines in [some_tries(2, 1), some_tries(4, 4), Vec::new()] {
            let summary = summary(&lines);
            assert!(!summary.is_good, "{}", summary.text);
        }
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
