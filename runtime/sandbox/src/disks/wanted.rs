//! What a spec says of block devices: which of the host's it asks for, and their numbers, which are
//! others in the guest.

use std::path::PathBuf;

use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxDeviceCgroup, LinuxDeviceType, LinuxThrottleDevice,
    LinuxThrottleDeviceBuilder, Mount, Spec,
};

use super::{GuestDisk, Number};
use crate::spec::SpecError;

/// A block device of the host that a spec asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedDisk {
    /// Where in the spec.
    pub(crate) place: Place,
    pub(crate) device: HostDevice,
    pub(crate) is_read_only: bool,
    /// The part of the spec, for people.
    pub(crate) what: String,
}

/// What in a spec asks for a block device, by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Of `linux.devices`.
    Device(usize),
    /// Of `mounts`.
    Mount(usize),
    /// The root, which is asked for beside the spec.
    Root,
}

/// How a spec names a block device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostDevice {
    Number(Number),
    Path(PathBuf),
    /// A device, or a file with what one would hold.
    Image(PathBuf),
}

/// The block devices that a container is to have nodes of. One that may use all devices has the
/// guest's, whatever the host has.
pub(crate) fn of_devices(linux: &Linux) -> Result<Vec<WantedDisk>, SpecError> {
    let rules = linux.resources().as_ref();
    let rules = rules.and_then(|all| all.devices().as_deref());
    let rules = rules.unwrap_or_default();
    let last = rules.iter().rfind(|rule| is_for_all(rule));
    if last.is_some_and(LinuxDeviceCgroup::allow) {
        return Ok(Vec::new());
    }
    let devices = linux.devices().iter().flatten().enumerate();
    let blocks = devices.filter(|(_, device)| device.typ() == LinuxDeviceType::B);
    blocks
        .map(|(index, device)| {
            let what = format!("linux.devices, {:?}", device.path());
            let Some(number) = Number::of(device.major(), device.minor()) else {
                let reason = "it has no number of a block device";
                return Err(SpecError::Unsupported { what, reason });
            };
            Ok(WantedDisk {
                place: Place::Device(index),
                device: HostDevice::Number(number),
                is_read_only: !may_write(rules, number),
                what,
            })
        })
        .collect()
}

/// The block device that a mount of a file system is from.
pub(crate) fn of_mount(index: usize, mount: &Mount) -> Result<WantedDisk, SpecError> {
    let what = format!("mount at {:?}", mount.destination());
    let source = mount.source().clone();
    let Some(source) = source.filter(|source| source.is_absolute()) else {
        let reason = "its source is not the absolute path of a block device";
        return Err(SpecError::Unsupported { what, reason });
    };
    let options = mount.options().iter().flatten();
    Ok(WantedDisk {
        place: Place::Mount(index),
        device: HostDevice::Path(source),
        // The last one wins.
        is_read_only: options
            .rev()
            .find(|option| matches!(option.as_str(), "ro" | "rw"))
            .is_some_and(|option| option == "ro"),
        what,
    })
}

/// Whether a rule is about every device.
fn is_for_all(rule: &LinuxDeviceCgroup) -> bool {
    let is_any = |number: Option<i64>| matches!(number, None | Some(-1));
    matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && is_any(rule.major())
        && is_any(rule.minor())
}

/// Whether rules allow that a block device is written to. The last one that speaks of it wins.
fn may_write(rules: &[LinuxDeviceCgroup], number: Number) -> bool {
    let is_it = |wanted: Option<i64>, part: u32| match wanted {
        None | Some(-1) => true,
        Some(wanted) => wanted == i64::from(part),
    };
    let speaks_of_it = |rule: &&LinuxDeviceCgroup| {
        matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        ) && is_it(rule.major(), number.major)
            && is_it(rule.minor(), number.minor)
            && rule
                .access()
                .as_ref()
                .is_none_or(|access| access.contains('w'))
    };
    let last = rules.iter().rfind(speaks_of_it);
    last.is_some_and(LinuxDeviceCgroup::allow)
}

