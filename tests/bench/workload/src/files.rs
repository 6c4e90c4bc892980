//! Big files: read and written in order and at random places, 4 KiB and 1 MiB at a time, through
//! the page cache, and with fsync.

use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{Places, elapsed, say_rate, to_f64};

const SMALL: u64 = 4096;
const BIG: u64 = 1024 * 1024;

/// Fits every cache there is, the guest's as well.
const FILE_BYTES: u64 = 16 * BIG;

/// What is written at random places: the whole file again, in big pieces; fewer small ones.
const RANDOM_SMALL_COUNT: u64 = 1024;
const RANDOM_BIG_COUNT: u64 = 16;
const FSYNC_SMALL_COUNT: u32 = 32;
const FSYNC_BIG_COUNT: u32 = 8;

const INPUT: &str = "big";

/// Makes the file that is read, and leaves it in the cache.
pub(crate) fn make_input(directory: &Path) -> Result<()> {
    let path = directory.join(INPUT);
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(&path, buffer(FILE_BYTES)))
        .with_context(|| format!("cannot make {}", path.display()))
}

/// Reads the file in `input` and writes another to `root`.
pub(crate) fn measure(input: &Path, root: &Path) -> Result<()> {
    let input = input.join(INPUT);
    read(&input).with_context(|| format!("cannot read {}", input.display()))?;
    let output = root.join("husk-workload-big");
    let written = write(&output).with_context(|| format!("cannot write {}", output.display()));
    let _ = fs::remove_file(&output);
    written
}

fn read(path: &Path) -> Result<()> {
    for (name, block) in [
        ("fs_read_first", BIG),
        ("fs_read_cached", BIG),
        ("fs_read_4k", SMALL),
    ] {
        let mut file = File::open(path)?;
        let mut block = buffer(block);
        let mut bytes = 0;
        let began = Instant::now();
        loop {
            let count = file.read(&mut block)?;
            if count == 0 {
                break;
            }
            bytes += u64::try_from(count)?;
            black_box(&block);
        }
        say_rate(name, bytes, began)?;
        ensure!(bytes == FILE_BYTES, "{bytes} bytes instead of {FILE_BYTES}");
    }
    let file = File::open(path)?;
    for (name, size, count) in [
        ("fs_read_random_4k", SMALL, RANDOM_SMALL_COUNT),
        ("fs_read_random_1m", BIG, RANDOM_BIG_COUNT),
    ] {
        let mut block = buffer(size);
        let mut places = Places::new();
        let began = Instant::now();
        for _ in 0..count {
            file.read_exact_at(&mut block, places.below(FILE_BYTES / size) * size)?;
            black_box(&block);
        }
        say_rate(name, count * size, began)?;
    }
    Ok(())
}

fn write(path: &Path) -> Result<()> {
    for (name, size) in [("fs_write_1m", BIG), ("fs_write_4k", SMALL)] {
        let _ = fs::remove_file(path);
        let block = buffer(size);
        let began = Instant::now();
        let mut file = File::create_new(path)?;
        for _ in 0..FILE_BYTES / size {
            file.write_all(&block)?;
        }
        // Closing is part of it: a file system may write then.
        drop(file);
        say_rate(name, FILE_BYTES, began)?;
    }
    let file = OpenOptions::new().write(true).open(path)?;
    for (name, size, count) in [
        ("fs_write_random_4k", SMALL, RANDOM_SMALL_COUNT),
        ("fs_write_random_1m", BIG, RANDOM_BIG_COUNT),
    ] {
        let block = buffer(size);
        let mut places = Places::new();
        let began = Instant::now();
        for _ in 0..count {
            file.write_all_at(&block, places.below(FILE_BYTES / size) * size)?;
        }
        say_rate(name, count * size, began)?;
    }
    // What was written so far is not what the next are to wait for.
    file.sync_all()?;
    let big = synced(&file, BIG, FSYNC_BIG_COUNT)?;
    println!("fs_write_fsync_1m {}", big * to_f64(BIG) / 1e6);
    println!(
        "fs_write_fsync_4k {}",
        synced(&file, SMALL, FSYNC_SMALL_COUNT)?
    );
    Ok(())
}

/// Pairs of a write and an fsync in a second.
fn synced(file: &File, size: u64, count: u32) -> Result<f64> {
    let block = buffer(size);
    let mut places = Places::new();
    let began = Instant::now();
    for _ in 0..count {
        file.write_all_at(&block, places.below(FILE_BYTES / size) * size)?;
        file.sync_all()?;
    }
    Ok(f64::from(count) / elapsed(began)?)
}

/// Bytes that no file system could take for a hole.
fn buffer(bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|place| (place % 251).to_le_bytes()[0] | 1)
        .collect()
}
