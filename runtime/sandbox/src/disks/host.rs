//! Block devices as the host has them.
//!
//! A spec names most of them by number. Where their nodes are, the kernel says; a node of our own would
//! not do, as few file systems let one be opened.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use husk_vmm_control::DiskConfig;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::wanted::{HostDevice, Place, WantedDisk};
use super::{DiskError, Number};
use crate::spec::SpecError;

/// Where the kernel shows block devices by number.
const SHOWN: &str = "/sys/dev/block";

/// Where it makes their nodes.
const NODES: &str = "/dev";

/// A block device that a container asks for, in one place of its spec or in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) number: Number,
    /// Its node.
    pub(super) node: PathBuf,
    /// The guest may not write to it.
    pub(super) is_read_only: bool,
    /// A file system on it is mounted to be written to.
    pub(super) is_claimed: bool,
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

    /// Its number and its node.
    fn find(&self) -> Result<(Number, PathBuf), SpecError> {
        let refuse = |reason| SpecError::Unsupported {
            what: self.what.clone(),
            reason,
        };
        match &self.device {
            HostDevice::Number(number) => match node_of(*number) {
                Some(node) => Ok((*number, node)),
                None => Err(refuse("the host has no block device of that number")),
            },
            HostDevice::Path(path) => match fs::metadata(path) {
                Ok(metadata) if metadata.file_type().is_block_device() => {
                    Ok((Number::of_raw(metadata.rdev()), path.clone()))
                }
                _ => Err(refuse("its source is no block device of the host")),
            },
        }
    }
}

/// Finds all that a container asks for. What it asks for twice, it needs once.
pub(super) fn needs(wanted: &[WantedDisk]) -> Result<Vec<Need>, SpecError> {
    let mut needs: Vec<Need> = Vec::new();
    for disk in wanted {
        let (number, node) = disk.find()?;
        // As with runc, such a device can be given to be written to, and then can't.
        let is_read_only = disk.is_read_only || shown(number, "ro").is_some_and(|ro| ro == "1");
        let is_claimed = matches!(disk.place, Place::Mount(_)) && !is_read_only;
        match needs.iter_mut().find(|need| need.number == number) {
            Some(need) => {
                need.is_read_only &= is_read_only;
                need.is_claimed |= is_claimed;
                need.places.push(disk.place);
            }
            None => needs.push(Need {
                number,
                node,
                is_read_only,
                is_claimed,
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
        let file = self.open_as(mode)?;
        let bytes =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| self.failed(errno))?;
        if bytes == 0 {
            return Err(DiskError::Empty {
                node: self.node.clone(),
            });
        }
        let block_bytes = rustix::fs::ioctl_blksszget(&file).map_err(|errno| self.failed(errno))?;
        let frees = shown(self.number, "queue/write_zeroes_max_bytes")
            .or_else(|| shown(self.number, "../queue/write_zeroes_max_bytes"));
        let config = DiskConfig {
            bytes,
            block_bytes,
            is_read_only: self.is_read_only,
            can_zero: !self.is_read_only && frees.is_some_and(|bytes| bytes != "0"),
            serial,
        };
        Ok((config, file))
    }

    /// Keeps everybody else on the host from mounting it: two kernels that write to a file system
    /// destroy it. Blocks.
    pub(super) fn claim(&self) -> Result<OwnedFd, DiskError> {
        self.open_as(OFlags::RDONLY | OFlags::EXCL)
    }

    fn open_as(&self, mode: OFlags) -> Result<OwnedFd, DiskError> {
        let opened = rustix::fs::open(&self.node, mode | OFlags::CLOEXEC, Mode::empty());
        let file = opened.map_err(|errno| self.failed(errno))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| self.failed(errno))?;
        let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        if !is_block || Number::of_raw(stat.st_rdev) != self.number {
            return Err(DiskError::Another {
                node: self.node.clone(),
                number: self.number,
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
mod tests {
    use super::*;

    fn wanted(device: HostDevice) -> WantedDisk {
        WantedDisk {
            place: Place::Mount(0),
            device,
            is_read_only: false,
            what: "mount at \"/a\"".to_owned(),
        }
    }

    fn need(node: &Path) -> Need {
        Need {
            number: Number { major: 7, minor: 3 },
            node: node.to_owned(),
            is_read_only: true,
            is_claimed: false,
            places: Vec::new(),
        }
    }

    #[test]
    fn what_is_no_block_device_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [
            Path::new("/no/such/device"),
            Path::new("/dev/null"),
            Path::new("/"),
            file.path(),
        ] {
            let refused = wanted(HostDevice::Path(path.into())).check().unwrap_err();
            assert!(refused.to_string().contains("mount at \"/a\""), "{refused}");
        }
        // No major is as high.
        let number = Number {
            major: 4095,
            minor: 0,
        };
        assert!(wanted(HostDevice::Number(number)).check().is_err());
    }

    #[test]
    fn node_of_another_device_is_not_given() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for node in [file.path(), Path::new("/dev/zero")] {
            let error = need(node).open("disk0".to_owned()).unwrap_err();
            assert!(matches!(error, DiskError::Another { .. }), "{error}");
        }
        let error = need(Path::new("/no/node")).claim().unwrap_err();
        assert!(matches!(error, DiskError::Open { .. }), "{error}");
    }
}
