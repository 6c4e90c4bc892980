//! The guest's RAM.
//!
//! Anonymous memory that the host provides page by page as the guest touches it. This is one of the
//! modules that allow unsafe code: KVM is told host addresses.

use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_MEM_READONLY;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestRegionMmap;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory;
use vm_memory::VolatileSlice;
use vm_memory::mmap::MmapRegionError;

use crate::layout::HOLE_END;
use crate::layout::HOLE_START;
use crate::layout::PAGE_BYTES;

/// All of the guest's RAM.
#[derive(Clone)]
pub(crate) struct Memory {
    mmap: Arc<GuestMemoryMmap>,
}

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
    /// The regions make no address space.
    #[error("cannot lay out guest memory")]
    LayOut(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused a region.
    #[error("cannot give the guest the memory at {start:#x}")]
    Register {
        /// Its guest physical address.
        start: u64,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

impl Memory {
    /// Maps `bytes` of RAM, in one region below the hole and one above it.
    pub(crate) fn map(bytes: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Size { bytes });
        }
        let below = bytes.min(HOLE_START);
        let above = bytes.saturating_sub(below);
        let mut regions = vec![map_region(0, below)?];
        if above > 0 {
            regions.push(map_region(HOLE_END, above)?);
        }
        let mmap = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::LayOut)?;
        Ok(Self {
            mmap: Arc::new(mmap),
        })
    }

    /// For devices.
    pub(crate) fn shared(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(&self.mmap)
    }

    /// For tables that are written in place.
    pub(crate) fn mmap(&self) -> &GuestMemoryMmap {
        &self.mmap
    }

    /// Start and end of each region.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.mmap
            .iter()
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
        for (slot, region) in (RAM_SLOT..REGISTERS_SLOT).zip(self.mmap.iter()) {
            let start = region.start_addr().0;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of ours, of exactly that size, which nothing in this
            // process has a Rust reference into. The caller keeps it while the guest can run.
            let done = unsafe { vm.set_user_memory_region(slot) };
            done.map_err(|source| MemoryError::Register { start, source })?;
        }
        Ok(())
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
        let target = self.mmap.get_slice(start, length).map_err(outside)?;
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

/// KVM's slots: RAM has one below the hole of the address space and one above it.
const RAM_SLOT: u32 = 0;
const REGISTERS_SLOT: u32 = 2;

fn map_region(start: u64, bytes: u64) -> Result<GuestRegionMmap, MemoryError> {
    let size = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
    let mapping = MmapRegion::build(
        None,
        size,
        libc::PROT_READ | libc::PROT_WRITE,
        // The guest's size is a limit, not a reservation.
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
