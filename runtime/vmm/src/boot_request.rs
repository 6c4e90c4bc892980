//! The first request: parsed into a machine that can be built, or refused by name.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use husk_vmm_control::{
    BootConfig, DISKS_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN, NET_DEVICES_MAX, NetConfig, VCPUS_MAX,
};
use rustix::fs::{FileType, OFlags};
use rustix::net::SocketType;

/// Longest addition to the kernel's command line; the whole of it is limited by Linux to 2048.
const CMDLINE_EXTRA_BYTES_MAX: usize = 1024;

/// Everything a machine is made from. All of it is checked.
#[derive(Debug)]
pub struct Boot {
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// What it may grow to.
    pub memory_max_mib: u32,
    /// Added to the kernel's command line.
    pub cmdline_extra: String,
    /// The directory to become the root.
    pub shared_dir: PathBuf,
    /// The cgroup to join.
    pub cgroup_dir: Option<PathBuf>,
    /// For how long the guest may cache names and attributes.
    pub share_cache_ms: u64,
    /// The first of the groups whose requests to the share change nothing.
    pub share_echo_group: Option<u32>,
    /// The network devices.
    pub net: Vec<NetBoot>,
    /// Slots for disks.
    pub disks: usize,
    /// What else came with the request.
    pub files: BootFiles,
}

/// A network device: its address and its tap, or nothing yet.
pub type NetBoot = Option<([u8; 6], OwnedFd)>;

/// The descriptors of the request.
#[derive(Debug)]
pub struct BootFiles {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The guest kernel, an ELF file.
    pub kernel: File,
    /// The initial root file system.
    pub initrd: File,
    /// Where the guest's console is written to.
    pub console: File,
    /// The agent's connection.
    pub agent: OwnedFd,
}

/// What is wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Outside of the limits.
    #[error("{vcpus} virtual CPUs: a machine has 1 to {VCPUS_MAX}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// Outside of the limits.
    #[error("{memory_mib} MiB of guest memory: a machine has {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX}")]
    Memory {
        /// What was asked for.
        memory_mib: u32,
    },
    /// Too long, or more than words.
    #[error(
        "the addition to the kernel command line must be at most {CMDLINE_EXTRA_BYTES_MAX} \
         printable ASCII characters"
    )]
    Cmdline,
    /// More network devices than a machine has.
    #[error("{count} network devices: a machine has at most {NET_DEVICES_MAX}")]
    NetDevices {
        /// What was asked for.
        count: usize,
    },
    /// More slots for disks than a machine has.
    #[error("{count} slots for disks: a machine has at most {DISKS_MAX}")]
    Disks {
        /// What was asked for.
        count: usize,
    },
    /// Relative, or not a path at all.
    #[error("{which} {path:?} is not an absolute path")]
    Path {
        /// The field.
        which: &'static str,
        /// Its value.
        path: String,
    },
    /// One is missing or too many.
    #[error("{count} descriptors came with the boot request: it takes {expected}")]
    Count {
        /// How many came.
        count: usize,
        /// How many it takes.
        expected: usize,
    },
    /// Not the kind of file it has to be.
    #[error("the descriptor of {which} is not {expected}")]
    Kind {
        /// The descriptor's name.
        which: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// It can't be looked at.
    #[error("cannot inspect the descriptor of {which}")]
    Inspect {
        /// The descriptor's name.
        which: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Descriptors of a boot request, before the taps.
const BOOT_FILES: usize = 5;

impl Boot {
    /// Checks a request and what came with it.
    ///
    /// # Errors
    /// [`BootError`], naming the first thing that is wrong.
    pub fn new(config: BootConfig, mut descriptors: Vec<OwnedFd>) -> Result<Self, BootError> {
        let BootConfig {
            vcpus,
            memory_mib,
            memory_max_mib,
            cmdline_extra,
            shared_dir,
            cgroup_dir,
            net,
            disks,
            share_cache_ms,
            share_echo_group,
        } = config;
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(BootError::Vcpus { vcpus });
        }
        if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&memory_mib) {
            return Err(BootError::Memory { memory_mib });
        }
        if memory_max_mib > MEMORY_MIB_MAX {
            let memory_mib = memory_max_mib;
            return Err(BootError::Memory { memory_mib });
        }
        let is_word = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        if cmdline_extra.len() > CMDLINE_EXTRA_BYTES_MAX || !cmdline_extra.bytes().all(is_word) {
            return Err(BootError::Cmdline);
        }
        if net.len() > NET_DEVICES_MAX {
            return Err(BootError::NetDevices { count: net.len() });
        }
        if disks > DISKS_MAX {
            return Err(BootError::Disks { count: disks });
        }
        let taps = net.iter().filter(|device| device.mac.is_some()).count();
        let (count, expected) = (descriptors.len(), BOOT_FILES + taps);
        if count != expected {
            return Err(BootError::Count { count, expected });
        }
        let taps = descriptors.split_off(BOOT_FILES);
        for tap in &taps {
            require_type(
                "a tap",
                tap,
                FileType::CharacterDevice,
                "a character device",
            )?;
        }
        let mut taps = taps.into_iter();
        let with_tap = |device: NetConfig| device.mac.and_then(|mac| Some((mac, taps.next()?)));
        let net = net.into_iter().map(with_tap).collect();
        let cgroup_dir = match cgroup_dir.as_str() {
            "" => None,
            _ => Some(absolute("cgroup_dir", cgroup_dir)?),
        };
        Ok(Self {
            vcpus,
            memory_mib,
            memory_max_mib,
            cmdline_extra,
            shared_dir: absolute("shared_dir", shared_dir)?,
            cgroup_dir,
            share_cache_ms,
            share_echo_group,
            net,
            disks,
            files: BootFiles::new(descriptors)?,
        })
    }
}

