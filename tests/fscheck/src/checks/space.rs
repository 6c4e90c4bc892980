//! Holes, allocation and copies inside the file system.

use std::os::fd::OwnedFd;

use rustix::fs::{self, FallocateFlags, OFlags, SeekFrom};
use rustix::io::{self, Errno};

use crate::harness::*;

super::checks!(
    hole_and_data_are_found,
    seek_beyond_the_end_is_refused,
    allocation_grows_the_file,
    allocation_can_keep_the_size,
    punched_hole_reads_as_zeros,
    zeroed_range_reads_as_zeros,
    wrong_allocation_is_refused,
    range_is_copied,
    copied_range_goes_over_itself_or_is_refused,
    copy_to_read_only_descriptor_is_refused,
    copy_beyond_the_end_is_short,
);

const KEEP: FallocateFlags = FallocateFlags::KEEP_SIZE;

fn full_file(name: &str) -> Result<OwnedFd, Problem> {
    write_file(name, &[b'x'; 65536])?;
    Ok(open(name, OFlags::RDWR)?)
}

fn hole_and_data_are_found() -> Outcome {
    let file = create("f", 0o644)?;
    fs::ftruncate(&file, 1 << 20)?;
    io::pwrite(&file, &[1; 4096], 512 * 1024)?;
    fs::fsync(&file)?;
    let data = fs::seek(&file, SeekFrom::Data(0))?;
    if data == 0 {
        return skip("holes are not told apart here");
    }
    equal("data", data, 512 * 1024)?;
    equal("hole at the start", fs::seek(&file, SeekFrom::Hole(0))?, 0)?;
    let hole = fs::seek(&file, SeekFrom::Hole(512 * 1024))?;
    holds(
        "a hole follows the data",
        hole > 512 * 1024 && hole < 1 << 20,
    )
}

fn seek_beyond_the_end_is_refused() -> Outcome {
    let file = full_file("f")?;
    refused("data", fs::seek(&file, SeekFrom::Data(65536)), Errno::NXIO)?;
    refused(
        "hole",
        fs::seek(&file, SeekFrom::Hole(1 << 30)),
        Errno::NXIO,
    )?;
    equal(
        "the last hole is the end",
        fs::seek(&file, SeekFrom::Hole(0))?,
        65536,
    )?;
    equal("the end", fs::seek(&file, SeekFrom::End(10))?, 65546)
}

fn allocation_grows_the_file() -> Outcome {
    let file = create("f", 0o644)?;
    supported(
        "fallocate",
        fs::fallocate(&file, FallocateFlags::empty(), 1000, 9000),
    )?;
    let stat = fs::fstat(&file)?;
    equal("size", stat.st_size, 10_000)?;
    holds("there are blocks", stat.st_blocks > 0)?;
    holds(
        "they are zeros",
        content_of("f")?.iter().all(|byte| *byte == 0),
    )
}

fn allocation_can_keep_the_size() -> Outcome {
    let file = create("f", 0o644)?;
    supported("FALLOC_FL_KEEP_SIZE", fs::fallocate(&file, KEEP, 0, 65536))?;
    let stat = lstat("f")?;
    equal("size", stat.st_size, 0)?;
    holds("there are blocks", stat.st_blocks > 0)
}

fn punched_hole_reads_as_zeros() -> Outcome {
    let file = full_file("f")?;
    let flags = FallocateFlags::PUNCH_HOLE | KEEP;
    supported(
        "FALLOC_FL_PUNCH_HOLE",
        fs::fallocate(&file, flags, 8192, 16384),
    )?;
    let content = content_of("f")?;
    equal("size", content.len(), 65536)?;
    holds(
        "the hole is zeros",
        content[8192..24576].iter().all(|byte| *byte == 0),
    )?;
    holds(
        "the rest is not",
        content[..8192].iter().all(|byte| *byte == b'x'),
    )?;
    equal("behind it", content[24576], b'x')
}

fn zeroed_range_reads_as_zeros() -> Outcome {
    let file = full_file("f")?;
    let zero = FallocateFlags::ZERO_RANGE;
    supported(
        "FALLOC_FL_ZERO_RANGE",
        fs::fallocate(&file, zero, 60_000, 10_000),
    )?;
    let content = content_of("f")?;
    equal("size", content.len(), 70_000)?;
    holds(
        "the range is zeros",
        content[60_000..].iter().all(|byte| *byte == 0),
    )?;
    equal("before it", content[59_999], b'x')
}

fn wrong_allocation_is_refused() -> Outcome {
    let file = full_file("f")?;
    let none = FallocateFlags::empty();
    refused("nothing", fs::fallocate(&file, none, 0, 0), Errno::INVAL)?;
    refused(
        "too far",
        fs::fallocate(&file, none, i64::MAX as u64, 10),
        Errno::FBIG,
    )?;
    let read_only = open("f", OFlags::RDONLY)?;
    refused(
        "read only",
        fs::fallocate(&read_only, none, 0, 10),
        Errno::BADF,
    )?;
    let punch = FallocateFlags::PUNCH_HOLE;
    refused(
        "punch without keep",
        fs::fallocate(&file, punch, 0, 10),
        Errno::OPNOTSUPP,
    )
}

fn copy(from: &OwnedFd, at: u64, to: &OwnedFd, to_at: u64, length: usize) -> Result<usize, Errno> {
    let (mut at, mut to_at) = (at, to_at);
    let mut done = 0;
    while done < length {
        match fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), length - done)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

fn range_is_copied() -> Outcome {
    let data: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    write_file("f", &data)?;
    let (from, to) = (open("f", OFlags::RDONLY)?, create("g", 0o644)?);
    equal(
        "count",
        supported("copy_file_range", copy(&from, 10, &to, 100, 250_000))?,
        250_000,
    )?;
    let copied = content_of("g")?;
    equal("size", copied.len(), 250_100)?;
    holds("the data is right", copied[100..] == data[10..250_010])?;
    holds(
        "what is before is zeros",
        copied[..100].iter().all(|byte| *byte == 0),
    )
}

fn copied_range_goes_over_itself_or_is_refused() -> Outcome {
    let file = full_file("f")?;
    refused(
        "overlapping",
        copy(&file, 0, &file, 100, 1000),
        Errno::INVAL,
    )?;
    equal("apart", copy(&file, 0, &file, 100_000, 1000)?, 1000)?;
    equal("size", lstat("f")?.st_size, 101_000)
}

fn copy_to_read_only_descriptor_is_refused() -> Outcome {
    let from = full_file("f")?;
    create("g", 0o644)?;
    let to = open("g", OFlags::RDONLY)?;
    refused("read only", copy(&from, 0, &to, 0, 10), Errno::BADF)?;
    let append = open("g", OFlags::WRONLY | OFlags::APPEND)?;
    refused("append", copy(&from, 0, &append, 0, 10), Errno::BADF)
}

fn copy_beyond_the_end_is_short() -> Outcome {
    let (from, to) = (full_file("f")?, create("g", 0o644)?);
    equal("short", copy(&from, 65_000, &to, 0, 10_000)?, 536)?;
    equal("none", copy(&from, 70_000, &to, 0, 10)?, 0)
}
