//! Block devices, and files like them, as the host has them.
//!
//! A spec names most of them by number. Where their nodes are, the kernel says; a node of our own would
//! not do, as few file systems let one be opened.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use husk_vmm_control::DiskConfig;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::wanted::{HostDevice, Place, WantedDisk};
use super::{DiskError, Number};
use crate::spec::SpecError;

/// Where the kernel shows block devices by number.
const SHOWN: &str = "/sys/dev/block";

/// Where it makes their nodes.
const NODES: &str = "/dev";

/// What the size of a disk is counted in, and its smallest block.
const SECTOR_BYTES: u32 = 512;

/// What is behind a disk. Two paths of one thing are one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A block device.
    Device(Number),
    /// A regular file, by its file system and its number there.
    File { system: u64, inode: u64 },
}

/// A disk that a container asks for, in one place of its spec or in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) origin: Origin,
    /// The device's node, or the file.
    pub(super) node: PathBuf,
    /// The guest may not write to it.
    pub(super) is_read_only: bool,
    /// It is a device, and a file system on it is mounted to be written to.
    pub(super) is_claimed: bool,
    /// It is a root that is written to, which no two containers have.
    pub(super) is_own: bool,
    /// Of the spec.
    pub(super) places: Vec<Place>,
}

impl WantedDisk {
    /// Looks for it: as a container's creation would, later.
    ///
    /// # Errors
    /// [`SpecError`] if the host does not have it.
    pub(crate) fn check(&self) -> Result<(), SpecError> {
        self.find().map(drop)
    }

    /// What it is, and its node.
    fn find(&self) -> Result<(Origin, PathBuf), SpecError> {
        let refuse = |reason| SpecError::Unsupported {
            what: self.what.clone(),
            reason,
        };
        match &self.device {
            HostDevice::Number(number) => match node_of(*number) {
                Some(node) => Ok((Origin::Device(*number), node)),
                None => Err(refuse("the host has no block device of that number")),
            },
            HostDevice::Path(path) => match fs::metadata(path) {
                Ok(metadata) if metadata.file_type().is_block_device() => {
                    let number = Number::of_raw(metadata.rdev());
                    Ok((Origin::Device(number), path.clone()))
                }
                _ => Err(refuse("its source is no block device of the host")),
            },
            HostDevice::Image(path) => match image(path) {
                Ok(origin) => Ok((origin, path.clone())),
                Err(reason) => Err(SpecError::Root {
                    image: path.clone(),
                    reason,
                }),
            },
        }
    }
}

/// What a root is on, or why it is on nothing that can be a disk.
pub(super) fn image(path: &Path) -> Result<Origin, &'static str> {
    if path.is_relative() {
        return Err("it is not an absolute path");
    }
    let missing = |_| "it is not there, or can't be looked at";
    let found = fs::symlink_metadata(path).map_err(missing)?;
    if found.is_file() {
        return match found.len() {
            0 => Err("it is empty"),
            bytes if !bytes.is_multiple_of(SECTOR_BYTES.into()) => {
                Err("its size is no multiple of 512 bytes")
            }
            _ => Ok(Origin::of_file(&found)),
        };
    }
    // Nodes of the device mapper are links.
    let behind = fs::metadata(path).map_err(missing)?;
    if behind.file_type().is_block_device() {
        Ok(Origin::Device(Number::of_raw(behind.rdev())))
    } else if behind.is_file() {
        Err("it is a link to a file, which may come to be a link to another")
    } else {
        Err("it is neither a block device nor a file")
    }
}

