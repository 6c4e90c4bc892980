//! The guest's RAM.
//!
//! Anonymous memory that the host provides page by page as the guest touches it. Behind what the guest
//! boots with there may be more, which it is given while it runs. This is one of the modules that
//! allow unsafe code: KVM is told host addresses.

mod region;

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_MEM_READONLY;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::Advice;
use rustix::mm::MprotectFlags;
use rustix::mm::madvise;
use rustix::mm::mprotect;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestRegionMmap;
use vm_memory::MemoryRegionAddress;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory;
use vm_memory::VolatileSlice;
use vm_memory::mmap::MmapRegionError;

use crate::layout::HOLE_END;
use crate::layout::HOLE_START;
use crate::layout::PAGE_BYTES;

pub use region::GuestRam;
pub use region::Region;
#[cfg(test)]
pub(crate) use region::from_ranges;

/// All of the guest's RAM.
#[derive(Clone)]
pub(crate) struct Memory {
    ram: Arc<GuestRam>,
    growth: Option<Growth>,
}

/// Where the guest's RAM goes on while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Growth {
    /// First byte, behind all other RAM, at a multiple of `unit_bytes`.
    pub(crate) start: u64,
    /// Most bytes of it that the guest may have.
    pub(crate) bytes_max: u64,
    /// The guest is given whole ones: its kernel can't take parts of them.
    pub(crate) unit_bytes: u64,
}

impl Growth {
    /// That of a machine which boots with `bytes` and may have `bytes_max`, if that is more.
    pub(crate) fn of(bytes: u64, bytes_max: u64) -> Option<Self> {
        let more = bytes_max.checked_sub(bytes).filter(|more| *more > 0)?;
        let end = HOLE_END.checked_add(bytes.saturating_sub(HOLE_START))?;
        // Linux on x86 (probe_memory_block_size): blocks of 128 MiB, in a guest of 64 GiB or more up
        // to 2 GiB.
        let unit_bytes = match end < BIG_MACHINE_BYTES {
            true => SMALL_UNIT_BYTES,
            false => BIG_UNIT_BYTES,
        };
        Some(Self {
            start: end.checked_next_multiple_of(unit_bytes)?,
            bytes_max: more,
            unit_bytes,
        })
    }

    /// Its address space: whole units.
    pub(crate) fn region_bytes(&self) -> u64 {
        self.units_of(self.bytes_max)
    }

    /// What has to be given for `bytes` to be used.
    pub(crate) fn units_of(&self, bytes: u64) -> u64 {
        bytes
            .div_ceil(self.unit_bytes)
            .saturating_mul(self.unit_bytes)
    }
}

const SMALL_UNIT_BYTES: u64 = 128 << 20;
const BIG_UNIT_BYTES: u64 = 2 << 30;
const BIG_MACHINE_BYTES: u64 = 64 << 30;

