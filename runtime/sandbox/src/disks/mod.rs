//! Block devices of the host that containers are given: disks of the guest while a container has them.
//!
//! The machine was booted with some slots for them. A device is opened here, for what the guest may do
//! to it, and handed to the VMM; the guest's kernel finds it, and where the spec names the host's
//! device, it names the guest's then. A device that several of a pod's containers have is one disk, as
//! the guest would hold what is written to it twice otherwise. It is pulled out after the last of them.

mod host;
mod root;
mod wanted;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use husk_protocol::messages;
use oci_spec::runtime::Spec;
use tokio::time::timeout;

use crate::error::describe;
use crate::sandbox::in_background;
use crate::{ContainerError, Sandbox};
use host::{Need, Origin, needs};
pub(crate) use root::RootDisk;
use wanted::{Place, place, renumber};
pub(crate) use wanted::{WantedDisk, of_devices, of_mount};

/// Why a container can't have a block device, or a file like one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// It is there and can't be opened.
    #[error("cannot open the disk {node:?}")]
    Open {
        /// Its node on the host.
        node: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It takes too long.
    #[error("the disk {node:?} was not opened within {OPEN_DEADLINE:?}")]
    Deadline {
        /// Its node on the host.
        node: PathBuf,
    },
    /// Somebody on the host has mounted it, or has it for himself otherwise.
    #[error("the disk {node:?} is in use on the host")]
    Busy {
        /// Its node on the host.
        node: PathBuf,
    },
    /// The node is not what the kernel says it is.
    #[error("{node:?} is not the node of the block device {number}")]
    Another {
        /// The node on the host.
        node: PathBuf,
        /// Whose it should be.
        number: Number,
    },
    /// Another file has taken its place.
    #[error("{node:?} is not the file that it was")]
    Replaced {
        /// The file.
        node: PathBuf,
    },
    /// Not made of sectors.
    #[error("the disk {node:?} has {bytes} bytes, which is no multiple of 512")]
    Size {
        /// The file.
        node: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A device without a medium.
    #[error("the disk {node:?} has no bytes: is there something in it?")]
    Empty {
        /// Its node on the host.
        node: PathBuf,
    },
    /// All slots are taken.
    #[error(
        "the pod's virtual machine has {slots} slots for block devices, and none is free for {node:?}"
    )]
    NoSlot {
        /// The device's node on the host.
        node: PathBuf,
        /// How many there are.
        slots: usize,
    },
    /// What one container must not write to, the guest must not.
    #[error(
        "the disk {node:?} can't be given to be written to: another container of the pod \
         has it read-only"
    )]
    ReadOnly {
        /// Its node on the host.
        node: PathBuf,
    },
    /// Two containers that write to one root would each meet the other's files in it.
    #[error("the disk {node:?} is another container's root, or can't be this one's beside it")]
    Taken {
        /// Its node on the host.
        node: PathBuf,
    },
}

/// The number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl Number {
    /// Nothing has the number 0:0.
    fn of(major: i64, minor: i64) -> Option<Self> {
        let (major, minor) = (u32::try_from(major).ok()?, u32::try_from(minor).ok()?);
        (major != 0 || minor != 0).then_some(Self { major, minor })
    }

    fn of_raw(number: u64) -> Self {
        Self {
            major: rustix::fs::major(number),
            minor: rustix::fs::minor(number),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A disk as the guest knows it. Only the guest is ever told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    pub(crate) number: Number,
    pub(crate) node: PathBuf,
}

/// The machine's slots.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    slots: Vec<Slot>,
}

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Free,
    Taken(Disk),
    /// The guest has not let go of what was there.
    Lost,
}

/// A disk that is plugged in.
#[derive(Debug)]
struct Disk {
    origin: Origin,
    is_read_only: bool,
    /// No other container may have it.
    is_own: bool,
    in_guest: GuestDisk,
    /// Keeps it from being mounted on the host.
    claim: Option<OwnedFd>,
    /// The containers that have it.
    users: BTreeSet<String>,
}

impl Disks {
    /// So many slots, all empty.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            slots: std::iter::repeat_with(Slot::default).take(slots).collect(),
        }
    }

    /// Forgets all of them, as their machine has gone.
    pub(crate) fn clear(&mut self) {
        self.slots.clear();
    }

    /// The disk of a device that is plugged in already.
    fn shared(&mut self, need: &Need) -> Result<Option<&mut Disk>, DiskError> {
        let disks = self.slots.iter_mut().filter_map(|slot| match slot {
            Slot::Taken(disk) => Some(disk),
            Slot::Free | Slot::Lost => None,
        });
        let Some(disk) = disks.into_iter().find(|disk| disk.origin == need.origin) else {
            return Ok(None);
        };
        if disk.is_own || need.is_own {
            return Err(DiskError::Taken {
                node: need.node.clone(),
            });
        }
        if disk.is_read_only && !need.is_read_only {
            return Err(DiskError::ReadOnly {
                node: need.node.clone(),
            });
        }
        Ok(Some(disk))
    }

    fn free(&self, need: &Need) -> Result<usize, DiskError> {
        let mut slots = self.slots.iter();
        slots
            .position(|slot| matches!(slot, Slot::Free))
            .ok_or_else(|| DiskError::NoSlot {
                node: need.node.clone(),
                slots: self.slots.len(),
            })
    }

    fn set(&mut self, slot: usize, to: Slot) {
        if let Some(place) = self.slots.get_mut(slot) {
            *place = to;
        }
    }

    /// Takes a container off all disks. Answers with the slots of those that nobody has any more.
    fn leave(&mut self, container: &str) -> Vec<usize> {
        let mut left = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let Slot::Taken(disk) = slot
                && disk.users.remove(container)
                && disk.users.is_empty()
            {
                left.push(index);
            }
        }
        left
    }
}

