//! Loading a kernel: an ELF64 executable for x86-64 (System V ABI, chapters 4 and 5).
//!
//! The file belongs to whoever installed Husk, but a wrong one must be an error and nothing else:
//! every number in it is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::GuestAddress;

use crate::layout::HIGH_RAM_START;
use crate::memory::Memory;

/// Why a file is not a kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file can't be read.
    #[error("cannot read the {what}")]
    Read {
        /// Which part.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error("it is not an ELF executable of 64 bits for x86-64, but {what}")]
    Kind {
        /// What differs.
        what: &'static str,
    },
    /// The table of segments is none.
    #[error("its program headers are not what ELF says: {what}")]
    Headers {
        /// What differs.
        what: &'static str,
    },
    /// A segment does not fit.
    #[error("its segment at {start:#x} of {bytes} bytes does not fit into guest memory")]
    Segment {
        /// Where it wants to be.
        start: u64,
        /// How much it wants.
        bytes: u64,
    },
    /// There is nothing to start at.
    #[error("its entry point {entry:#x} is in none of its segments")]
    Entry {
        /// The address.
        entry: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Its first instruction.
    pub(super) entry: u64,
    /// The first address behind it.
    pub(super) end: u64,
}

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Linux has half a dozen.
const PROGRAM_HEADERS_MAX: u16 = 64;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

/// Loads all segments to the physical addresses they name.
pub(super) fn load(memory: &Memory, file: &File) -> Result<Kernel, KernelError> {
    let (entry, headers) = read_headers(file)?;
    let mut end = HIGH_RAM_START;
    let mut has_entry = false;
    for header in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        if u32_at(header, 0) != SEGMENT_LOAD {
            continue;
        }
        let segment = load_segment(memory, file, header)?;
        has_entry |= segment.contains(&entry);
        end = end.max(segment.end);
    }
    if !has_entry {
        return Err(KernelError::Entry { entry });
    }
    Ok(Kernel { entry, end })
}

/// The entry point, and the table of program headers.
fn read_headers(file: &File) -> Result<(u64, Vec<u8>), KernelError> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)
        .map_err(|source| KernelError::Read {
            what: "ELF header",
            source,
        })?;
    check_kind(&header)?;
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_BYTES {
        return Err(KernelError::Headers {
            what: "they have another size",
        });
    }
    if count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(KernelError::Headers {
            what: "there are none, or too many",
        });
    }
    let mut headers = vec![0; usize::from(count) * PROGRAM_HEADER_BYTES];
    file.read_exact_at(&mut headers, u64_at(&header, 32))
        .map_err(|source| KernelError::Read {
            what: "program headers",
            source,
        })?;
    Ok((u64_at(&header, 24), headers))
}

fn check_kind(header: &[u8; HEADER_BYTES]) -> Result<(), KernelError> {
    let what = if !header.starts_with(b"\x7fELF") {
        "has no ELF signature"
    } else if header[4] != CLASS_64 {
        "is not of 64 bits"
    } else if header[5] != LITTLE_ENDIAN {
        "is big-endian"
    } else if u16_at(header, 16) != TYPE_EXECUTABLE {
        "is not an executable"
    } else if u16_at(header, 18) != MACHINE_X86_64 {
        "is for another processor"
    } else {
        return Ok(());
    };
    Err(KernelError::Kind { what })
}

