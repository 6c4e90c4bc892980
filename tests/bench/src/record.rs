//! Records: what `measure` found, one JSON object a line.
//!
//! A file is only ever appended to, so that a machine that dies half way leaves what it had found.
//! The last line of such a file may be cut; every other line that is none is an error.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Who was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Subject {
    Husk,
    Runc,
    Gvisor,
    /// No container at all: the same program on the machine itself.
    Host,
}

impl Subject {
    pub(crate) const ALL: [Self; 4] = [Self::Husk, Self::Runc, Self::Gvisor, Self::Host];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Husk => "husk",
            Self::Runc => "runc",
            Self::Gvisor => "gvisor",
            Self::Host => "host",
        }
    }

    /// As people write it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Husk => "Husk",
            Self::Runc => "runc",
            Self::Gvisor => "gVisor",
            Self::Host => "host",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.title())
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum Record {
    /// One value of a measure, in the measure's unit.
    Sample {
        measure: String,
        subject: Subject,
        value: f64,
    },
    /// A measure that could not be taken, or not in full.
    Failure {
        measure: String,
        subject: Subject,
        why: String,
    },
    /// One start, taken apart.
    Trace(Trace),
}

/// One start, from one trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trace {
    pub(crate) subject: Subject,
    /// In the order of time.
    pub(crate) phases: Vec<Phase>,
}

/// A part of a start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Phase {
    /// What goes on in it.
    pub(crate) name: String,
    /// Seconds since the command was given.
    pub(crate) from_s: f64,
    pub(crate) to_s: f64,
    /// Exits of the virtual CPUs in it, by KVM's names of their reasons, the most frequent first.
    #[serde(default)]
    pub(crate) exits: Vec<(String, u64)>,
}

/// Why a file of records can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} line {line} is no record", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        source: serde_json::Error,
    },
}

/// All records of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<Record>, RecordError> {
    let text = fs::read(path).map_err(|source| RecordError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(&text).map_err(|(line, source)| RecordError::Line {
        path: path.to_owned(),
        line,
        source,
    })
}

fn parse(text: &[u8]) -> Result<Vec<Record>, (usize, serde_json::Error)> {
    let mut records = Vec::new();
    for (index, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match serde_json::from_slice(line) {
            Ok(record) => records.push(record),
            // The writer was cut off.
            Err(_) if line.last() != Some(&b'\n') => {}
            Err(error) => return Err((index.saturating_add(1), error)),
        }
    }
    Ok(records)
}

/// Appends records to a file.
pub(crate) struct Writer {
    file: File,
}

impl Writer {
    pub(crate) fn append(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        Ok(Self { file })
    }

    pub(crate) fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"{"kind":"sample","measure":"m","subject":"husk","value":1.5}"#;

    #[test]
    fn line_that_is_no_record_is_named() {
        let other_kind = r#"{"kind":"guess","measure":"m"}"#;
        let other_subject = SAMPLE.replace("husk", "kata");
        for bad in ["", "{", "null", other_kind, &other_subject] {
            let text = format!("{SAMPLE}\n{bad}\n{SAMPLE}\n");
            assert_eq!(parse(text.as_bytes()).unwrap_err().0, 2, "{bad}");
        }
    }

    #[test]
    fn last_line_may_be_cut() {
        let text = format!("{SAMPLE}\n{}", &SAMPLE[..20]);
        assert_eq!(parse(text.as_bytes()).unwrap().len(), 1);
    }

    #[test]
    fn records_are_read_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("records");
        let records = [
            Record::Sample {
                measure: "m".to_owned(),
                subject: Subject::Husk,
                value: 1.5,
            },
            Record::Trace(Trace {
                subject: Subject::Runc,
                phases: vec![Phase {
                    name: "create".to_owned(),
                    from_s: 0.0,
                    to_s: 0.25,
                    exits: vec![("npf".to_owned(), 3)],
                }],
            }),
        ];
        for record in &records {
            Writer::append(&path).unwrap().write(record).unwrap();
        }
        assert_eq!(read(&path).unwrap(), records);
    }
}