/// Why the guest has no RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size can't be had.
    #[error("guest memory of {bytes} bytes is not a positive number of pages")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host refused.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Size of the region.
        bytes: u64,
        /// Why.
        source: MmapRegionError,
    },
    /// KVM refused a region.
    #[error("cannot give the guest the memory at {start:#x}")]
    Register {
        /// Its guest physical address.
        start: u64,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// The machine was made to have no more than it booted with.
    #[error("guest memory can grow by {bytes_max} bytes, not by {bytes}")]
    Growth {
        /// What was asked for.
        bytes: u64,
        /// The most it could be.
        bytes_max: u64,
    },
    /// The host has no room for more.
    #[error("the host does not provide {bytes} bytes more of guest memory")]
    Provide {
        /// What was asked for.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
}

impl Memory {
    /// Maps `bytes` of RAM, in one region below the hole and one above it.
    #[cfg(test)]
    pub(crate) fn map(bytes: u64) -> Result<Self, MemoryError> {
        Self::map_to_grow(bytes, None)
    }

    /// The same, and an empty region behind them to grow into. It takes nothing of the host's but
    /// addresses.
    pub(crate) fn map_to_grow(bytes: u64, growth: Option<Growth>) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Size { bytes });
        }
        let data = libc::PROT_READ | libc::PROT_WRITE;
        let below = bytes.min(HOLE_START);
        let above = bytes.saturating_sub(below);
        let mut regions = vec![Region::whole(map_region(0, below, data)?)];
        if above > 0 {
            regions.push(Region::whole(map_region(HOLE_END, above, data)?));
        }
        if let Some(growth) = growth {
            let bytes = growth.region_bytes();
            // Nobody can touch it, so that a host that accounts for all that may be touched
            // (vm.overcommit_memory) does so as it is given.
            let mapping = map_region(growth.start, bytes, libc::PROT_NONE)?;
            regions.push(Region::withheld(mapping));
        }
        Ok(Self {
            ram: Arc::new(GuestRam::of(regions)),
            growth,
        })
    }

    /// For devices.
    pub(crate) fn shared(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    /// For tables that are written in place.
    pub(crate) fn mmap(&self) -> &GuestRam {
        &self.ram
    }

    /// The regions that the guest boots with.
    fn booted(&self) -> impl Iterator<Item = &Region> {
        let growth = self.growth.map_or(u64::MAX, |growth| growth.start);
        let regions = self.ram.iter();
        regions.filter(move |region| region.start_addr().0 < growth)
    }

    /// Start and end of each region that the guest boots with.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.booted()
            .map(|region| (region.start_addr().0, region.start_addr().0 + region.len()))
    }

    /// End of the RAM below the hole.
    pub(crate) fn low_end(&self) -> u64 {
        self.ranges()
            .next()
            .map_or(0, |(_, end)| end.min(HOLE_START))
    }

    /// Makes the RAM visible to the guest. The regions stay mapped as long as `self` or a clone of
    /// it lives: keep one beside the virtual CPUs.
    pub(crate) fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, region) in (RAM_SLOT..REGISTERS_SLOT).zip(self.booted()) {
            let start = region.start_addr().0;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: region.len(),
                userspace_addr: region.mapping().as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of ours, of exactly that size, which nothing in this
            // process has a Rust reference into. The caller keeps it while the guest can run.
            let done = unsafe { vm.set_user_memory_region(slot) };
            done.map_err(|source| MemoryError::Register { start, source })?;
        }
        Ok(())
    }

    /// Lets the guest reach the first `bytes` bytes that it may grow by, and the rest of their last
    /// unit; what it could reach before it can ever after. Answers with the bytes that it can reach.
    /// As with [`Self::register`], keep `self` beside the virtual CPUs.
    pub(crate) fn give(&self, vm: &VmFd, bytes: u64) -> Result<u64, MemoryError> {
        let bytes_max = self.growth.map_or(0, |growth| growth.bytes_max);
        let (Some(growth), Some(region), true) =
            (self.growth, self.ram.iter().last(), bytes <= bytes_max)
        else {
            return Err(MemoryError::Growth { bytes, bytes_max });
        };
        let (given, wanted) = (region.len(), growth.units_of(bytes));
        if wanted <= given {
            return Ok(given);
        }
        let more = wanted - given;
        provide(region, given, more).map_err(|source| MemoryError::Provide {
            bytes: more,
            source,
        })?;
        let start = growth.start + given;
        let slot = kvm_userspace_memory_region {
            // A slot for what comes at a time, numbered by where it is: none is used twice.
            slot: GROWTH_SLOT
                .saturating_add(u32::try_from(given / growth.unit_bytes).unwrap_or(u32::MAX)),
            flags: 0,
            guest_phys_addr: start,
            memory_size: more,
            userspace_addr: region.mapping().as_ptr() as u64 + given,
        };
        // SAFETY: as in `register`; the range is a part of the mapping, as the size of the region is
        // that of the growth, of which `wanted` is no more.
        let done = unsafe { vm.set_user_memory_region(slot) };
        done.map_err(|source| MemoryError::Register { start, source })?;
        region.give(wanted);
        Ok(wanted)
    }

    /// Copies `bytes` bytes of `file`, from `offset` on, to guest memory at `start`, from a mapping of
    /// it. The kernel would copy the same for a read, but in pieces of a page, each with its own
    /// way into this process and back.
    ///
    /// A file that somebody cuts short meanwhile ends this process with SIGBUS.
    pub(crate) fn load_file(
        &self,
        file: &File,
        offset: u64,
        start: GuestAddress,
        bytes: u64,
    ) -> io::Result<()> {
        let outside = |_| io::Error::new(io::ErrorKind::InvalidInput, "not in guest memory");
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(bytes).map_err(invalid)?;
        if length == 0 {
            return Ok(());
        }
        let target = self.ram.get_slice(start, length).map_err(outside)?;
        // A page that is mapped but not in the file is a SIGBUS for whoever touches it.
        let file_bytes = file.metadata()?.len();
        if offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A mapping starts with a page.
        let surplus = offset % PAGE_BYTES;
        let skipped = usize::try_from(surplus).map_err(invalid)?;
        let view = MmapRegion::<()>::build(
            Some(FileOffset::new(file.try_clone()?, offset - surplus)),
            length
                .checked_add(skipped)
                .ok_or(io::ErrorKind::InvalidInput)?,
            libc::PROT_READ,
            libc::MAP_PRIVATE | libc::MAP_POPULATE,
        );
        let view = view.map_err(|error| match error {
            MmapRegionError::Mmap(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidInput, other),
        })?;
        let source = view.get_slice(skipped, length).map_err(io::Error::other)?;
        source.copy_to_volatile_slice(target);
        Ok(())
    }
}

