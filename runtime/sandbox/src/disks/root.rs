//! A container's root as a disk of the guest: what snapshotters give that keep each root in a block
//! device (containerd's devmapper) or in a file (blockfile, and erofs for a view of one layer).
//!
//! The host's kernel would have to understand what an image holds, and every access would pass through
//! the file server. Here the guest's kernel mounts it, and the host only reads and writes blocks.

use std::path::Path;

use husk_protocol::DISK_FILE_SYSTEMS;
use husk_protocol::messages;
use nix::mount::MsFlags;

use super::GuestDisk;
use super::host::{Origin, image};
use super::wanted::{HostDevice, Place, WantedDisk};
use crate::RootfsMount;
use crate::mounts::Options;
use crate::spec::SpecError;

/// A root that the guest is to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootDisk {
    pub(crate) wanted: WantedDisk,
    /// Where there is no slot for it, it can be mounted on the host.
    pub(crate) can_be_on_host: bool,
    kind: String,
    /// For the guest.
    options: Vec<String>,
}

impl RootDisk {
    /// Whether mounts may be such a root. All others need not be looked for.
    pub(crate) fn is_likely(rootfs: &[RootfsMount]) -> bool {
        let has_name = |mount: &RootfsMount| DISK_FILE_SYSTEMS.contains(&mount.fstype.as_str());
        matches!(rootfs, [mount] if has_name(mount) && mount.target.trim_matches('/').is_empty())
    }

    /// Chooses where a root is mounted: in the guest, or on the host if it is none of these. Hooks that
    /// run in the root need it on the host, `has_hooks_inside` says. Blocks.
    ///
    /// # Errors
    /// [`SpecError`] for what can be mounted nowhere.
    pub(crate) fn of(
        rootfs: &[RootfsMount],
        has_hooks_inside: bool,
    ) -> Result<Option<Self>, SpecError> {
        let [mount] = rootfs else {
            return Ok(None);
        };
        if !Self::is_likely(rootfs) {
            return Ok(None);
        }
        let refuse = |reason| SpecError::Root {
            image: mount.source.clone().into(),
            reason,
        };
        let is_loop = |option: &&String| *option == LOOP;
        let has_loop = mount.options.iter().any(|option| is_loop(&option));
        let options = mount.options.iter().filter(|option| !is_loop(option));
        let parsed = Options::parse(&options.cloned().collect::<Vec<_>>()).map_err(refuse)?;
        if parsed.flags.contains(MsFlags::MS_BIND) {
            return Ok(None);
        }
        let is_read_only = parsed.flags.contains(MsFlags::MS_RDONLY)
            || READ_ONLY_FILE_SYSTEMS.contains(&mount.fstype.as_str());
        let origin = image(Path::new(&mount.source)).map_err(refuse)?;
        let is_device = matches!(origin, Origin::Device(_));
        let can_be_on_host = is_device && !has_loop;
        if has_hooks_inside {
            return match can_be_on_host {
                true => Ok(None),
                false => Err(refuse(
                    "a createContainer hook needs it on the host, where an image is not mounted",
                )),
            };
        }
        let for_guest = |option: &&String| !is_loop(option) && !option.starts_with(CONTAINERDS_OWN);
        let mut options: Vec<_> = mount.options.iter().filter(for_guest).cloned().collect();
        options.retain(|option| !option.is_empty());
        if is_read_only {
            // The last one wins.
            options.push("ro".to_owned());
        }
        Ok(Some(Self {
            wanted: WantedDisk {
                place: Place::Root,
                device: HostDevice::Image(mount.source.clone().into()),
                is_read_only,
                what: "the root file system".to_owned(),
            },
            can_be_on_host,
            kind: mount.fstype.clone(),
            options,
        }))
    }

    /// For the agent, once the guest has the disk.
    pub(super) fn on(self, disk: &GuestDisk) -> messages::RootDisk {
        messages::RootDisk {
            node: disk.node.display().to_string(),
            kind: self.kind,
            options: self.options,
            ..Default::default()
        }
    }
}

/// mount(8): the source is a file. Of no interest to the guest, which has a disk.
const LOOP: &str = "loop";

/// Options with which containerd speaks to itself.
const CONTAINERDS_OWN: &str = "X-containerd.";

