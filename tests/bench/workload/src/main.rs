//! Work for husk-bench: the same static program runs on the machine itself, in runc's containers
//! and in Husk's, and says in lines of `NAME VALUE` how fast it went.
//!
//! ```text
//! husk-workload input DIRECTORY     make what files and tree read
//! husk-workload files INPUT ROOT    big files
//! husk-workload small ROOT COUNT    small files
//! husk-workload tree INPUT          a source tree
//! husk-workload hold MIB            memory
//! husk-workload serve               the other end of net
//! husk-workload net ADDRESS UP DOWN REQUESTS    network; names of the figures, - for none
//! ```
#![forbid(unsafe_code)]

mod files;
mod memory;
mod network;
mod small;
mod tree;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["input", directory] => {
            files::make_input(Path::new(directory))?;
            tree::make(Path::new(directory))
        }
        ["files", input, root] => files::measure(Path::new(input), Path::new(root)),
        ["small", root, count] => small::measure(Path::new(root), count.parse()?),
        ["tree", input] => tree::measure(Path::new(input)),
        ["serve"] => network::serve(),
        ["net", address, up, down, requests] => network::measure(address, [up, down, requests]),
        ["hold", mib] => memory::hold(mib.parse()?),
        _ => bail!("unknown work: {words:?}"),
    }
}

/// Says how many bytes a second went by, in MB.
fn say_rate(name: &str, bytes: u64, began: Instant) -> Result<()> {
    let seconds = elapsed(began)?;
    println!("{name} {}", to_f64(bytes) / 1e6 / seconds);
    Ok(())
}

/// Says how long each took, in microseconds.
fn say_each(name: &str, count: u64, began: Instant) -> Result<()> {
    let seconds = elapsed(began)?;
    ensure!(count > 0, "{name} did nothing");
    println!("{name} {}", seconds * 1e6 / to_f64(count));
    Ok(())
}

fn elapsed(began: Instant) -> Result<f64> {
    let seconds = began.elapsed().as_secs_f64();
    ensure!(seconds > 0.0, "the clock stands still");
    Ok(seconds)
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn to_f64(count: u64) -> f64 {
    count as f64
}

/// Numbers without a pattern that are the same at every run (xorshift64).
struct Places {
    state: u64,
}

impl Places {
    fn new() -> Self {
        Self {
            state: 0x9E37_79B9_7F4A_7C15,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_without_sense_is_refused() {
        for bad in [
            [].as_slice(),
            &["files"],
            &["hold", "much"],
            &["hold", "1", "2"],
        ] {
            assert!(run(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn places_stay_below_their_limit_and_differ() {
        let mut places = Places::new();
        let all: Vec<_> = (0..100).map(|_| places.below(10)).collect();
        assert!(all.iter().all(|place| *place < 10));
        assert!((0..10).all(|place| all.contains(&place)));
        assert_eq!(places.below(0), 0);
    }
}
