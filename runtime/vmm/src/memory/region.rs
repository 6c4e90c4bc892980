//! The guest's RAM as devices see it: regions of which the guest may not have all, or nothing yet.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryError;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestMemoryRegionBytes;
use vm_memory::GuestRegionMmap;
use vm_memory::GuestUsize;
use vm_memory::MemoryRegionAddress;
use vm_memory::VolatileSlice;

/// All of the guest's RAM. vm-memory's own collection finds a region at its start even if it is empty.
#[derive(Debug)]
pub struct GuestRam {
    /// At most three, in the order of their addresses.
    regions: Vec<Region>,
}

impl GuestRam {
    /// RAM of these regions, which are in order and do not overlap.
    pub(super) fn of(regions: Vec<Region>) -> Self {
        Self { regions }
    }
}

impl GuestMemoryBackend for GuestRam {
    type R = Region;

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

/// A mapping that the guest has the beginning of. What it does not have is not there for devices
/// either: a guest can't have them use it in its place.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    /// Only ever grows, so that what was found to be there stays.
    given_bytes: AtomicU64,
}

impl Region {
    /// A region that the guest has all of.
    pub(crate) fn whole(mapping: GuestRegionMmap) -> Self {
        let given_bytes = AtomicU64::new(mapping.len());
        Self {
            mapping,
            given_bytes,
        }
    }

    /// A region that the guest has nothing of.
    pub(super) fn withheld(mapping: GuestRegionMmap) -> Self {
        Self {
            mapping,
            given_bytes: AtomicU64::new(0),
        }
    }

    /// All of it.
    pub(super) fn mapping(&self) -> &GuestRegionMmap {
        &self.mapping
    }

    /// Gives the guest more, which must be mapped for reading and writing by now.
    pub(super) fn give(&self, bytes: u64) {
        self.given_bytes
            .fetch_max(bytes.min(self.mapping.len()), Ordering::Release);
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.given_bytes.load(Ordering::Acquire)
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn last_addr(&self) -> GuestAddress {
        // Of an empty region, what is before its start, so that no address is found to be in it.
        let end = self.start_addr().0.saturating_add(self.len());
        GuestAddress(end.saturating_sub(1))
    }

    fn bitmap(&self) {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let address = self
            .check_address(address)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.mapping.get_host_address(address)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, ()>, GuestMemoryError> {
        let end = offset.0.checked_add(count as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        self.mapping.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// RAM for tests, at these places.
#[cfg(test)]
pub(crate) fn from_ranges(ranges: &[(GuestAddress, usize)]) -> GuestRam {
    let regions = ranges.iter().map(|&(start, bytes)| {
        Region::whole(GuestRegionMmap::from_range(start, bytes, None).unwrap())
    });
    GuestRam::of(regions.collect())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const START: GuestAddress = GuestAddress(0x10_0000);

    fn withheld() -> GuestRam {
        let mapping = GuestRegionMmap::from_range(START, 0x3000, None).unwrap();
        let low = GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None).unwrap();
        GuestRam::of(vec![Region::whole(low), Region::withheld(mapping)])
    }

    #[test]
    fn what_the_guest_does_not_have_is_not_there() {
        let ram = withheld();

        assert!(ram.write_obj(1_u8, START).is_err());
        assert!(ram.read_obj::<u64>(START).is_err());
        assert!(!GuestMemoryBackend::address_in_range(&ram, START));
        assert!(!GuestMemoryBackend::check_range(&ram, START, 1));
        assert!(ram.get_host_address(START).is_err());
        assert!(GuestMemoryBackend::get_slices(&ram, START, 1).any(|slice| slice.is_err()));
    }

    #[test]
    fn what_the_guest_is_given_is_there_and_no_more() {
        let ram = withheld();
        let region = ram.iter().nth(1).unwrap();

        region.give(0x1000);

        ram.write_obj(7_u8, GuestAddress(START.0 + 0xfff)).unwrap();
        assert!(ram.write_obj(7_u16, GuestAddress(START.0 + 0xfff)).is_err());
        assert!(!GuestMemoryBackend::check_range(&ram, START, 0x1001));
        let slice = region.get_slice(MemoryRegionAddress(0xfff), 2);
        assert!(slice.is_err());
        region.give(u64::MAX);
        assert_eq!(region.len(), 0x3000);
        region.give(1);
        assert_eq!(region.len(), 0x3000);
    }
}