/// Those that nobody can write to.
const READ_ONLY_FILE_SYSTEMS: [&str; 2] = ["erofs", "squashfs"];

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// As containerd's blockfile snapshotter has it.
    fn mount(source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fstype: "ext4".to_owned(),
            source: source.display().to_string(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    fn file(directory: &Path, name: &str, bytes: u64) -> PathBuf {
        let path = directory.join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn refusal(mount: RootfsMount, has_hooks_inside: bool) -> String {
        let source = mount.source.clone();
        let refused = RootDisk::of(&[mount], has_hooks_inside).unwrap_err();
        let text = refused.to_string();
        assert!(text.contains(&format!("{source:?}")), "{text}");
        text
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        let image = file(place, "image", 1 << 20);
        symlink(&image, place.join("link")).unwrap();
        symlink(place, place.join("links")).unwrap();
        for (source, reason) in [
            (place.to_owned(), "neither a block device nor a file"),
            (place.join("links"), "neither a block device nor a file"),
            ("/dev/null".into(), "neither a block device nor a file"),
            (place.join("missing"), "not there"),
            (image.join("below"), "not there"),
            ("image".into(), "not an absolute path"),
            (place.join("link"), "a link"),
            (file(place, "empty", 0), "empty"),
            (file(place, "odd", (1 << 20) + 511), "no multiple of 512"),
        ] {
            let text = refusal(mount(&source, &["loop", "rw"]), false);
            assert!(text.contains(reason), "{text}");
        }
    }

    #[test]
    fn options_that_no_root_can_have_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let image = file(place.path(), "image", 1 << 20);
        for option in ["remount", "uidmap=0:1000:1"] {
            refusal(mount(&image, &["loop", option]), false);
        }
    }

    #[test]
    fn image_of_a_container_with_hooks_inside_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let image = file(place.path(), "image", 1 << 20);
        for options in [&["loop", "rw"][..], &["ro"]] {
            let text = refusal(mount(&image, options), true);
            assert!(text.contains("createContainer"), "{text}");
        }
    }

    #[test]
    fn roots_of_other_kinds_are_the_hosts() {
        let place = tempfile::tempdir().unwrap();
        let image = file(place.path(), "image", 1 << 20);
        let root = mount(&image, &["rw"]);
        let of_kind = |fstype: &str| RootfsMount {
            fstype: fstype.to_owned(),
            ..root.clone()
        };
        let below = RootfsMount {
            target: "/usr".to_owned(),
            ..root.clone()
        };
        for rootfs in [
            vec![],
            vec![of_kind("overlay")],
            vec![of_kind("bind")],
            vec![of_kind("xfs")],
            vec![of_kind("")],
            vec![mount(&image, &["rbind", "rw"])],
            vec![root.clone(), of_kind("overlay")],
            vec![below],
        ] {
            assert_eq!(RootDisk::of(&rootfs, false).unwrap(), None, "{rootfs:?}");
        }
    }

    #[test]
    fn guest_is_told_how_to_mount_it() {
        let place = tempfile::tempdir().unwrap();
        let image = file(place.path(), "image", 1 << 20);
        let disk = GuestDisk {
            number: super::super::Number {
                major: 254,
                minor: 0,
            },
            node: "/dev/vda".into(),
        };
        for (kind, options, is_read_only, expected) in [
            ("ext4", &["loop", "rw"][..], false, &["rw"][..]),
            ("ext4", &[], false, &[]),
            ("ext4", &["ro", "noatime"], true, &["ro", "noatime", "ro"]),
            ("ext4", &["ro", "", "rw"], false, &["ro", "rw"]),
            ("erofs", &["loop", "X-containerd.a=b"], true, &["ro"]),
            ("squashfs", &["rw"], true, &["rw", "ro"]),
        ] {
            let root = RootfsMount {
                fstype: kind.to_owned(),
                target: "/".to_owned(),
                ..mount(&image, options)
            };
            let root = RootDisk::of(&[root], false).unwrap().unwrap();
            assert_eq!(root.wanted.is_read_only, is_read_only, "{kind} {options:?}");
            assert!(!root.can_be_on_host);
            let told = root.on(&disk);
            assert_eq!((told.node.as_str(), told.kind.as_str()), ("/dev/vda", kind));
            assert_eq!(told.options, expected, "{kind} {options:?}");
        }
    }
}
