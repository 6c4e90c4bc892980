//! The zero page: what the kernel is told in place of what firmware would tell
//! (Documentation/arch/x86/zero-page.rst).

use crate::layout::CMDLINE_BYTES_MAX;
use crate::layout::CMDLINE_GPA;
use crate::layout::HIGH_RAM_START;
use crate::layout::LOW_RAM_END;
use crate::memory::Memory;

/// Where the initrd is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Initrd {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// `struct boot_params`.
const BOOT_PARAMS_BYTES: usize = 4096;

/// Offsets in it.
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE: usize = 0x228;
const COMMAND_LINE_SIZE: usize = 0x238;
const E820_TABLE: usize = 0x2d0;

const BOOT_FLAG_MAGIC: u16 = 0xaa55;
const HEADER_MAGIC: &[u8; 4] = b"HdrS";
/// Of the protocol: 2.15.
const PROTOCOL_VERSION: u16 = 0x020f;
/// A loader that has no number of its own.
const LOADER_OTHER: u8 = 0xff;
/// The kernel is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

const E820_RAM: u32 = 1;

/// The page for a machine with this memory and initrd.
pub(super) fn boot_params(memory: &Memory, initrd: Initrd) -> Vec<u8> {
    let mut page = vec![0; BOOT_PARAMS_BYTES];
    put(&mut page, BOOT_FLAG, &BOOT_FLAG_MAGIC.to_le_bytes());
    put(&mut page, HEADER, HEADER_MAGIC);
    put(&mut page, VERSION, &PROTOCOL_VERSION.to_le_bytes());
    put(&mut page, TYPE_OF_LOADER, &[LOADER_OTHER]);
    put(&mut page, LOAD_FLAGS, &[LOADED_HIGH]);
    // All of these are below the hole, which is in the first 4 GiB.
    put_u32(&mut page, RAMDISK_IMAGE, initrd.start);
    put_u32(&mut page, RAMDISK_SIZE, initrd.bytes);
    put_u32(&mut page, COMMAND_LINE, CMDLINE_GPA);
    put_u32(&mut page, COMMAND_LINE_SIZE, CMDLINE_BYTES_MAX - 1);
    let map = memory_map(memory);
    let entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    put(&mut page, E820_ENTRIES, &[entries]);
    let map: Vec<u8> = map.into_iter().flatten().collect();
    put(&mut page, E820_TABLE, &map);
    page
}

/// The RAM, without the hole of the PC between 640 KiB and 1 MiB.
fn memory_map(memory: &Memory) -> Vec<[u8; 20]> {
    let low_end = memory.low_end();
    let mut map = vec![entry(0, LOW_RAM_END.min(low_end))];
    if low_end > HIGH_RAM_START {
        map.push(entry(HIGH_RAM_START, low_end));
    }
    map.extend(
        memory
            .ranges()
            .skip(1)
            .map(|(start, end)| entry(start, end)),
    );
    map
}

/// `struct boot_e820_entry`.
fn entry(start: u64, end: u64) -> [u8; 20] {
    let mut entry = [0; 20];
    entry[..8].copy_from_slice(&start.to_le_bytes());
    entry[8..16].copy_from_slice(&(end - start).to_le_bytes());
    entry[16..].copy_from_slice(&E820_RAM.to_le_bytes());
    entry
}

fn put(page: &mut [u8], offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn put_u32(page: &mut [u8], offset: usize, value: u64) {
    let value = u32::try_from(value).unwrap_or(u32::MAX);
    put(page, offset, &value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::bootparam::boot_params as BootParams;
    use std::mem::offset_of;

    use super::*;
    use crate::layout::HOLE_END;
    use crate::layout::HOLE_START;
    use crate::layout::PAGE_BYTES;

    #[test]
    fn offsets_are_those_of_the_header() {
        use linux_loader::loader::bootparam::setup_header as Header;
        let header = offset_of!(BootParams, hdr);

        assert_eq!(E820_ENTRIES, offset_of!(BootParams, e820_entries));
        assert_eq!(E820_TABLE, offset_of!(BootParams, e820_table));
        assert_eq!(BOOT_FLAG, header + offset_of!(Header, boot_flag));
        assert_eq!(HEADER, header + offset_of!(Header, header));
        assert_eq!(VERSION, header + offset_of!(Header, version));
        assert_eq!(TYPE_OF_LOADER, header + offset_of!(Header, type_of_loader));
        assert_eq!(LOAD_FLAGS, header + offset_of!(Header, loadflags));
        assert_eq!(RAMDISK_IMAGE, header + offset_of!(Header, ramdisk_image));
        assert_eq!(RAMDISK_SIZE, header + offset_of!(Header, ramdisk_size));
        assert_eq!(COMMAND_LINE, header + offset_of!(Header, cmd_line_ptr));
        assert_eq!(COMMAND_LINE_SIZE, header + offset_of!(Header, cmdline_size));
    }

    #[test]
    fn the_map_leaves_out_both_holes() {
        let memory = Memory::map(HOLE_START + PAGE_BYTES).unwrap();

        let map = memory_map(&memory);

        assert_eq!(
            map,
            [
                entry(0, LOW_RAM_END),
                entry(HIGH_RAM_START, HOLE_START),
                entry(HOLE_END, HOLE_END + PAGE_BYTES),
            ]
        );
    }

    #[test]
    fn a_tiny_memory_has_one_entry() {
        let memory = Memory::map(HIGH_RAM_START).unwrap();

        assert_eq!(memory_map(&memory), [entry(0, LOW_RAM_END)]);
    }

    #[test]
    fn the_page_names_the_initrd() {
        let memory = Memory::map(2 << 20).unwrap();
        let initrd = Initrd {
            start: 0x1f_0000,
            bytes: 0x1234,
        };

        let page = boot_params(&memory, initrd);

        assert_eq!(page[RAMDISK_IMAGE..][..4], 0x1f_0000_u32.to_le_bytes());
        assert_eq!(page[RAMDISK_SIZE..][..4], 0x1234_u32.to_le_bytes());
        assert_eq!(page[E820_ENTRIES], 2);
    }
}