/// Has a place speak of the guest's disk.
pub(super) fn place(spec: &mut Spec, place: Place, disk: &GuestDisk) {
    match place {
        Place::Device(index) => {
            let devices = spec.linux_mut().as_mut().map(Linux::devices_mut);
            let mut devices = devices.into_iter().flatten().flatten();
            if let Some(device) = devices.nth(index) {
                device
                    .set_major(disk.number.major.into())
                    .set_minor(disk.number.minor.into());
            }
        }
        Place::Mount(index) => {
            let mut mounts = spec.mounts_mut().iter_mut().flatten();
            if let Some(mount) = mounts.nth(index) {
                mount.set_source(Some(disk.node.clone()));
            }
        }
        Place::Root => {}
    }
}

/// Has rules and throttles speak of the guest's disks. A rule for one block device of the host that the
/// guest does not have means nothing there, and must not mean another one.
pub(super) fn renumber(linux: &mut Linux, guests: impl Fn(Number) -> Option<Number>) {
    let Some(resources) = linux.resources_mut() else {
        return;
    };
    if let Some(rules) = resources.devices_mut() {
        rules.retain_mut(|rule| {
            let (Some(major), Some(minor)) = (rule.major(), rule.minor()) else {
                return true;
            };
            let number = Number::of(major, minor);
            let (Some(number), Some(LinuxDeviceType::B)) = (number, rule.typ()) else {
                return true;
            };
            let Some(number) = guests(number) else {
                return false;
            };
            rule.set_major(Some(number.major.into()))
                .set_minor(Some(number.minor.into()));
            true
        });
    }
    if let Some(limits) = resources.block_io_mut() {
        renumber_throttles(limits, guests);
    }
}