/// Makes a part of what was withheld memory that can be used.
fn provide(region: &Region, start: u64, bytes: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = usize::try_from(bytes).map_err(invalid)?;
    let part = region
        .mapping()
        .get_slice(MemoryRegionAddress(start), bytes)
        .map_err(io::Error::other)?;
    let part = part.ptr_guard_mut();
    // SAFETY: the range lies in a mapping of ours that outlives the call, and nobody has used it yet.
    unsafe {
        mprotect(
            part.as_ptr().cast(),
            part.len(),
            MprotectFlags::READ | MprotectFlags::WRITE,
        )
    }?;
    Ok(())
}

/// Gives the RAM in `bytes` bytes from `start` on back to the host, all of which must be RAM and whole
/// pages. Whoever touches one of them again finds a new one, all zeros.
///
/// # Errors
/// The host refuses. Some pages may have been given back.
pub(crate) fn discard(ram: &GuestRam, start: GuestAddress, bytes: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let bytes = usize::try_from(bytes).map_err(invalid)?;
    for pages in GuestMemoryBackend::get_slices(ram, start, bytes) {
        let pages = pages.map_err(io::Error::other)?.ptr_guard_mut();
        // Of a file's pages, or shared ones, this would free nothing (madvise(2)): MADV_REMOVE would.
        // SAFETY: the pages are guest RAM, mapped as long as `ram` lives. No Rust reference points
        // there, and all who look are ready for anything: the guest may change it just as well.
        unsafe { madvise(pages.as_ptr().cast(), pages.len(), Advice::LinuxDontNeed) }?;
    }
    Ok(())
}

/// Pages that the guest reads without an exit, and can't write: what it tries to write comes to
/// this process as an access to a device does.
pub(crate) struct ReadOnlyPages {
    mapping: MmapRegion,
}

impl ReadOnlyPages {
    /// Maps that many pages of zeros.
    pub(crate) fn map(pages: usize) -> Result<Self, MemoryError> {
        let bytes = PAGE_BYTES * pages as u64;
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
        let mapping = MmapRegion::new(size).map_err(|source| MemoryError::Map { bytes, source })?;
        Ok(Self { mapping })
    }

    /// Shows them to the guest from `start` on. As with [`Memory::register`], keep them beside the
    /// virtual CPUs.
    pub(crate) fn register(&self, vm: &VmFd, start: u64) -> Result<(), MemoryError> {
        let slot = kvm_userspace_memory_region {
            slot: REGISTERS_SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: start,
            memory_size: self.mapping.size() as u64,
            userspace_addr: self.mapping.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of ours, of exactly that size, which nothing in this
        // process has a Rust reference into. The caller keeps it while the guest can run.
        let done = unsafe { vm.set_user_memory_region(slot) };
        done.map_err(|source| MemoryError::Register { start, source })
    }

    /// One of them.
    pub(crate) fn page(&self, index: usize) -> Option<VolatileSlice<'_>> {
        let bytes = usize::try_from(PAGE_BYTES).ok()?;
        self.mapping
            .get_slice(index.checked_mul(bytes)?, bytes)
            .ok()
    }
}

/// KVM's slots: RAM has one below the hole of the address space and one above it, and one for each time
/// that it grows.
const RAM_SLOT: u32 = 0;
const REGISTERS_SLOT: u32 = 2;
const GROWTH_SLOT: u32 = 3;

