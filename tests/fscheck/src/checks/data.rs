//! What is in files.

use std::io::{IoSlice, IoSliceMut};

use rustix::fs::{self, AtFlags, CWD, OFlags};
use rustix::io::{self, Errno};

use crate::harness::*;
use crate::mapping::Mapping;

super::checks!(
    written_data_is_read_back,
    data_survives_a_new_open,
    write_to_read_only_descriptor_is_refused,
    appended_data_goes_to_the_end,
    appends_by_two_descriptors_do_not_overwrite,
    vectored_transfers_work,
    gap_reads_as_zeros,
    offsets_beyond_4_gib_work,
    read_at_the_end_is_empty,
    unlinked_file_lives_while_open,
    unnamed_temporary_file_gets_a_name,
    exclusive_temporary_file_gets_no_name,
    shared_mapping_is_written_back,
    mapping_sees_writes,
    mapping_beside_append_keeps_both,
    large_file_keeps_its_content,
    unaligned_pieces_keep_their_places,
    sync_calls_work,
    copied_descriptor_shares_its_offset,
    direct_transfers_work_or_are_refused,
    truncated_away_data_does_not_come_back,
);

/// Bytes that tell their place.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from((at.wrapping_mul(31).wrapping_add(seed) >> 3) & 0xff).unwrap_or(0))
        .collect()
}

fn read_at(file: &impl std::os::fd::AsFd, length: usize, offset: u64) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; length];
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match io::pread(file, rest, offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    buffer.truncate(done);
    Ok(buffer)
}

fn written_data_is_read_back() -> Outcome {
    let file = create("f", 0o644)?;
    let data = pattern(100_000, 1);
    equal("written", io::pwrite(&file, &data, 0)?, data.len())?;
    holds("it is the same", read_at(&file, data.len(), 0)? == data)?;
    holds(
        "a part is, too",
        read_at(&file, 777, 4095)?[..] == data[4095..4872],
    )
}

fn data_survives_a_new_open() -> Outcome {
    let data = pattern(300_000, 2);
    write_file("f", &data)?;
    holds("it is the same", content_of("f")? == data)?;
    write_file("f", &data[..1000])?;
    holds("the shorter one is, too", content_of("f")? == data[..1000])
}

fn write_to_read_only_descriptor_is_refused() -> Outcome {
    write_file("f", b"x")?;
    refused(
        "write",
        io::write(open("f", OFlags::RDONLY)?, b"y"),
        Errno::BADF,
    )?;
    refused(
        "read",
        io::read(open("f", OFlags::WRONLY)?, &mut [0; 1]),
        Errno::BADF,
    )
}

fn appended_data_goes_to_the_end() -> Outcome {
    write_file("f", b"one ")?;
    let file = open("f", OFlags::WRONLY | OFlags::APPEND)?;
    io::write(&file, b"two ")?;
    fs::seek(&file, fs::SeekFrom::Start(0))?;
    io::write(&file, b"three")?;
    equal("content", content_of("f")?, b"one two three".to_vec())
}

fn appends_by_two_descriptors_do_not_overwrite() -> Outcome {
    create("f", 0o644)?;
    let one = open("f", OFlags::WRONLY | OFlags::APPEND)?;
    let two = open("f", OFlags::WRONLY | OFlags::APPEND)?;
    for _ in 0..50 {
        io::write(&one, b"1")?;
        io::write(&two, b"2")?;
    }
    equal("content", content_of("f")?, b"12".repeat(50))
}

fn vectored_transfers_work() -> Outcome {
    let file = create("f", 0o644)?;
    let parts = [
        IoSlice::new(b"abc"),
        IoSlice::new(b""),
        IoSlice::new(b"defgh"),
    ];
    equal("written", io::pwritev(&file, &parts, 10)?, 8)?;
    let (mut one, mut two) = ([0; 5], [0; 3]);
    let mut parts = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
    equal("read", io::preadv(&file, &mut parts, 10)?, 8)?;
    equal("first part", &one, b"abcde")?;
    equal("second part", &two, b"fgh")
}

