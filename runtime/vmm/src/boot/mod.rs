//! What is in memory when the guest begins, as Linux's 64-bit boot protocol asks for it
//! (Documentation/arch/x86/boot.rst, 1.14): kernel, initrd, command line, boot parameters, page
//! tables, segment descriptors; and the MP table, which tells of processors and interrupt lines.

mod cmdline;
mod elf;
mod mptable;
mod params;

use std::fs::File;
use std::io;

use vm_memory::Bytes;
use vm_memory::GuestAddress;

use crate::layout::CMDLINE_BYTES_MAX;
use crate::layout::CMDLINE_GPA;
use crate::layout::GDT_GPA;
use crate::layout::PAGE_BYTES;
use crate::layout::PAGE_TABLES_GPA;
use crate::memory::Memory;

pub(crate) use cmdline::device_command_line;
pub use elf::KernelError;
pub(crate) use params::Initrd;

/// Why the guest has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is not one.
    #[error("cannot load the guest kernel")]
    Kernel(#[source] KernelError),
    /// The initrd can't be read.
    #[error("cannot read the initrd")]
    ReadInitrd(#[source] io::Error),
    /// The initrd does not fit behind the kernel.
    #[error("the initrd of {bytes} bytes does not fit into guest memory behind the kernel")]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {bytes} bytes, more than {CMDLINE_BYTES_MAX}")]
    CommandLineTooLong {
        /// Its length with the closing zero.
        bytes: usize,
    },
    /// The command line can't be one.
    #[error("the kernel command line holds a zero byte or a line break")]
    CommandLineText,
    /// A table lies outside of the guest's memory.
    #[error("guest memory is too small for the {what}")]
    Table {
        /// Which one.
        what: &'static str,
        /// What vm-memory says.
        source: vm_memory::GuestMemoryError,
    },
}

/// Puts everything in place. Returns the address of the kernel's first instruction.
pub(crate) fn load(
    memory: &Memory,
    kernel: &File,
    initrd: &File,
    command_line: &str,
    vcpus: u8,
) -> Result<u64, BootError> {
    let kernel = elf::load(memory, kernel).map_err(BootError::Kernel)?;
    let initrd = load_initrd(memory, initrd, kernel.end)?;
    write_command_line(memory, command_line)?;
    write(
        memory,
        "MP table",
        crate::layout::MP_TABLE_GPA,
        &mptable::table(vcpus),
    )?;
    let params = params::boot_params(memory, initrd);
    write(
        memory,
        "boot parameters",
        crate::layout::BOOT_PARAMS_GPA,
        &params,
    )?;
    write(memory, "page tables", PAGE_TABLES_GPA, &page_tables())?;
    write(memory, "segment descriptors", GDT_GPA, &descriptor_table())?;
    Ok(kernel.entry)
}

fn write(memory: &Memory, what: &'static str, start: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .mmap()
        .write_slice(bytes, GuestAddress(start))
        .map_err(|source| BootError::Table { what, source })
}

/// Loads the initrd to the end of low memory, where it is least in the way.
fn load_initrd(memory: &Memory, initrd: &File, kernel_end: u64) -> Result<Initrd, BootError> {
    let bytes = initrd.metadata().map_err(BootError::ReadInitrd)?.len();
    let start = memory
        .low_end()
        .checked_sub(bytes)
        .map(|start| start - start % PAGE_BYTES)
        .filter(|start| *start >= kernel_end)
        .ok_or(BootError::InitrdTooLarge { bytes })?;
    memory
        .load_file(initrd, 0, GuestAddress(start), bytes)
        .map_err(BootError::ReadInitrd)?;
    Ok(Initrd { start, bytes })
}

fn write_command_line(memory: &Memory, command_line: &str) -> Result<(), BootError> {
    if command_line.contains(['\0', '\n']) {
        return Err(BootError::CommandLineText);
    }
    let mut bytes = command_line.as_bytes().to_vec();
    bytes.push(0);
    if bytes.len() as u64 > CMDLINE_BYTES_MAX {
        return Err(BootError::CommandLineTooLong { bytes: bytes.len() });
    }
    write(memory, "command line", CMDLINE_GPA, &bytes)
}

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
/// In a page directory: the entry is a page of 2 MiB.
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: usize = 512;

/// Three tables, one after the other: they map the first GiB to itself.
fn page_tables() -> Vec<u8> {
    let table = PAGE_PRESENT | PAGE_WRITABLE;
    let mut entries = vec![0_u64; 2 * ENTRIES];
    entries[0] = (PAGE_TABLES_GPA + PAGE_BYTES) | table;
    entries[ENTRIES] = (PAGE_TABLES_GPA + 2 * PAGE_BYTES) | table;
    entries.extend(
        (0..)
            .take(ENTRIES)
            .map(|page: u64| (page * LARGE_PAGE_BYTES) | PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE),
    );
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// A flat segment of the boot CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    /// Its place in the descriptor table.
    pub(crate) selector: u16,
    /// The processor's type code.
    pub(crate) kind: u8,
    pub(crate) is_code_or_data: bool,
    pub(crate) is_64_bit: bool,
}

/// Code, data, task. The protocol wants code at 0x10 and data at 0x18, both flat.
pub(crate) const BOOT_SEGMENTS: [Segment; 3] = [
    Segment {
        selector: 0x10,
        // Code: executable, readable, accessed.
        kind: 0xb,
        is_code_or_data: true,
        is_64_bit: true,
    },
    Segment {
        selector: 0x18,
        // Data: writable, accessed.
        kind: 0x3,
        is_code_or_data: true,
        is_64_bit: false,
    },
    Segment {
        selector: 0x8,
        // A task that is busy, as the processor insists on.
        kind: 0xb,
        is_code_or_data: false,
        is_64_bit: false,
    },
];

/// The segments as descriptors. The task has a descriptor of twice the size, of which only the
/// first half matters here: it would be loaded again only by an instruction nobody uses.
fn descriptor_table() -> Vec<u8> {
    const PRESENT: u64 = 1 << 47;
    const CODE_OR_DATA: u64 = 1 << 44;
    const LONG: u64 = 1 << 53;
    const GRANULARITY: u64 = 1 << 55;
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    let mut table = [0_u64; 4];
    for segment in BOOT_SEGMENTS {
        let mut descriptor = PRESENT | LIMIT | (u64::from(segment.kind) << 40);
        if segment.is_code_or_data {
            descriptor |= CODE_OR_DATA | GRANULARITY;
        }
        if segment.is_64_bit {
            descriptor |= LONG;
        }
        table[usize::from(segment.selector) / size_of::<u64>()] = descriptor;
    }
    table.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::layout::GDT_END;
    use crate::layout::PAGE_TABLES_END;

    #[test]
    fn tables_fill_their_places() {
        assert_eq!(
            page_tables().len() as u64,
            PAGE_TABLES_END - PAGE_TABLES_GPA
        );
        assert_eq!(descriptor_table().len() as u64, GDT_END - GDT_GPA);
    }

    #[test]
    fn descriptors_are_those_of_the_protocol() {
        let table = descriptor_table();
        let descriptor =
            |selector: usize| u64::from_le_bytes(table[selector..selector + 8].try_into().unwrap());

        assert_eq!(descriptor(0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(0x18), 0x008f_9300_0000_ffff);
    }

    #[test]
    fn a_command_line_that_is_too_long_is_refused() {
        let memory = Memory::map(1 << 20).unwrap();
        let longest = "x".repeat(usize::try_from(CMDLINE_BYTES_MAX).unwrap() - 1);

        let longer = write_command_line(&memory, &format!("{longest}x"));

        assert!(matches!(longer, Err(BootError::CommandLineTooLong { .. })));
        write_command_line(&memory, &longest).unwrap();
    }

    #[test]
    fn a_command_line_of_two_lines_is_refused() {
        let memory = Memory::map(1 << 20).unwrap();

        let written = write_command_line(&memory, "quiet\nrdinit=/bin/sh");

        assert!(matches!(written, Err(BootError::CommandLineText)));
    }

    #[test]
    fn an_initrd_that_would_cover_the_kernel_is_refused() {
        let memory = Memory::map(4 << 20).unwrap();
        let initrd = file_of(&[7; 8192]);

        let loaded = load_initrd(&memory, &initrd, (4 << 20) - 4096);

        assert!(matches!(
            loaded,
            Err(BootError::InitrdTooLarge { bytes: 8192 })
        ));
    }

    #[test]
    fn an_initrd_larger_than_memory_is_refused() {
        let memory = Memory::map(8192).unwrap();
        let initrd = file_of(&[7; 8193]);

        let loaded = load_initrd(&memory, &initrd, 0);

        assert!(matches!(loaded, Err(BootError::InitrdTooLarge { .. })));
    }

    #[test]
    fn the_initrd_is_at_the_end_of_low_memory() {
        let memory = Memory::map(4 << 20).unwrap();
        let initrd = file_of(&[7; 5000]);

        let loaded = load_initrd(&memory, &initrd, 1 << 20).unwrap();

        assert_eq!((loaded.start, loaded.bytes), ((4 << 20) - 8192, 5000));
        let byte: u8 = memory
            .mmap()
            .read_obj(GuestAddress(loaded.start + 4999))
            .unwrap();
        assert_eq!(byte, 7);
    }

    fn file_of(bytes: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file
    }
}
