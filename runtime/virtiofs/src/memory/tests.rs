use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use super::*;

/// Ranges over pieces of `bytes` of the lengths given.
fn pieces(bytes: &mut [u8], lengths: &[usize]) -> Vec<iovec> {
    let mut rest = bytes;
    let mut ranges = Vec::new();
    for length in lengths {
        let (piece, behind) = rest.split_at_mut(*length);
        ranges.push(iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        });
        rest = behind;
    }
    ranges
}

fn file_with(content: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn content_of(file: &mut std::fs::File) -> Vec<u8> {
    let mut content = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut content).unwrap();
    content
}

#[test]
fn more_than_there_is_is_not_read_at_all() {
    let mut reader = RequestReader::from_bytes(b"abc");
    assert!(reader.read_exact(&mut [0; 4]).is_none());
    assert_eq!(reader.remaining(), 3);
}

#[test]
fn reads_go_over_ends_of_ranges_and_empty_ranges() {
    let mut bytes = *b"0123456789abcdefghijklmnopqrstuvwxyz";
    let ranges = pieces(&mut bytes, &[0, 1, 0, 17, 5, 0, 13]);
    // SAFETY: the ranges are pieces of `bytes`, which is not touched while the reader lives.
    let mut reader = unsafe { RequestReader::from_ranges(&ranges) };
    let mut target = [0; 36];
    reader.read_exact(&mut target[..2]).unwrap();
    reader.read_exact(&mut target[2..36]).unwrap();
    assert_eq!(&target, b"0123456789abcdefghijklmnopqrstuvwxyz");
    assert!(reader.read_exact(&mut [0; 1]).is_none());
}

#[test]
fn truncated_request_ends_where_it_was_cut_off() {
    let mut reader = RequestReader::from_bytes(b"abcdef");
    reader.truncate(4);
    let mut file = file_with(b"");
    assert_eq!(reader.write_to_file_at(file.as_fd(), 100, 0, false), Ok(4));
    assert_eq!(content_of(&mut file), b"abcd");
}

#[test]
fn data_goes_from_ranges_to_a_file_at_its_offset() {
    let mut bytes = *b"headWORLD!!!";
    let ranges = pieces(&mut bytes, &[2, 4, 6]);
    // SAFETY: the ranges are pieces of `bytes`, which is not touched while the reader lives.
    let mut reader = unsafe { RequestReader::from_ranges(&ranges) };
    reader.read_exact(&mut [0; 4]).unwrap();
    let mut file = file_with(b"Hello,______");
    assert_eq!(reader.write_to_file_at(file.as_fd(), 5, 7, false), Ok(5));
    assert_eq!(content_of(&mut file), b"Hello,_WORLD");
    assert_eq!(reader.remaining(), 3);
}

#[test]
fn appended_data_goes_to_the_end_wherever_it_should() {
    let mut file = file_with(b"first ");
    let mut reader = RequestReader::from_bytes(b"second");
    assert_eq!(reader.write_to_file_at(file.as_fd(), 6, 0, true), Ok(6));
    assert_eq!(content_of(&mut file), b"first second");
}

#[test]
fn reply_does_not_grow_beyond_its_ranges() {
    let mut bytes = [0; HEADER_BYTES + 4];
    let mut writer = ReplyWriter::from_bytes(&mut bytes);
    assert_eq!(writer.room(), 4);
    assert_eq!(writer.write(b"12345"), Err(Errno::IO));
    assert_eq!(writer.write(b"1234"), Ok(()));
    assert_eq!(writer.written(), 4);
}

#[test]
fn reply_without_room_for_a_header_says_so() {
    let mut bytes = [0; HEADER_BYTES - 1];
    assert!(!ReplyWriter::from_bytes(&mut bytes).has_header());
}

#[test]
fn file_data_lands_behind_the_header_across_ranges() {
    let mut bytes = [b'.'; 32];
    let ranges = pieces(&mut bytes, &[10, 10, 12]);
    let file = file_with(b"0123456789");
    // SAFETY: the ranges are pieces of `bytes`, which is not touched while the writer lives.
    let mut writer = unsafe { ReplyWriter::from_ranges(&ranges) };
    assert_eq!(writer.read_from_file_at(file.as_fd(), 8, 1), Ok(8));
    writer.finish(b"HHHHHHHHHHHHHHHH");
    assert_eq!(&bytes, b"HHHHHHHHHHHHHHHH12345678........");
}

#[test]
fn read_beyond_the_end_of_the_file_is_short() {
    let mut bytes = [0; HEADER_BYTES + 100];
    let file = file_with(b"0123456789");
    let mut writer = ReplyWriter::from_bytes(&mut bytes);
    assert_eq!(writer.read_from_file_at(file.as_fd(), 100, 4), Ok(6));
    assert_eq!(writer.written(), 6);
}

#[test]
fn list_longer_than_one_call_takes_is_transferred_whole() {
    let count = RANGES_PER_CALL_MAX * 2 + 3;
    let mut bytes: Vec<u8> = (0..=255).cycle().take(count * 3).collect();
    let expected = bytes.clone();
    let ranges = pieces(&mut bytes, &vec![3; count]);
    // SAFETY: the ranges are pieces of `bytes`, which is not touched while the reader lives.
    let mut reader = unsafe { RequestReader::from_ranges(&ranges) };
    let mut file = file_with(b"");
    assert_eq!(
        reader.write_to_file_at(file.as_fd(), usize::MAX, 0, false),
        Ok(count * 3)
    );
    assert_eq!(content_of(&mut file), expected);
}

#[test]
fn rewound_reply_has_no_body() {
    let mut bytes = [0; HEADER_BYTES + 8];
    let mut writer = ReplyWriter::from_bytes(&mut bytes);
    writer.write(b"12345678").unwrap();
    writer.rewind();
    assert_eq!(writer.written(), 0);
    assert_eq!(writer.room(), 8);
}