fn gap_reads_as_zeros() -> Outcome {
    let file = create("f", 0o644)?;
    io::pwrite(&file, b"end", 10_000)?;
    let content = content_of("f")?;
    equal("size", content.len(), 10_003)?;
    holds(
        "the gap is zeros",
        content[..10_000].iter().all(|byte| *byte == 0),
    )
}

fn offsets_beyond_4_gib_work() -> Outcome {
    const FAR: u64 = 5 * 1024 * 1024 * 1024 + 123;
    let file = create("f", 0o644)?;
    io::pwrite(&file, b"far away", FAR)?;
    equal(
        "size",
        fs::fstat(&file)?.st_size,
        5 * 1024 * 1024 * 1024 + 131,
    )?;
    equal(
        "content",
        read_at(&open("f", OFlags::RDONLY)?, 100, FAR)?,
        b"far away".to_vec(),
    )?;
    holds("it takes little room", lstat("f")?.st_blocks < 10_000)
}

fn read_at_the_end_is_empty() -> Outcome {
    write_file("f", b"12345")?;
    let file = open("f", OFlags::RDONLY)?;
    equal("at the end", io::pread(&file, &mut [0; 10], 5)?, 0)?;
    equal("beyond", io::pread(&file, &mut [0; 10], 1 << 40)?, 0)?;
    equal("before", io::pread(&file, &mut [0; 10], 3)?, 2)
}

fn unlinked_file_lives_while_open() -> Outcome {
    let file = create("f", 0o644)?;
    io::pwrite(&file, b"before", 0)?;
    fs::unlink("f")?;
    io::pwrite(&file, b" after", 6)?;
    equal("content", read_at(&file, 100, 0)?, b"before after".to_vec())?;
    create("f", 0o600)?;
    holds(
        "a new file is another one",
        fs::fstat(&file)?.st_ino != lstat("f")?.st_ino,
    )?;
    equal(
        "content beside it",
        read_at(&file, 100, 0)?,
        b"before after".to_vec(),
    )
}

fn unnamed_temporary_file_gets_a_name() -> Outcome {
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = supported("O_TMPFILE", fs::open(".", flags, mode(0o640)))?;
    io::write(&file, b"temporary")?;
    equal("links", fs::fstat(&file)?.st_nlink, 0)?;
    fs::linkat(&file, "", CWD, "f", AtFlags::EMPTY_PATH)?;
    equal("content", content_of("f")?, b"temporary".to_vec())?;
    equal("mode", mode_of("f")?, 0o640)?;
    equal("links at the end", lstat("f")?.st_nlink, 1)
}

fn exclusive_temporary_file_gets_no_name() -> Outcome {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL;
    let file = supported("O_TMPFILE", fs::open(".", flags, mode(0o600)))?;
    refused(
        "link",
        fs::linkat(&file, "", CWD, "f", AtFlags::EMPTY_PATH),
        Errno::NOENT,
    )
}

fn shared_mapping_is_written_back() -> Outcome {
    let file = create("f", 0o644)?;
    fs::ftruncate(&file, 8192)?;
    {
        let mapping = Mapping::new(&file, 8192)?;
        mapping.write(0, b'A');
        mapping.write(5000, b'B');
        mapping.sync()?;
        equal("read beside it", read_at(&file, 1, 5000)?, b"B".to_vec())?;
        mapping.write(8191, b'C');
    }
    drop(file);
    let content = content_of("f")?;
    equal("size", content.len(), 8192)?;
    equal("bytes", [content[0], content[5000], content[8191]], *b"ABC")
}

fn mapping_sees_writes() -> Outcome {
    let file = create("f", 0o644)?;
    fs::ftruncate(&file, 4096)?;
    let mapping = Mapping::new(&file, 4096)?;
    equal("before", mapping.read(100), 0)?;
    io::pwrite(&file, b"Z", 100)?;
    equal("after", mapping.read(100), b'Z')
}

