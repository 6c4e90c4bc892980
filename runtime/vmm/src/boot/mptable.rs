//! The MP table: processors and interrupt lines for a kernel without ACPI
//! (MultiProcessor Specification 1.4, chapter 4).

use crate::layout::IO_APIC_GPA;
use crate::layout::IRQ_LAST;
use crate::layout::LOCAL_APIC_GPA;
use crate::layout::MP_TABLE_BYTES_MAX;
use crate::layout::MP_TABLE_GPA;

/// Of the specification: 1.4.
const SPEC_REVISION: u8 = 4;
/// What KVM's interrupt controllers say of themselves.
const APIC_VERSION: u8 = 0x14;

const FLOATING_POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
const PROCESSOR_BYTES: usize = 20;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1 << 0;
const PROCESSOR_BOOTS: u8 = 1 << 1;
const IO_APIC_USABLE: u8 = 1;

const BUS_ISA: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

const _: () = {
    // A processor entry for each value of a byte and a dozen smaller ones have room.
    let entries = 256 * PROCESSOR_BYTES + 64 * 8;
    assert!((FLOATING_POINTER_BYTES + HEADER_BYTES + entries) as u64 <= MP_TABLE_BYTES_MAX);
};

/// The floating pointer, and behind it the table it points to.
pub(super) fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        add(&processor(id));
    }
    add(&[ENTRY_BUS, BUS_ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    // Any id that no processor has.
    let io_apic_id = vcpus;
    add(&io_apic(io_apic_id));
    for irq in (0..=IRQ_LAST).filter_map(|irq| u8::try_from(irq).ok()) {
        // Flags zero: as usual on the bus, which for ISA is edge-triggered, active high.
        add(&[
            ENTRY_IO_INTERRUPT,
            INTERRUPT_VECTORED,
            0,
            0,
            BUS_ISA,
            irq,
            io_apic_id,
            irq,
        ]);
    }
    // LINT0 of the boot CPU, LINT1 of all.
    add(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_EXTINT,
        0,
        0,
        BUS_ISA,
        0,
        0,
        0,
    ]);
    let nmi = [INTERRUPT_NMI, 0, 0, BUS_ISA, 0, ALL_LOCAL_APICS, 1];
    add(&[[ENTRY_LOCAL_INTERRUPT].as_slice(), &nmi].concat());

    let mut bytes = floating_pointer().to_vec();
    bytes.extend(header(&entries, count));
    bytes.extend(entries);
    bytes
}

fn floating_pointer() -> [u8; FLOATING_POINTER_BYTES] {
    let table = MP_TABLE_GPA + FLOATING_POINTER_BYTES as u64;
    let mut pointer = [0; FLOATING_POINTER_BYTES];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&low_u32(table));
    // Length in units of 16 bytes.
    pointer[8] = 1;
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&pointer);
    pointer
}

fn header(entries: &[u8], count: u16) -> [u8; HEADER_BYTES] {
    let length = u16::try_from(HEADER_BYTES + entries.len()).unwrap_or(u16::MAX);
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&length.to_le_bytes());
    header[6] = SPEC_REVISION;
    header[8..16].copy_from_slice(b"HUSK    ");
    header[16..28].copy_from_slice(b"VM          ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&low_u32(LOCAL_APIC_GPA));
    header[7] = checksum(&[header.as_slice(), entries].concat());
    header
}

fn processor(id: u8) -> [u8; PROCESSOR_BYTES] {
    /// Family 6; Linux reads the real one from CPUID.
    const SIGNATURE: u32 = 0x600;
    /// FPU, and a local APIC.
    const FEATURES: u32 = 0x201;
    let boots = if id == 0 { PROCESSOR_BOOTS } else { 0 };
    let mut entry = [0; PROCESSOR_BYTES];
    entry[0] = ENTRY_PROCESSOR;
    entry[1] = id;
    entry[2] = APIC_VERSION;
    entry[3] = PROCESSOR_ENABLED | boots;
    entry[4..8].copy_from_slice(&SIGNATURE.to_le_bytes());
    entry[8..12].copy_from_slice(&FEATURES.to_le_bytes());
    entry
}

fn io_apic(id: u8) -> [u8; 8] {
    let [a, b, c, d] = low_u32(IO_APIC_GPA);
    [ENTRY_IO_APIC, id, APIC_VERSION, IO_APIC_USABLE, a, b, c, d]
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// An address below 4 GiB, as all in [`crate::layout`] that concern us.
fn low_u32(address: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = address.to_le_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_parts_sum_to_zero() {
        for vcpus in [1, 2, 64, 255] {
            let table = table(vcpus);
            let (pointer, table) = table.split_at(FLOATING_POINTER_BYTES);

            assert_eq!((sum(pointer), sum(table)), (0, 0), "{vcpus} vCPUs");
        }
    }

    #[test]
    fn the_length_is_that_of_the_table() {
        let bytes = table(3);
        let table = &bytes[FLOATING_POINTER_BYTES..];

        let length = u16::from_le_bytes([table[4], table[5]]);

        assert_eq!(usize::from(length), table.len());
    }

    #[test]
    fn the_count_is_that_of_the_entries() {
        let bytes = table(3);
        let table = &bytes[FLOATING_POINTER_BYTES..];
        let count = u16::from_le_bytes([table[34], table[35]]);

        let mut rest = &table[HEADER_BYTES..];
        let mut found = 0;
        while let Some(kind) = rest.first() {
            let bytes = if *kind == ENTRY_PROCESSOR {
                PROCESSOR_BYTES
            } else {
                8
            };
            rest = &rest[bytes..];
            found += 1;
        }

        assert_eq!(count, found);
    }

    #[test]
    fn only_the_first_processor_boots() {
        let bytes = table(2);
        let flags =
            |id: usize| bytes[FLOATING_POINTER_BYTES + HEADER_BYTES + id * PROCESSOR_BYTES + 3];

        assert_eq!(flags(0), PROCESSOR_ENABLED | PROCESSOR_BOOTS);
        assert_eq!(flags(1), PROCESSOR_ENABLED);
    }
}
