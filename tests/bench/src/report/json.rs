//! report.json: the same figures for programs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Results;
use crate::measures;
use crate::record::Subject;

/// All of it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) measures: Vec<Row>,
}

/// One measure; what was not measured is null.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) husk: Option<f64>,
    pub(crate) runc: Option<f64>,
    pub(crate) gvisor: Option<f64>,
    /// The limit for Husk, in the measure's unit.
    pub(crate) target: Option<f64>,
    pub(crate) met: Option<bool>,
}

impl Report {
    /// Every measure there is, whether anything is known of it or not.
    pub(crate) fn of(results: &Results) -> Self {
        let row = |measure: &measures::Measure| Row {
            name: measure.name.to_owned(),
            unit: measure.unit.to_owned(),
            husk: results.median(measure.name, Subject::Husk).map(rounded),
            runc: results.median(measure.name, Subject::Runc).map(rounded),
            gvisor: results.median(measure.name, Subject::Gvisor).map(rounded),
            target: results.limit(measure).map(rounded),
            met: results.is_met(measure),
        };
        Self {
            measures: measures::ALL.iter().map(row).collect(),
        }
    }

    pub(crate) fn to_json(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }

    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is no report of husk-bench", path.display()))
    }
}

/// To a millionth: digits beyond are noise.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::super::sample_results;
    use super::*;

    #[test]
    fn what_is_no_report_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        assert!(Report::read(&path).is_err());
        for bad in ["", "[]", r#"{"measures": [{}]}"#, r#"{"measures": 3}"#] {
            fs::write(&path, bad).unwrap();
            assert!(Report::read(&path).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_measure_is_there_and_what_was_not_measured_is_null() {
        let results = sample_results(&[
            ("start_total", Subject::Husk, 0.5),
            ("start_total", Subject::Runc, 0.75),
        ]);
        let report = Report::of(&results);
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        let rows = json["measures"].as_array().unwrap();
        assert_eq!(rows.len(), measures::ALL.len());
        let expected = serde_json::json!({
            "name": "start_total", "unit": "s", "husk": 0.5, "runc": 0.75, "gvisor": null,
            "target": 0.75, "met": true,
        });
        assert_eq!(rows[0], expected);
    }

    #[test]
    fn report_is_read_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        let report = Report::of(&sample_results(&[("exec_true", Subject::Runc, 0.25)]));
        fs::write(&path, report.to_json().unwrap()).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
    }
}