fn mapping_beside_append_keeps_both() -> Outcome {
    write_file("f", &[b'.'; 4096])?;
    let append = open("f", OFlags::RDWR | OFlags::APPEND)?;
    let mapping = Mapping::new(&append, 4096)?;
    mapping.write(10, b'M');
    mapping.sync()?;
    io::write(&append, b"tail")?;
    mapping.write(20, b'N');
    mapping.sync()?;
    let content = content_of("f")?;
    equal("size", content.len(), 4100)?;
    equal("bytes", [content[10], content[20]], *b"MN")?;
    equal("end", content[4096..].to_vec(), b"tail".to_vec())
}

fn large_file_keeps_its_content() -> Outcome {
    const PIECE: usize = 1024 * 1024 + 7;
    let file = create("f", 0o644)?;
    for round in 0..8 {
        let data = pattern(PIECE, round * 1000);
        equal("written", io::write(&file, &data)?, PIECE)?;
    }
    let file = open("f", OFlags::RDONLY)?;
    for round in 0..8 {
        let data = read_at(&file, PIECE, (round * PIECE) as u64)?;
        holds(
            "each piece is as written",
            data == pattern(PIECE, round * 1000),
        )?;
    }
    Ok(())
}

fn unaligned_pieces_keep_their_places() -> Outcome {
    let file = create("f", 0o644)?;
    let mut expected = vec![0; 200_000];
    for round in 0..60 {
        let (at, length) = ((round * 7919) % 190_000, 1 + (round * 613) % 9000);
        let data = pattern(length, round);
        expected[at..at + length].copy_from_slice(&data);
        io::pwrite(&file, &data, at as u64)?;
    }
    fs::ftruncate(&file, 200_000)?;
    holds("the file is as expected", content_of("f")? == expected)
}

fn sync_calls_work() -> Outcome {
    let file = create("f", 0o644)?;
    io::write(&file, b"x")?;
    fs::fsync(&file)?;
    fs::fdatasync(&file)?;
    let directory = open(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    fs::fsync(&directory)?;
    Ok(fs::syncfs(&directory)?)
}

fn copied_descriptor_shares_its_offset() -> Outcome {
    write_file("f", b"abcdef")?;
    let file = open("f", OFlags::RDONLY)?;
    let copy = io::dup(&file)?;
    io::read(&file, &mut [0; 2])?;
    let mut buffer = [0; 2];
    io::read(&copy, &mut buffer)?;
    equal("the next bytes", &buffer, b"cd")?;
    drop(file);
    equal("offset", fs::tell(&copy)?, 4)
}

fn direct_transfers_work_or_are_refused() -> Outcome {
    write_file("f", &pattern(8192, 3))?;
    let file = match open("f", OFlags::RDWR | OFlags::DIRECT) {
        Err(Errno::INVAL) => return skip("O_DIRECT is not supported"),
        file => file?,
    };
    // A block in the middle of a buffer is aligned.
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    let block = &mut buffer[start..start + 4096];
    equal("read", io::pread(&file, &mut *block, 4096)?, 4096)?;
    holds("the data is right", *block == pattern(8192, 3)[4096..])?;
    equal("written", io::pwrite(&file, block, 0)?, 4096)?;
    holds(
        "the data got there",
        content_of("f")?[..4096] == pattern(8192, 3)[4096..],
    )
}

fn truncated_away_data_does_not_come_back() -> Outcome {
    let file = create("f", 0o644)?;
    io::pwrite(&file, &[b'x'; 10_000], 0)?;
    fs::ftruncate(&file, 100)?;
    io::pwrite(&file, b"y", 9000)?;
    let content = content_of("f")?;
    holds(
        "what is between is zeros",
        content[100..9000].iter().all(|byte| *byte == 0),
    )?;
    fs::ftruncate(&file, 0)?;
    fs::ftruncate(&file, 5000)?;
    holds(
        "all is zeros",
        content_of("f")?.iter().all(|byte| *byte == 0),
    )
}