fn map_region(
    start: u64,
    bytes: u64,
    protection: libc::c_int,
) -> Result<GuestRegionMmap, MemoryError> {
    let size = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
    let mapping = MmapRegion::build(
        None,
        size,
        protection,
        // The guest's size is a limit, not a reservation. `discard` counts on memory that is private.
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
    )
    .map_err(|source| MemoryError::Map { bytes, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size { bytes })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn nothing_and_parts_of_pages_are_refused() {
        assert!(matches!(Memory::map(0), Err(MemoryError::Size { .. })));
        assert!(matches!(Memory::map(4097), Err(MemoryError::Size { .. })));
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        let memory = Memory::map(HOLE_START + (64 << 20)).unwrap();

        let ranges: Vec<_> = memory.ranges().collect();

        assert_eq!(ranges, [(0, HOLE_START), (HOLE_END, HOLE_END + (64 << 20))]);
        assert_eq!(memory.low_end(), HOLE_START);
    }

    #[test]
    fn growth_begins_behind_all_other_memory_in_whole_units() {
        let of = |mib: u64, mib_max: u64| Growth::of(mib << 20, mib_max << 20);
        for (mib, mib_max) in [(256, 256), (256, 0), (256, 255)] {
            assert_eq!(of(mib, mib_max), None, "{mib} to {mib_max} MiB");
        }

        let small = of(256, 512).unwrap();
        assert_eq!((small.start, small.bytes_max), (HOLE_END, 256 << 20));
        assert_eq!(small.region_bytes(), 256 << 20);
        let odd = of((3 << 10) + 100, (3 << 10) + 101).unwrap();
        assert_eq!(odd.start, HOLE_END + (128 << 20));
        assert_eq!((odd.bytes_max, odd.region_bytes()), (1 << 20, 128 << 20));
        let big = of(64 << 10, 65 << 10).unwrap();
        assert_eq!(big.start, (65 << 30) + (1 << 30));
        assert_eq!(big.region_bytes(), 2 << 30);
    }

    #[test]
    fn memory_to_grow_into_is_not_there_at_boot() {
        let growth = Growth::of(1 << 20, 1 << 40);
        let memory = Memory::map_to_grow(1 << 20, growth).unwrap();

        assert_eq!(memory.ranges().collect::<Vec<_>>(), [(0, 1 << 20)]);
        assert_eq!(memory.low_end(), 1 << 20);
        assert!(
            memory
                .mmap()
                .write_obj(1_u8, GuestAddress(HOLE_END))
                .is_err()
        );
    }

    #[test]
    fn what_was_provided_can_be_used_and_what_was_given_back_is_zero() {
        let growth = Growth::of(1 << 20, 1 << 30);
        let memory = Memory::map_to_grow(1 << 20, growth).unwrap();
        let region = memory.ram.iter().last().unwrap();
        provide(region, 0, 1 << 20).unwrap();
        region.give(1 << 20);
        let pages = [0, 1, 2].map(|page| GuestAddress(HOLE_END + page * PAGE_BYTES));
        for page in pages {
            memory.mmap().write_obj(1_u8, page).unwrap();
        }

        discard(memory.mmap(), pages[1], PAGE_BYTES).unwrap();

        let left = pages.map(|page| memory.mmap().read_obj::<u8>(page).unwrap());
        assert_eq!(left, [1, 0, 1]);
        assert!(discard(memory.mmap(), GuestAddress(HOLE_END), 2 << 20).is_err());
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let memory = Memory::map(1 << 20).unwrap();
        let mut file = tempfile();
        file.write_all(b"short").unwrap();

        let read = memory.load_file(&file, 1, GuestAddress(0), 5);

        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_file_is_not_read_beyond_memory() {
        let memory = Memory::map(1 << 20).unwrap();
        let mut file = tempfile();
        file.write_all(&[1; 8192]).unwrap();

        let read = memory.load_file(&file, 0, GuestAddress((1 << 20) - 4096), 8192);

        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_is_read_from_its_offset() {
        let memory = Memory::map(1 << 20).unwrap();
        let mut file = tempfile();
        file.write_all(b"0123456789").unwrap();

        memory.load_file(&file, 3, GuestAddress(0x1001), 4).unwrap();

        let mut read = [0; 6];
        memory
            .mmap()
            .read_slice(&mut read, GuestAddress(0x1000))
            .unwrap();
        assert_eq!(&read, b"\x003456\0");
    }

    fn tempfile() -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(fd)
    }
}
