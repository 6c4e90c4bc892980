//! From records to what people and programs read.

mod html;
mod json;
mod svg;
mod table;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

pub(crate) use json::{Report, Row};

use crate::measures::{self, Measure, Section};
use crate::record::{self, Record, Subject, Trace};
use crate::statistics::Summary;

/// Writes report.json and report.html to a directory, and the table, or the JSON, to the standard
/// output.
pub(crate) fn write(directory: &Path, records: &[PathBuf], is_json: bool) -> Result<()> {
    ensure!(!records.is_empty(), "no files of records");
    let mut all = Vec::new();
    for path in records {
        all.extend(record::read(path)?);
    }
    let results = Results::collect(all);
    let report = Report::of(&results);
    let json = report.to_json()?;
    let place = |name: &str| directory.join(name);
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(place("report.json"), &json))
        .and_then(|()| fs::write(place("report.html"), html::page(&results)))
        .with_context(|| format!("cannot write to {}", directory.display()))?;
    if is_json {
        print!("{json}");
    } else {
        print!("{}", table::text(&results));
    }
    Ok(())
}

/// All that was found, by measure and subject.
#[derive(Debug, Default)]
pub(crate) struct Results {
    samples: HashMap<(String, Subject), Vec<f64>>,
    /// What could not be measured: measure, subject, why.
    pub(crate) failures: Vec<(String, Subject, String)>,
    pub(crate) traces: Vec<Trace>,
}

impl Results {
    pub(crate) fn collect(records: Vec<Record>) -> Self {
        let mut results = Self::default();
        for record in records {
            match record {
                Record::Sample {
                    measure,
                    subject,
                    value,
                } => results
                    .samples
                    .entry((measure, subject))
                    .or_default()
                    .push(value),
                Record::Failure {
                    measure,
                    subject,
                    why,
                } => results.failures.push((measure, subject, why)),
                Record::Trace(trace) => results.traces.push(trace),
            }
        }
        results
    }

    /// What the samples come to. A measure that failed has no value, whatever its other samples
    /// say: those that went well are no fair choice.
    pub(crate) fn summary(&self, measure: &str, subject: Subject) -> Option<Summary> {
        let has_failed = self
            .failures
            .iter()
            .any(|(name, whose, _)| name == measure && *whose == subject);
        if has_failed {
            return None;
        }
        let key = (measure.to_owned(), subject);
        Summary::of(self.samples.get(&key)?)
    }

    pub(crate) fn median(&self, measure: &str, subject: Subject) -> Option<f64> {
        Some(self.summary(measure, subject)?.median)
    }

    /// The limit Husk is held to, in the measure's unit.
    pub(crate) fn limit(&self, measure: &Measure) -> Option<f64> {
        measure
            .target
            .limit(self.median(measure.name, Subject::Runc))
    }

    /// Whether Husk keeps to it. What failed does not; what was not tried has no answer.
    pub(crate) fn is_met(&self, measure: &Measure) -> Option<bool> {
        if self
            .failures_of(measure.name, Subject::Husk)
            .next()
            .is_some()
        {
            return (measure.target != measures::Target::None).then_some(false);
        }
        let limit = self.limit(measure)?;
        let husk = self.median(measure.name, Subject::Husk)?;
        Some(measure.better.meets(husk, limit))
    }

    /// Why it has no value.
    pub(crate) fn failures_of<'a>(
        &'a self,
        measure: &'a str,
        subject: Subject,
    ) -> impl Iterator<Item = &'a str> {
        self.failures
            .iter()
            .filter(move |(name, whose, _)| name == measure && *whose == subject)
            .map(|(_, _, why)| why.as_str())
    }

    /// The measures of a section of which anything is known.
    pub(crate) fn section(&self, section: Section) -> impl Iterator<Item = &'static Measure> {
        measures::ALL.iter().filter(move |measure| {
            measure.section == section
                && Subject::ALL.iter().any(|subject| {
                    let key = (measure.name.to_owned(), *subject);
                    self.samples.contains_key(&key)
                        || self.failures_of(measure.name, *subject).next().is_some()
                })
        })
    }
}

/// Results made up for tests: a measure with a value of Husk's and one of runc's.
#[cfg(test)]
pub(crate) fn sample_results(values: &[(&str, Subject, f64)]) -> Results {
    let sample = |(measure, subject, value): &(&str, Subject, f64)| Record::Sample {
        measure: (*measure).to_owned(),
        subject: *subject,
        value: *value,
    };
    Results::collect(values.iter().map(sample).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(measure: &str, subject: Subject) -> Record {
        Record::Failure {
            measure: measure.to_owned(),
            subject,
            why: "it said no".to_owned(),
        }
    }

    #[test]
    fn failed_measure_has_no_value_and_misses_its_target() {
        let mut results = sample_results(&[
            ("starts_50", Subject::Husk, 1.0),
            ("starts_50", Subject::Runc, 2.0),
        ]);
        let measure = measures::find("starts_50").unwrap();
        assert_eq!(results.is_met(measure), Some(true));

        results.failures = Results::collect(vec![failure("starts_50", Subject::Husk)]).failures;
        assert_eq!(results.median("starts_50", Subject::Husk), None);
        assert_eq!(results.is_met(measure), Some(false));
    }

    #[test]
    fn target_without_a_peer_has_no_answer() {
        let mut results = sample_results(&[
            ("exec_true", Subject::Husk, 1.0),
            ("exec_true", Subject::Runc, 2.0),
        ]);
        results.failures = Results::collect(vec![failure("exec_true", Subject::Runc)]).failures;
        let measure = measures::find("exec_true").unwrap();
        assert_eq!(results.limit(measure), None);
        assert_eq!(results.is_met(measure), None);
    }

    #[test]
    fn report_without_records_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(write(directory.path(), &[], false).is_err());
        let missing = directory.path().join("missing");
        assert!(write(directory.path(), &[missing], false).is_err());
    }
}