fn renumber_throttles(limits: &mut LinuxBlockIo, guests: impl Fn(Number) -> Option<Number>) {
    let renumbered = |throttles: &Option<Vec<LinuxThrottleDevice>>| {
        let mut throttles = throttles.clone();
        for throttle in throttles.iter_mut().flatten() {
            let number = Number::of(throttle.major(), throttle.minor());
            let Some(number) = number.and_then(&guests) else {
                continue;
            };
            let renumbered = LinuxThrottleDeviceBuilder::default()
                .major(number.major)
                .minor(number.minor)
                .rate(throttle.rate());
            // Nothing of it is required.
            if let Ok(renumbered) = renumbered.build() {
                *throttle = renumbered;
            }
        }
        throttles
    };
    let read_bytes = renumbered(limits.throttle_read_bps_device());
    let written_bytes = renumbered(limits.throttle_write_bps_device());
    let reads = renumbered(limits.throttle_read_iops_device());
    let writes = renumbered(limits.throttle_write_iops_device());
    limits
        .set_throttle_read_bps_device(read_bytes)
        .set_throttle_write_bps_device(written_bytes)
        .set_throttle_read_iops_device(reads)
        .set_throttle_write_iops_device(writes);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const DISK: Number = Number { major: 7, minor: 3 };

    fn linux(rules: &Value) -> Linux {
        let linux = json!({
            "devices": [
                { "type": "c", "path": "/dev/null2", "major": 1, "minor": 3 },
                { "type": "b", "path": "/dev/disk", "major": 7, "minor": 3 },
            ],
            "resources": { "devices": rules },
        });
        serde_json::from_value(linux).unwrap()
    }

    fn only(rules: &Value) -> Option<WantedDisk> {
        of_devices(&linux(rules)).unwrap().into_iter().next()
    }

    fn rule(allow: bool, access: &str) -> Value {
        json!({ "allow": allow, "type": "b", "major": 7, "minor": 3, "access": access })
    }

    #[test]
    fn number_of_no_device_is_refused_by_name() {
        for (major, minor) in [(-1, 0), (7, -1), (1 << 33, 0), (0, 0)] {
            let mut linux = linux(&json!([]));
            let devices = linux.devices_mut().as_mut().unwrap();
            devices[1].set_major(major).set_minor(minor);
            let text = of_devices(&linux).unwrap_err().to_string();
            assert!(text.contains("/dev/disk"), "{text}");
        }
    }

    #[test]
    fn mount_from_no_path_is_refused_by_name() {
        for source in [json!(null), json!("disk"), json!("../dev/sda")] {
            let mount = json!({ "destination": "/a", "type": "ext4", "source": source });
            let mount: Mount = serde_json::from_value(mount).unwrap();
            let text = of_mount(0, &mount).unwrap_err().to_string();
            assert!(text.contains("/a"), "{text}");
        }
    }

    #[test]
    fn only_what_rules_allow_to_be_written_is_writable() {
        for (rules, is_read_only) in [
            (json!([]), true),
            (json!([rule(true, "r")]), true),
            (json!([rule(true, "rwm"), rule(false, "w")]), true),
            (json!([rule(true, "rwm"), { "allow": false }]), true),
            (
                json!([{ "allow": true, "type": "c", "access": "rwm" }]),
                true,
            ),
            (json!([rule(true, "rwm")]), false),
            (json!([rule(true, "w"), rule(false, "m")]), false),
            (
                json!([{ "allow": false, "access": "rwm" }, rule(true, "rw")]),
                false,
            ),
            (
                json!([{ "allow": true, "type": "b", "major": 7, "minor": -1 }]),
                false,
            ),
        ] {
            let wanted = only(&rules).unwrap();
            assert_eq!(wanted.is_read_only, is_read_only, "{rules}");
            assert_eq!(wanted.place, Place::Device(1));
            assert_eq!(wanted.device, HostDevice::Number(DISK));
        }
    }

    #[test]
    fn container_with_all_devices_gets_none_of_the_hosts() {
        assert_eq!(only(&json!([{ "allow": true, "access": "rwm" }])), None);
        let taken = json!([{ "allow": true, "access": "rwm" }, { "allow": false }]);
        assert!(only(&taken).is_some());
    }

    #[test]
    fn last_option_says_whether_a_mount_is_written_to() {
        for (options, is_read_only) in [
            (json!([]), false),
            (json!(["ro", "noatime"]), true),
            (json!(["ro", "rw"]), false),
        ] {
            let mount = json!({ "destination": "/a", "type": "ext4", "source": "/dev/sda",
                                "options": options });
            let wanted = of_mount(4, &serde_json::from_value(mount).unwrap()).unwrap();
            assert_eq!(wanted.is_read_only, is_read_only, "{options}");
            assert_eq!(wanted.device, HostDevice::Path("/dev/sda".into()));
        }
    }

    #[test]
    fn rules_and_throttles_follow_the_disk() {
        let mut linux = linux(&json!([
            { "allow": false, "access": "rwm" },
            rule(true, "r"),
            { "allow": true, "type": "b", "major": 254, "minor": 0, "access": "rwm" },
            { "allow": true, "type": "c", "major": 254, "minor": 0, "access": "rwm" },
        ]));
        let limits = json!({ "throttleReadBpsDevice": [{ "major": 7, "minor": 3, "rate": 9 }] });
        let limits = serde_json::from_value(limits).unwrap();
        linux.resources_mut().as_mut().unwrap().set_block_io(limits);
        let in_guest = Number {
            major: 254,
            minor: 16,
        };

        renumber(&mut linux, |number| (number == DISK).then_some(in_guest));

        let text = serde_json::to_value(linux.resources()).unwrap();
        let expected = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "r" },
            { "allow": true, "type": "c", "major": 254, "minor": 0, "access": "rwm" },
        ]);
        assert_eq!(text["devices"], expected);
        let throttle = &text["blockIO"]["throttleReadBpsDevice"][0];
        assert_eq!(*throttle, json!({ "major": 254, "minor": 16, "rate": 9 }));
    }
}
