//! The table a person sees in the terminal.

use std::fmt::Write;

use super::Results;
use crate::measures::{Measure, Section};
use crate::record::{Subject, Trace};
use crate::statistics::short;

const COLUMNS: [&str; 9] = [
    "measure", "unit", "husk", "runc", "gvisor", "host", "÷ runc", "target", "",
];

/// All sections, and below them what could not be measured and where a start's time goes.
pub(super) fn text(results: &Results) -> String {
    let mut text = String::new();
    for section in Section::ALL {
        let mut rows: Vec<_> = results
            .section(section)
            .map(|measure| row(results, measure))
            .collect();
        if rows.is_empty() {
            continue;
        }
        rows.insert(0, COLUMNS.map(str::to_owned));
        text += &format!("{}\n", section.title());
        text += &aligned(&rows);
        text.push('\n');
    }
    for trace in &results.traces {
        text += &phases(trace);
        text += &exits(trace);
    }
    for (measure, subject, why) in &results.failures {
        // The page has all of it.
        let why: String = why.chars().take(WHY_CHARACTERS_MAX).collect();
        text += &format!("not measured: {measure} of {subject}: {why}\n");
    }
    text
}

fn row(results: &Results, measure: &Measure) -> [String; 9] {
    let value = |subject| {
        results
            .median(measure.name, subject)
            .map_or("–".to_owned(), short)
    };
    let husk = results.median(measure.name, Subject::Husk);
    let ratio = husk.zip(results.median(measure.name, Subject::Runc));
    let limit = results.limit(measure).map_or(String::new(), |limit| {
        let sign = match measure.better {
            crate::measures::Better::Less => "≤",
            crate::measures::Better::More => "≥",
        };
        format!("{sign} {}", short(limit))
    });
    let met = match results.is_met(measure) {
        Some(true) => "met",
        Some(false) => "MISSED",
        None => "",
    };
    [
        measure.name.to_owned(),
        measure.unit.to_owned(),
        value(Subject::Husk),
        value(Subject::Runc),
        value(Subject::Gvisor),
        value(Subject::Host),
        ratio.map_or(String::new(), |(husk, runc)| format!("{:.2}", husk / runc)),
        limit,
        met.to_owned(),
    ]
}

/// Columns as wide as their widest cell; the first and last to the left, numbers to the right.
fn aligned(rows: &[[String; 9]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let is_number = (2..8).contains(&column);
            let _ = if is_number {
                write!(line, "  {cell:>width$}")
            } else {
                write!(line, "  {cell:<width$}")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn phases(trace: &Trace) -> String {
    let mut text = format!("Phases of a start, {} (from and for, ms)\n", trace.subject);
    for phase in &trace.phases {
        let (from, took) = (phase.from_s * 1e3, (phase.to_s - phase.from_s) * 1e3);
        text += &format!("  {from:>8.1}  {took:>7.1}  {}\n", phase.name);
    }
    text.push('\n');
    text
}

fn exits(trace: &Trace) -> String {
    if trace.phases.iter().all(|phase| phase.exits.is_empty()) {
        return String::new();
    }
    let mut text = "Exits of the virtual CPU in a start\n".to_owned();
    for phase in trace.phases.iter().filter(|phase| !phase.exits.is_empty()) {
        let all: u64 = phase.exits.iter().map(|(_, count)| count).sum();
        let reasons: Vec<_> = phase
            .exits
            .iter()
            .take(REASONS_SHOWN_MAX)
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        text += &format!("  {all:>6}  {:<30}  {}\n", phase.name, reasons.join(", "));
    }
    text.push('\n');
    text
}

const WHY_CHARACTERS_MAX: usize = 120;

/// The page has them all.
const REASONS_SHOWN_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::super::sample_results;
    use super::*;

    #[test]
    fn nothing_measured_is_an_empty_table() {
        assert_eq!(text(&Results::default()), "");
    }

    #[test]
    fn row_tells_ratio_limit_and_verdict() {
        let results = sample_results(&[
            ("exec_true", Subject::Husk, 0.2),
            ("exec_true", Subject::Runc, 0.25),
        ]);
        let text = text(&results);
        let row = text.lines().nth(2).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        let expected = [
            "exec_true",
            "s",
            "0.200",
            "0.250",
            "–",
            "–",
            "0.80",
            "≤",
            "0.125",
            "MISSED",
        ];
        assert_eq!(cells, expected);
    }

    #[test]
    fn columns_stand_under_each_other() {
        let results = sample_results(&[
            ("exec_true", Subject::Husk, 0.2),
            ("start_total", Subject::Husk, 12_345.0),
        ]);
        let text = text(&results);
        let ends: Vec<_> = text
            .lines()
            .skip(2)
            .filter_map(|line| line.find('–'))
            .collect();
        assert_eq!(ends.first(), ends.last());
    }
}
