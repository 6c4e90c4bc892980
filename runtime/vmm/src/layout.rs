//! Where things are in the guest's physical address space.
//!
//! | from | to | what |
//! |---|---|---|
//! | 0 | 640 KiB | RAM: the tables of the boot protocol, the command line |
//! | 960 KiB | 1 MiB | MP table, where the kernel looks for one; not offered as RAM |
//! | 1 MiB | 3 GiB at most | RAM: kernel, initrd at the end |
//! | 3 GiB | 4 GiB | no RAM: device registers, interrupt controllers, KVM's own pages |
//! | 4 GiB | | the rest of the RAM; behind it what RAM may grow into |

/// Smallest unit of everything here.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// The segment descriptors of the boot CPU (Linux x86 boot protocol, 1.14).
pub(crate) const GDT_GPA: u64 = 0x500;
/// The segment descriptors end here.
pub(crate) const GDT_END: u64 = 0x520;
/// `struct boot_params`, also called the zero page.
pub(crate) const BOOT_PARAMS_GPA: u64 = 0x7000;
/// Stack of the boot CPU; it grows down from here.
pub(crate) const STACK_TOP_GPA: u64 = 0x9000;
/// First of three pages of page tables that map the first GiB to itself.
pub(crate) const PAGE_TABLES_GPA: u64 = 0x9000;
/// The page tables end here.
pub(crate) const PAGE_TABLES_END: u64 = PAGE_TABLES_GPA + 3 * PAGE_BYTES;
/// The kernel's command line.
pub(crate) const CMDLINE_GPA: u64 = 0x2_0000;
/// Longest command line with its closing zero: `COMMAND_LINE_SIZE` of Linux on x86.
pub(crate) const CMDLINE_BYTES_MAX: u64 = 2048;

/// End of the RAM below the hole of the PC.
pub(crate) const LOW_RAM_END: u64 = 0xa_0000;
/// The MP table. Linux searches 0xf0000 to 0xfffff for its signature.
pub(crate) const MP_TABLE_GPA: u64 = 0xf_0000;
/// Most bytes an MP table may have.
pub(crate) const MP_TABLE_BYTES_MAX: u64 = 0x1_0000;
/// RAM goes on here, and kernels may be loaded from here on.
pub(crate) const HIGH_RAM_START: u64 = 0x10_0000;

/// RAM ends here and goes on at [`HOLE_END`].
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// End of the 32-bit address space.
pub(crate) const HOLE_END: u64 = 0x1_0000_0000;

/// Registers of the first device; the others follow.
pub(crate) const MMIO_GPA: u64 = 0xd000_0000;
/// Register space of each device.
pub(crate) const MMIO_BYTES: u64 = PAGE_BYTES;
/// Interrupt line of the first device; the others follow, see [`irq_of`]. Lower ones are taken on
/// every PC.
pub(crate) const IRQ_FIRST: u32 = 5;
/// Last input of KVM's I/O APIC.
pub(crate) const IRQ_LAST: u32 = 23;
/// Most devices a machine can have. The command line must have room for all of them.
pub(crate) const DEVICES_MAX: usize = 32;

/// The interrupt line of a device. Those for whom there is none left share the last one: their drivers
/// look whether it was their device that rang.
pub(crate) fn irq_of(index: usize) -> u32 {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    IRQ_FIRST.saturating_add(index).min(IRQ_LAST)
}

/// Registers of the I/O APIC.
pub(crate) const IO_APIC_GPA: u64 = 0xfec0_0000;
/// Registers of the local APIC.
pub(crate) const LOCAL_APIC_GPA: u64 = 0xfee0_0000;
/// A page KVM needs on Intel, directly below its task state segment.
pub(crate) const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel.
pub(crate) const TSS_GPA: u64 = 0xfffb_d000;

const _: () = {
    assert!(GDT_GPA < GDT_END && GDT_END <= BOOT_PARAMS_GPA);
    // The stack has what is left of the page above the boot parameters.
    assert!(BOOT_PARAMS_GPA + PAGE_BYTES < STACK_TOP_GPA);
    assert!(STACK_TOP_GPA <= PAGE_TABLES_GPA);
    assert!(PAGE_TABLES_GPA.is_multiple_of(PAGE_BYTES));
    assert!(PAGE_TABLES_END <= CMDLINE_GPA);
    assert!(CMDLINE_GPA + CMDLINE_BYTES_MAX <= LOW_RAM_END);
    assert!(LOW_RAM_END <= MP_TABLE_GPA);
    assert!(MP_TABLE_GPA + MP_TABLE_BYTES_MAX <= HIGH_RAM_START);
    assert!(HIGH_RAM_START < HOLE_START && HOLE_START < HOLE_END);
    assert!(HOLE_START <= MMIO_GPA);
    assert!(MMIO_GPA + MMIO_BYTES * DEVICES_MAX as u64 <= IO_APIC_GPA);
    assert!(IO_APIC_GPA + PAGE_BYTES <= LOCAL_APIC_GPA);
    assert!(LOCAL_APIC_GPA + PAGE_BYTES <= IDENTITY_MAP_GPA);
    assert!(IDENTITY_MAP_GPA + PAGE_BYTES <= TSS_GPA);
    assert!(TSS_GPA + 3 * PAGE_BYTES <= HOLE_END);
};
