//! What changed from one report to another.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::measures::{self, Better};
use crate::report::{Report, Row};
use crate::statistics::short;

/// Figures that repeat, repeat within this part of themselves. Less is no change.
const NOISE: f64 = 0.03;

/// Prints what changed between two files, for people or for programs.
pub(crate) fn print(old: &Path, new: &Path, is_json: bool) -> Result<()> {
    let changes = changes(&Report::read(old)?, &Report::read(new)?);
    if is_json {
        println!("{}", serde_json::to_string_pretty(&changes)?);
    } else {
        print!("{}", text(&changes));
    }
    Ok(())
}

/// How one figure went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Better,
    Worse,
    Same,
    /// Measured in the new report only.
    New,
    /// Measured in the old report only.
    Gone,
}

/// One figure in both.
#[derive(Debug, PartialEq, Serialize)]
struct Change {
    name: String,
    subject: &'static str,
    unit: String,
    old: Option<f64>,
    new: Option<f64>,
    /// New by old.
    ratio: Option<f64>,
    verdict: Verdict,
    met_old: Option<bool>,
    met_new: Option<bool>,
}

/// Every figure that either has.
fn changes(old: &Report, new: &Report) -> Vec<Change> {
    let find =
        |report: &'_ Report, name: &str| report.measures.iter().position(|row| row.name == name);
    let mut names: Vec<&str> = Vec::new();
    let mut seen = BTreeSet::new();
    for row in new.measures.iter().chain(&old.measures) {
        if seen.insert(&row.name) {
            names.push(&row.name);
        }
    }
    let mut changes = Vec::new();
    for name in names {
        let old_row = find(old, name).and_then(|index| old.measures.get(index));
        let new_row = find(new, name).and_then(|index| new.measures.get(index));
        for (subject, value) in SUBJECTS {
            let old_value = old_row.and_then(value);
            let new_value = new_row.and_then(value);
            let Some(verdict) = verdict(name, old_value, new_value) else {
                continue;
            };
            let is_husk = subject == "husk";
            changes.push(Change {
                name: name.to_owned(),
                subject,
                unit: new_row
                    .or(old_row)
                    .map_or(String::new(), |row| row.unit.clone()),
                old: old_value,
                new: new_value,
                ratio: old_value
                    .zip(new_value)
                    .filter(|(old, _)| *old != 0.0)
                    .map(|(old, new)| new / old),
                verdict,
                met_old: old_row.and_then(|row| row.met).filter(|_| is_husk),
                met_new: new_row.and_then(|row| row.met).filter(|_| is_husk),
            });
        }
    }
    changes
}

type Value = fn(&Row) -> Option<f64>;

const SUBJECTS: [(&str, Value); 3] = [
    ("husk", |row| row.husk),
    ("runc", |row| row.runc),
    ("gvisor", |row| row.gvisor),
];

/// `None` if neither has it.
fn verdict(name: &str, old: Option<f64>, new: Option<f64>) -> Option<Verdict> {
    let (old, new) = match (old, new) {
        (None, None) => return None,
        (None, Some(_)) => return Some(Verdict::New),
        (Some(_), None) => return Some(Verdict::Gone),
        (Some(old), Some(new)) => (old, new),
    };
    if (new - old).abs() <= old.abs() * NOISE {
        return Some(Verdict::Same);
    }
    // What this program no longer knows is taken as a cost.
    let better = measures::find(name).map_or(Better::Less, |measure| measure.better);
    Some(if better.meets(new, old) {
        Verdict::Better
    } else {
        Verdict::Worse
    })
}

fn text(changes: &[Change]) -> String {
    let mut text = String::new();
    let mut same: u32 = 0;
    for change in changes {
        let met = match (change.met_old, change.met_new) {
            (Some(true), Some(false)) => "  target now MISSED",
            (Some(false), Some(true)) => "  target now met",
            _ => "",
        };
        if change.verdict == Verdict::Same && met.is_empty() {
            same = same.saturating_add(1);
            continue;
        }
        let value = |value: Option<f64>| value.map_or("–".to_owned(), short);
        let percent = change.ratio.map_or(String::new(), |ratio| {
            format!("{:+.1} %", (ratio - 1.0) * 100.0)
        });
        let verdict = match change.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Same => "same",
            Verdict::New => "new",
            Verdict::Gone => "gone",
        };
        let line = format!(
            "{:<22} {:<6} {:>9} → {:>9} {:<8} {:>9}  {verdict}{met}",
            change.name,
            change.subject,
            value(change.old),
            value(change.new),
            change.unit,
            percent,
        );
        text += line.trim_end();
        text.push('\n');
    }
    text += &format!(
        "{same} figures are the same within {:.0} %\n",
        NOISE * 100.0
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str, husk: Option<f64>, met: Option<bool>) -> Report {
        let row = Row {
            name: name.to_owned(),
            unit: "s".to_owned(),
            husk,
            runc: None,
            gvisor: None,
            target: None,
            met,
        };
        Report {
            measures: vec![row],
        }
    }

    fn verdict_of(name: &str, old: Option<f64>, new: Option<f64>) -> Option<Verdict> {
        let changes = changes(&report(name, old, None), &report(name, new, None));
        changes.first().map(|change| change.verdict)
    }

    #[test]
    fn figure_that_one_report_lacks_is_told() {
        assert_eq!(verdict_of("start_total", None, None), None);
        assert_eq!(
            verdict_of("start_total", None, Some(1.0)),
            Some(Verdict::New)
        );
        assert_eq!(
            verdict_of("start_total", Some(1.0), None),
            Some(Verdict::Gone)
        );
        let changes = changes(
            &report("old", Some(1.0), None),
            &report("new", Some(1.0), None),
        );
        assert_eq!(changes.len(), 2);
    }

    #[test]
    fn old_figure_of_nothing_has_no_ratio() {
        let changes = changes(
            &report("start_total", Some(0.0), None),
            &report("start_total", Some(1.0), None),
        );
        assert_eq!(changes[0].ratio, None);
        assert_eq!(changes[0].verdict, Verdict::Worse);
    }

    #[test]
    fn noise_is_no_change_and_the_way_forward_is_the_measures() {
        assert_eq!(
            verdict_of("start_total", Some(1.0), Some(1.02)),
            Some(Verdict::Same)
        );
        assert_eq!(
            verdict_of("start_total", Some(1.0), Some(1.1)),
            Some(Verdict::Worse)
        );
        assert_eq!(
            verdict_of("fs_read_first", Some(1.0), Some(1.1)),
            Some(Verdict::Better)
        );
    }

    #[test]
    fn target_that_is_missed_now_is_told_even_within_noise() {
        let changes = changes(
            &report("start_total", Some(1.0), Some(true)),
            &report("start_total", Some(1.01), Some(false)),
        );
        assert!(text(&changes).contains("target now MISSED"));
    }
}