impl Origin {
    fn of_file(metadata: &fs::Metadata) -> Self {
        Self::File {
            system: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Finds all that a container asks for. What it asks for twice, it needs once.
pub(super) fn needs(wanted: &[WantedDisk]) -> Result<Vec<Need>, SpecError> {
    let mut needs: Vec<Need> = Vec::new();
    for disk in wanted {
        let (origin, node) = disk.find()?;
        let (is_device, is_sealed) = match origin {
            // As with runc, such a device can be given to be written to, and then can't.
            Origin::Device(number) => (true, shown(number, "ro").is_some_and(|ro| ro == "1")),
            Origin::File { .. } => (false, false),
        };
        let is_read_only = disk.is_read_only || is_sealed;
        let is_mounted = matches!(disk.place, Place::Mount(_) | Place::Root);
        let is_claimed = is_device && is_mounted && !is_read_only;
        let is_own = disk.place == Place::Root && !is_read_only;
        match needs.iter_mut().find(|need| need.origin == origin) {
            Some(need) => {
                need.is_read_only &= is_read_only;
                need.is_claimed |= is_claimed;
                need.is_own |= is_own;
                need.places.push(disk.place);
            }
            None => needs.push(Need {
                origin,
                node,
                is_read_only,
                is_claimed,
                is_own,
                places: vec![disk.place],
            }),
        }
    }
    Ok(needs)
}

impl Need {
    /// Opens it for what the guest may do, and says what it is like. Blocks.
    pub(super) fn open(&self, serial: String) -> Result<(DiskConfig, OwnedFd), DiskError> {
        let mode = match self.is_read_only {
            true => OFlags::RDONLY,
            false => OFlags::RDWR,
        };
        let (file, bytes, block_bytes, frees) = match self.origin {
            Origin::Device(number) => {
                let file = self.open_device(mode, number)?;
                let bytes = rustix::fs::seek(&file, SeekFrom::End(0));
                let bytes = bytes.map_err(|errno| self.failed(errno))?;
                let block_bytes = rustix::fs::ioctl_blksszget(&file);
                let block_bytes = block_bytes.map_err(|errno| self.failed(errno))?;
                let frees = shown(number, "queue/write_zeroes_max_bytes")
                    .or_else(|| shown(number, "../queue/write_zeroes_max_bytes"));
                let frees = frees.is_some_and(|bytes| bytes != "0");
                (file, bytes, block_bytes, frees)
            }
            Origin::File { .. } => {
                let (file, bytes) = self.open_file(mode)?;
                // Where the file system can't make holes, the guest is told so by the first one.
                (file, bytes, SECTOR_BYTES, true)
            }
        };
        if bytes == 0 {
            return Err(DiskError::Empty {
                node: self.node.clone(),
            });
        }
        let config = DiskConfig {
            bytes,
            block_bytes,
            is_read_only: self.is_read_only,
            can_zero: !self.is_read_only && frees,
            serial,
        };
        Ok((config, file))
    }

    /// Opens a file, which is locked for as long as somebody has it open: as with a device, two kernels
    /// that write to a file system destroy it.
    fn open_file(&self, mode: OFlags) -> Result<(OwnedFd, u64), DiskError> {
        // What has taken its place may be a pipe that nobody writes to.
        let flags = mode | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = rustix::fs::open(&self.node, flags, Mode::empty());
        let file = File::from(opened.map_err(|errno| self.failed(errno))?);
        let metadata = file.metadata().map_err(|source| DiskError::Open {
            node: self.node.clone(),
            source,
        })?;
        let node = || self.node.clone();
        if !metadata.is_file() || Origin::of_file(&metadata) != self.origin {
            return Err(DiskError::Replaced { node: node() });
        }
        let bytes = metadata.len();
        if !bytes.is_multiple_of(SECTOR_BYTES.into()) {
            let node = node();
            return Err(DiskError::Size { node, bytes });
        }
        let lock = match self.is_read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        match rustix::fs::flock(&file, lock) {
            Ok(()) => Ok((file.into(), bytes)),
            Err(Errno::WOULDBLOCK) => Err(DiskError::Busy { node: node() }),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    /// Keeps everybody else on the host from mounting it: two kernels that write to a file system
    /// destroy it. None if nothing is to be kept from them. Blocks.
    pub(super) fn claim(&self) -> Result<Option<OwnedFd>, DiskError> {
        match self.origin {
            Origin::Device(number) if self.is_claimed => {
                let claim = self.open_device(OFlags::RDONLY | OFlags::EXCL, number)?;
                Ok(Some(claim))
            }
            _ => Ok(None),
        }
    }

    fn open_device(&self, mode: OFlags, number: Number) -> Result<OwnedFd, DiskError> {
        let opened = rustix::fs::open(&self.node, mode | OFlags::CLOEXEC, Mode::empty());
        let file = opened.map_err(|errno| self.failed(errno))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| self.failed(errno))?;
        let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        if !is_block || Number::of_raw(stat.st_rdev) != number {
            return Err(DiskError::Another {
                node: self.node.clone(),
                number,
            });
        }
        Ok(file)
    }

    fn failed(&self, errno: Errno) -> DiskError {
        let node = self.node.clone();
        match errno {
            Errno::BUSY => DiskError::Busy { node },
            errno => DiskError::Open {
                node,
                source: io::Error::from(errno),
            },
        }
    }
}

/// What the kernel shows of a block device.
fn shown(number: Number, name: &str) -> Option<String> {
    let path = Path::new(SHOWN).join(number.to_string()).join(name);
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The node of a block device, by the kernel's own name for it.
fn node_of(number: Number) -> Option<PathBuf> {
    let event = shown(number, "uevent")?;
    let name = event
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new(NODES).join(name))
}

#[cfg(test)]
mod tests;
