//! Whom the host's kernel kills first when it runs out of memory (proc(5), `oom_score_adj`).
//!
//! A pod's memory is its VMM's, so that the VMM has the score that its containers were given. What it
//! has inherited is containerd's own, which spares it whatever the pod takes.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// Of a VMM whose containers have none.
const USUAL: i32 = 0;

/// The score of one VMM.
#[derive(Debug)]
pub(crate) struct OomScore {
    /// Of that very process: it can't be another's, whoever gets its pid.
    file: File,
    /// The lowest of its containers'.
    lowest: Option<i32>,
}

impl OomScore {
    /// Gives a process the usual score.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/oom_score_adj");
        let mut file = OpenOptions::new().write(true).open(path)?;
        write!(file, "{USUAL}")?;
        let lowest = None;
        Ok(Self { file, lowest })
    }

    /// Spares the process as much as one of its containers wants to be spared.
    pub(crate) fn take(&mut self, score: i32) -> io::Result<()> {
        if self.lowest.is_none_or(|lowest| score < lowest) {
            write!(self.file, "{score}")?;
            self.lowest = Some(score);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[test]
    fn lowest_score_of_the_containers_counts() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let score_now = || {
            let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse::<i32>().unwrap()
        };

        let mut score = OomScore::of(pid).unwrap();
        let mut seen = vec![score_now()];
        for wanted in [900, 300, 500] {
            score.take(wanted).unwrap();
            seen.push(score_now());
        }

        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, [0, 900, 300, 300]);
        assert!(score.take(100).is_err(), "the process has gone");
    }
}
