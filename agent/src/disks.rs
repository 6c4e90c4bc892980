//! Disks that the host plugs into the machine and pulls out of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::slots::Slots;

/// Where the kernel makes the nodes of all its devices.
const NODES: &str = "/dev";

/// Why a disk can't be had, or is not let go of.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host counts other slots.
    #[error("there is no slot {slot} for disks among {count}")]
    NoSlot {
        /// What was asked for.
        slot: usize,
        /// How many there are.
        count: usize,
    },
    /// The kernel does not do it.
    #[error("cannot {step} slot {slot}")]
    Step {
        /// The step.
        step: &'static str,
        /// Where.
        slot: usize,
        /// Why.
        source: io::Error,
    },
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// Its node among the guest's own devices.
    pub node: PathBuf,
}

/// Has the kernel find the disk in one of `count` slots. Blocks: the kernel looks for partitions.
///
/// # Errors
/// [`DiskError`]; the kernel has let go of whatever it has found.
pub fn attach(count: usize, slot: usize) -> Result<Disk, DiskError> {
    let slots = slots(count, slot)?;
    let found = slots.drive(slot).and_then(|shown| Disk::of(&shown));
    found.map_err(|source| {
        // Why it can't be had is what the host should know.
        let _ = slots.let_go(slot);
        let step = "find the disk in";
        DiskError::Step { step, slot, source }
    })
}

/// Has the kernel write the disk in a slot back and let go of it. Blocks.
///
/// # Errors
/// [`DiskError`]
pub fn detach(count: usize, slot: usize) -> Result<(), DiskError> {
    slots(count, slot)?.let_go(slot).map_err(|source| {
        let step = "let go of the disk in";
        DiskError::Step { step, slot, source }
    })
}

fn slots(count: usize, slot: usize) -> Result<Slots, DiskError> {
    let slots = Slots::of_disks(count).map_err(|source| {
        let step = "look for";
        DiskError::Step { step, slot, source }
    })?;
    match slot < slots.count() {
        true => Ok(slots),
        false => {
            let count = slots.count();
            Err(DiskError::NoSlot { slot, count })
        }
    }
}

impl Disk {
    /// Reads what the kernel shows of it.
    fn of(shown: &Path) -> io::Result<Self> {
        let nonsense = || io::Error::from(io::ErrorKind::InvalidData);
        let number = fs::read_to_string(shown.join("dev"))?;
        let (major, minor) = number.trim().split_once(':').ok_or_else(nonsense)?;
        Ok(Self {
            major: major.parse().map_err(|_| nonsense())?,
            minor: minor.parse().map_err(|_| nonsense())?,
            node: Path::new(NODES).join(shown.file_name().ok_or_else(nonsense)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(number: &str) -> io::Result<Disk> {
        let directory = tempfile::tempdir().unwrap();
        let shown = directory.path().join("vdb");
        fs::create_dir(&shown).unwrap();
        fs::write(shown.join("dev"), number).unwrap();
        Disk::of(&shown)
    }

    #[test]
    fn number_that_is_none_is_an_error() {
        for number in ["", "254", "254:x", "-1:0", "254:16:1"] {
            assert!(disk(number).is_err(), "{number:?}");
        }
        assert!(Disk::of(Path::new("/no/such/place")).is_err());
    }

    #[test]
    fn disk_is_known_by_number_and_node() {
        let found = disk("254:16\n").unwrap();
        assert_eq!((found.major, found.minor), (254, 16));
        assert_eq!(found.node, Path::new("/dev/vdb"));
    }
}
