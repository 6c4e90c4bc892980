//! A container's part of the share: its root file system and volumes.

use std::fs::{self, File, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, statfs};

use crate::hooks::StagedRoot;
use crate::mounts::{self, Volume};
use crate::remove::remove_tree;
use crate::spec::GuestSpec;
use crate::state::StateDir;
use crate::{ContainerError, HookError, MountError, RootfsMount};

/// Places of a container's files. Directories are made in the layout, where they can be written;
/// mounts in the share, where they can be seen; and staged in between.
#[derive(Debug, Clone)]
pub(super) struct ContainerFiles {
    layout: PathBuf,
    shared: PathBuf,
    staging: PathBuf,
}

/// Where a container's root is.
#[derive(Debug)]
pub(super) enum Root {
    /// On a disk of the guest's.
    Disk,
    /// In the share, by these mounts; none: it is the directory that the spec names.
    Share(Vec<RootfsMount>),
}

impl ContainerFiles {
    pub(super) fn new(state: &StateDir, container: &str) -> Self {
        Self {
            layout: state.layout().join(container),
            shared: state.shared().join(container),
            staging: state.staging().join(container),
        }
    }

    /// Mounts everything, or nothing. `hooks` may change the root before the guest can see it, unless
    /// it is not there.
    pub(super) fn mount(
        &self,
        bundle: &Path,
        guest: &GuestSpec,
        root: Root,
        hooks: impl FnOnce(Option<StagedRoot<'_>>) -> Result<(), HookError>,
    ) -> Result<(), ContainerError> {
        let mounted = self.mount_all(bundle, guest, root, hooks);
        if mounted.is_err() {
            // What went wrong first is what the caller should know.
            let _ = self.unmount();
        }
        mounted
    }

    fn mount_all(
        &self,
        bundle: &Path,
        guest: &GuestSpec,
        root: Root,
        hooks: impl FnOnce(Option<StagedRoot<'_>>) -> Result<(), HookError>,
    ) -> Result<(), ContainerError> {
        for directory in [&self.layout, &self.staging] {
            make_directory(directory)?;
        }
        make_directory(&self.layout.join("mounts"))?;
        // If the root is on a disk, the guest mounts it here.
        make_directory(&self.layout.join("rootfs"))?;
        let place = self.staging.join("rootfs");
        let target = self.shared.join("rootfs");
        let staged = match root {
            Root::Disk => None,
            Root::Share(mut rootfs) => {
                let is_in_place = rootfs.is_empty();
                if is_in_place {
                    rootfs.push(own_root(&bundle.join(&guest.root))?);
                }
                make_directory(&place)?;
                mounts::stage_rootfs(&rootfs, &place, &target)?;
                let staging = place.as_path();
                Some(StagedRoot {
                    staging,
                    is_in_place,
                })
            }
        };
        for (index, volume) in guest.volumes.iter().enumerate() {
            let volume = Volume {
                source: bundle.join(&volume.source),
                ..volume.clone()
            };
            self.mount_volume(&volume, &index.to_string())?;
        }
        hooks(staged)?;
        match staged {
            Some(staged) => Ok(mounts::publish(staged.staging, &target)?),
            None => Ok(()),
        }
    }

    fn mount_volume(&self, volume: &Volume, name: &str) -> Result<(), ContainerError> {
        let source = &volume.source;
        let metadata = fs::metadata(source).map_err(|error| state_error("find", source, error))?;
        let filesystem =
            statfs(source).map_err(|error| state_error("find", source, error.into()))?;
        let reason = refusal(metadata.file_type(), metadata.rdev());
        if let Some(reason) = reason.or(refusal_of_all(filesystem.filesystem_type())) {
            return Err(MountError::Unsupported {
                what: source.clone(),
                reason,
            }
            .into());
        }
        let place = self.staging.join(name);
        for path in [&place, &self.layout.join("mounts").join(name)] {
            if metadata.is_dir() {
                make_directory(path)?;
            } else {
                File::create_new(path).map_err(|error| state_error("create", path, error))?;
            }
        }
        let target = self.shared.join("mounts").join(name);
        Ok(mounts::mount_volume(volume, &place, &target)?)
    }

    /// Unmounts and removes everything. Nothing there is no error.
    pub(super) fn unmount(&self) -> Result<(), ContainerError> {
        for root in [&self.shared, &self.staging] {
            let points = mounts::mount_points_below(root)
                .map_err(|error| state_error("find mounts below", root, error))?;
            for point in points {
                mounts::unmount(&point).map_err(|error| state_error("unmount", &point, error))?;
            }
        }
        for directory in [&self.layout, &self.staging] {
            remove_tree(directory).map_err(|error| state_error("remove", directory, error))?;
        }
        Ok(())
    }
}

/// Where a container's volume is, below the share.
pub(super) fn volume_place(container: &str, index: usize) -> PathBuf {
    Path::new(container).join("mounts").join(index.to_string())
}

/// The mount for a root file system that is a directory of the bundle.
fn own_root(path: &Path) -> Result<RootfsMount, ContainerError> {
    let metadata = fs::metadata(path).map_err(|error| state_error("find", path, error))?;
    let Some(source) = path.to_str().filter(|_| metadata.is_dir()) else {
        return Err(MountError::Unsupported {
            what: path.to_owned(),
            reason: "a root file system must be a directory with a name in UTF-8",
        }
        .into());
    };
    Ok(RootfsMount {
        fstype: "bind".to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: vec!["rbind".to_owned()],
    })
}

/// Why a file of the host can't be a volume: what lies behind it would be the guest's, not the
/// host's.
fn refusal(kind: FileType, device: u64) -> Option<&'static str> {
    if kind.is_socket() {
        Some("a guest can't connect to a socket of the host")
    } else if kind.is_block_device() {
        Some("a block device of the host can't be a bind mount of a guest")
    } else if kind.is_char_device() && rustix::fs::major(device) != MEMORY_DEVICES {
        Some("a device of the host can't be a bind mount of a guest")
    } else {
        None
    }
}

/// Why nothing of a file system of the host's can be a volume.
fn refusal_of_all(filesystem: FsType) -> Option<&'static str> {
    // They can't be written, and a mapping of the guest's would have pages of its own.
    (filesystem == HUGETLBFS_MAGIC).then_some("huge pages of the host are not the guest's")
}

/// null, zero, full, random and urandom: the same in every kernel.
const MEMORY_DEVICES: u32 = 1;

fn make_directory(path: &Path) -> Result<(), ContainerError> {
    fs::create_dir(path).map_err(|error| state_error("create the directory", path, error))
}

fn state_error(operation: &'static str, path: &Path, source: io::Error) -> ContainerError {
    ContainerError::State {
        operation,
        path: path.to_owned(),
        source,
    }
}