impl Sandbox {
    /// Plugs in what a container asks for, and has its spec speak of the guest's disks. Answers with
    /// its root, unless that is to be mounted on the host.
    ///
    /// # Errors
    /// [`ContainerError`]; the caller takes back what was given by then.
    pub(crate) async fn give_disks(
        &self,
        container: &str,
        spec: &mut Spec,
        mut wanted: Vec<WantedDisk>,
        root: Option<RootDisk>,
    ) -> Result<Option<messages::RootDisk>, ContainerError> {
        let can_be_on_host = root.as_ref().is_some_and(|root| root.can_be_on_host);
        // Last, as it may do without a slot.
        wanted.extend(root.as_ref().map(|root| root.wanted.clone()));
        let mut given = Vec::new();
        let mut on_root = None;
        if !wanted.is_empty() {
            let needs = in_background(move || needs(&wanted)).await?;
            let mut disks = self.disks.lock().await;
            for need in needs {
                let disk = match self.give_disk(&mut disks, container, &need).await {
                    Err(ContainerError::Disk(DiskError::NoSlot { .. }))
                        if can_be_on_host && need.places == [Place::Root] =>
                    {
                        continue;
                    }
                    disk => disk?,
                };
                for at in &need.places {
                    place(spec, *at, &disk);
                }
                if let Origin::Device(number) = need.origin {
                    given.push((number, disk.number));
                }
                if need.places.contains(&Place::Root) {
                    on_root = Some(disk);
                }
            }
        }
        if let Some(linux) = spec.linux_mut() {
            let guests = |number| {
                let found = given.iter().find(|(host, _)| *host == number);
                found.map(|(_, guest)| *guest)
            };
            renumber(linux, guests);
        }
        Ok(root.zip(on_root).map(|(root, disk)| root.on(&disk)))
    }

    async fn give_disk(
        &self,
        disks: &mut Disks,
        container: &str,
        need: &Need,
    ) -> Result<GuestDisk, ContainerError> {
        if let Some(disk) = disks.shared(need)? {
            if need.is_claimed && disk.claim.is_none() {
                disk.claim = opened(need, Need::claim).await?;
            }
            disk.users.insert(container.to_owned());
            return Ok(disk.in_guest.clone());
        }
        let slot = disks.free(need)?;
        let claim = match need.is_claimed {
            true => opened(need, Need::claim).await?,
            false => None,
        };
        let disk = opened(need, move |need| need.open(format!("disk{slot}"))).await?;
        self.vmm.plug_disk(slot, Some(disk)).await.map_err(|text| {
            let call = "plug a disk in";
            ContainerError::Vmm { call, text }
        })?;
        match self.agent.attach_disk(&self.vmm, slot).await {
            Ok(in_guest) => {
                let disk = Disk {
                    origin: need.origin,
                    is_read_only: need.is_read_only,
                    is_own: need.is_own,
                    in_guest: in_guest.clone(),
                    claim,
                    users: BTreeSet::from([container.to_owned()]),
                };
                disks.set(slot, Slot::Taken(disk));
                Ok(in_guest)
            }
            Err(error) => {
                self.pull_disk(disks, slot).await;
                Err(error)
            }
        }
    }

    /// Pulls out what a container was the last to have. Nothing there is no error.
    pub(crate) async fn take_back_disks(&self, container: &str) {
        let mut disks = self.disks.lock().await;
        for slot in disks.leave(container) {
            self.pull_disk(&mut disks, slot).await;
        }
    }

    /// Has the guest let go of a disk, and pulls it out whether or not it has.
    async fn pull_disk(&self, disks: &mut Disks, slot: usize) {
        let let_go = self.agent.detach_disk(&self.vmm, slot).await;
        let pulled = self.vmm.plug_disk(slot, None).await;
        let trouble = match (let_go, pulled) {
            (Ok(()), Ok(())) => return disks.set(slot, Slot::Free),
            // It has taken the disk with it.
            (Err(ContainerError::VmGone(_)), _) => None,
            (Err(error), _) => Some(describe(&error)),
            (_, Err(text)) => Some(text),
        };
        disks.set(slot, Slot::Lost);
        if let Some(trouble) = trouble {
            tracing::warn!(slot, trouble, "the guest has not let go of a disk");
        }
    }
}

/// Opens a device, in time. One that takes longer is closed when it is open.
async fn opened<T: Send + 'static>(
    need: &Need,
    open: impl FnOnce(&Need) -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    let (need, node) = (need.clone(), need.node.clone());
    let opened = in_background(move || open(&need));
    let opened = timeout(OPEN_DEADLINE, opened).await;
    opened.unwrap_or(Err(DiskError::Deadline { node }))
}

/// For the host to open a block device, which may have to wake up.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
