//! Files: the same work on the machine itself, and in containers.

use std::fs;

use anyhow::{Context, Result};

use super::Bench;
use super::containers;
use super::work;
use crate::record::Subject;

/// Where the host's part writes: on the same file system as the containers' roots.
const HOST_ROOT: &str = "/var/tmp/husk-bench-root";

/// Writing back is put off: when it happens to begin, and what it takes, is no part of the figures.
const WRITE_BACK: [&str; 2] = [
    "/proc/sys/vm/dirty_writeback_centisecs",
    "/proc/sys/vm/dirty_expire_centisecs",
];
const WRITE_BACK_VALUES: [&str; 2] = ["0", "360000"];

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    for (path, value) in WRITE_BACK.iter().zip(WRITE_BACK_VALUES) {
        fs::write(path, value).with_context(|| format!("cannot write to {path}"))?;
    }
    let runtimes = containers::runtimes()?;
    let directory = work::install()?;
    let input = directory.join("input");
    let input = input.to_str().context("a path that is no text")?;
    work::on_host(&["input", input])?;
    fs::create_dir_all(HOST_ROOT).with_context(|| format!("cannot make {HOST_ROOT}"))?;

    let count = bench.plan.choose("10000", "2000");
    let mount = containers::mount_words(&directory);
    for round in 0..bench.plan.choose(3, 1) {
        for (part, words) in [
            ("files", ["files", "INPUT", "ROOT"]),
            ("small", ["small", "ROOT", count]),
            ("tree", ["tree", "INPUT", ""]),
        ] {
            let words = |input, root| {
                words
                    .into_iter()
                    .filter(|word| !word.is_empty())
                    .map(|word| match word {
                        "INPUT" => input,
                        "ROOT" => root,
                        other => other,
                    })
                    .collect::<Vec<_>>()
            };
            let said = work::on_host(&words(input, HOST_ROOT));
            take(bench, part, Subject::Host, said)?;
            for subject in &runtimes {
                let id = format!("{part}-{}-{round}", subject.name());
                let mut words = words("/bench/input", "/");
                words.insert(0, "/bench/husk-workload");
                let said = containers::run(*subject, &id, &["--mount", &mount], &words);
                take(bench, part, *subject, said)?;
            }
        }
    }
    Ok(())
}

/// Takes all figures that the workload said.
fn take(
    bench: &mut Bench,
    part: &str,
    subject: Subject,
    ended: Result<super::command::Ended>,
) -> Result<()> {
    let values = ended.and_then(|ended| work::parse(&ended.stdout));
    match values {
        Ok(values) => {
            for (measure, value) in values {
                bench.sample(&measure, subject, value)?;
            }
            Ok(())
        }
        Err(error) => {
            // Every figure of that part is missing; one of them stands for all.
            let measure = match part {
                "files" => "fs_read_cached",
                "small" => "fs_small_files",
                _ => "fs_tree_again",
            };
            bench.failure(measure, subject, &error)
        }
    }
}