impl BootFiles {
    fn new(descriptors: Vec<OwnedFd>) -> Result<Self, BootError> {
        let [kvm, kernel, initrd, console, agent] = <[_; BOOT_FILES]>::try_from(descriptors)
            .map_err(|descriptors| BootError::Count {
                count: descriptors.len(),
                expected: BOOT_FILES,
            })?;
        require_type(
            "/dev/kvm",
            &kvm,
            FileType::CharacterDevice,
            "a character device",
        )?;
        for (which, file) in [("the guest kernel", &kernel), ("the initrd", &initrd)] {
            require_type(which, file, FileType::RegularFile, "a regular file")?;
        }
        require_writable("the console log", &console)?;
        require_stream("the agent stream", &agent)?;
        Ok(Self {
            kvm,
            kernel: kernel.into(),
            initrd: initrd.into(),
            console: console.into(),
            agent,
        })
    }
}

fn absolute(which: &'static str, path: String) -> Result<PathBuf, BootError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(path.into())
    } else {
        Err(BootError::Path { which, path })
    }
}

fn require_type(
    which: &'static str,
    file: &impl AsFd,
    wanted: FileType,
    expected: &'static str,
) -> Result<(), BootError> {
    let stat = rustix::fs::fstat(file).map_err(inspect(which))?;
    if FileType::from_raw_mode(stat.st_mode) == wanted {
        Ok(())
    } else {
        Err(BootError::Kind { which, expected })
    }
}

fn require_writable(which: &'static str, file: &impl AsFd) -> Result<(), BootError> {
    let flags = rustix::fs::fcntl_getfl(file).map_err(inspect(which))?;
    if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        Ok(())
    } else {
        let expected = "open for writing";
        Err(BootError::Kind { which, expected })
    }
}

fn require_stream(which: &'static str, socket: &impl AsFd) -> Result<(), BootError> {
    match rustix::net::sockopt::socket_type(socket) {
        Ok(SocketType::STREAM) => Ok(()),
        Ok(_) | Err(rustix::io::Errno::NOTSOCK) => {
            let expected = "a stream socket";
            Err(BootError::Kind { which, expected })
        }
        Err(errno) => Err(inspect(which)(errno)),
    }
}

fn inspect(which: &'static str) -> impl Fn(rustix::io::Errno) -> BootError {
    move |errno| BootError::Inspect {
        which,
        source: errno.into(),
    }
}