/// Loads one segment and returns where it is.
fn load_segment(
    memory: &Memory,
    file: &File,
    header: &[u8],
) -> Result<std::ops::Range<u64>, KernelError> {
    let offset = u64_at(header, 8);
    let start = u64_at(header, 24);
    let file_bytes = u64_at(header, 32);
    let bytes = u64_at(header, 40);
    // What is not in the file is zero, as fresh memory is.
    let range = start
        .checked_add(bytes)
        .filter(|end| start >= HIGH_RAM_START && *end <= memory.low_end() && file_bytes <= bytes)
        .map(|end| start..end)
        .ok_or(KernelError::Segment { start, bytes })?;
    memory
        .load_file(file, offset, GuestAddress(start), file_bytes)
        .map_err(|source| KernelError::Read {
            what: "segments",
            source,
        })?;
    Ok(range)
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

/// The bytes at an offset that is a constant of ours and lies within the header.
fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[offset..offset + N]);
    array
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    const MEMORY_BYTES: u64 = 4 << 20;

    /// An ELF file with one segment of four bytes at 2 MiB, changed by `edit`.
    fn load_edited(edit: impl FnOnce(&mut Vec<u8>)) -> Result<(Kernel, Memory), KernelError> {
        let mut image = vec![0; HEADER_BYTES + PROGRAM_HEADER_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &TYPE_EXECUTABLE.to_le_bytes());
        put(18, &MACHINE_X86_64.to_le_bytes());
        put(24, &(2_u64 << 20).to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &1_u16.to_le_bytes());
        put(64, &SEGMENT_LOAD.to_le_bytes());
        put(64 + 8, &120_u64.to_le_bytes());
        put(64 + 24, &(2_u64 << 20).to_le_bytes());
        put(64 + 32, &4_u64.to_le_bytes());
        put(64 + 40, &4096_u64.to_le_bytes());
        image.extend(b"code");
        edit(&mut image);
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&image).unwrap();
        let memory = Memory::map(MEMORY_BYTES).unwrap();
        load(&memory, &file).map(|kernel| (kernel, memory))
    }

    fn load_with(offset: usize, bytes: &[u8]) -> Result<(Kernel, Memory), KernelError> {
        load_edited(|image| image[offset..offset + bytes.len()].copy_from_slice(bytes))
    }

    #[test]
    fn files_of_another_kind_are_refused() {
        let changes: [(usize, &[u8]); 5] =
            [(0, b"MZ"), (4, &[1]), (5, &[2]), (16, &[3]), (18, &[183])];
        for (offset, bytes) in changes {
            let loaded = load_with(offset, bytes);

            assert!(matches!(loaded, Err(KernelError::Kind { .. })), "{offset}");
        }
    }

    #[test]
    fn an_empty_file_is_refused() {
        let loaded = load_edited(Vec::clear);

        assert!(matches!(loaded, Err(KernelError::Read { .. })));
    }

    #[test]
    fn wrong_tables_of_segments_are_refused() {
        for (offset, value) in [(54, 32_u16), (56, 0), (56, 65)] {
            let loaded = load_with(offset, &value.to_le_bytes());

            assert!(matches!(loaded, Err(KernelError::Headers { .. })));
        }
    }

    #[test]
    fn a_table_outside_of_the_file_is_refused() {
        for offset in [200, u64::MAX, u64::MAX / 2] {
            let loaded = load_with(32, &offset.to_le_bytes());

            assert!(matches!(loaded, Err(KernelError::Read { .. })));
        }
    }

    #[test]
    fn segments_outside_of_memory_are_refused() {
        for start in [0, HIGH_RAM_START - 1, MEMORY_BYTES - 1, u64::MAX - 4] {
            let loaded = load_with(64 + 24, &start.to_le_bytes());

            assert!(
                matches!(loaded, Err(KernelError::Segment { .. })),
                "{start}"
            );
        }
    }

    #[test]
    fn a_segment_with_more_in_the_file_than_in_memory_is_refused() {
        let loaded = load_with(64 + 40, &3_u64.to_le_bytes());

        assert!(matches!(loaded, Err(KernelError::Segment { .. })));
    }

    #[test]
    fn a_segment_that_the_file_does_not_hold_is_refused() {
        for offset in [121, u64::MAX] {
            let loaded = load_with(64 + 8, &offset.to_le_bytes());

            assert!(matches!(loaded, Err(KernelError::Read { .. })));
        }
    }

    #[test]
    fn an_entry_outside_of_the_segments_is_refused() {
        let loaded = load_with(24, &(1_u64 << 20).to_le_bytes());

        assert!(matches!(loaded, Err(KernelError::Entry { .. })));
    }

    #[test]
    fn a_kernel_is_loaded_where_it_says() {
        let (kernel, memory) = load_edited(|_| {}).unwrap();

        assert_eq!(kernel.entry, 2 << 20);
        assert_eq!(kernel.end, (2 << 20) + 4096);
        let mut code = [0; 5];
        memory
            .mmap()
            .read_slice(&mut code, GuestAddress(2 << 20))
            .unwrap();
        assert_eq!(&code, b"code\0");
    }
}
