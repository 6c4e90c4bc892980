//! The places of devices that may come and go while the machine runs: interfaces and disks.
//!
//! The kernel knows all places from its start. In one that is empty it has found a placeholder, and
//! left it alone; told to look again, it finds the device that has come. A device that has gone it
//! has to be told to let go of. Either is done when the kernel returns.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel shows devices that it was told of, and their drivers.
const BUS: &str = "/sys/bus/platform";

/// How it calls the places of virtio devices, before their number.
const PREFIX: &str = "virtio-mmio.";

/// The driver of all of them.
const DRIVER: &str = "drivers/virtio-mmio";

/// What the kernel makes of the devices of some places, by its name for the kind.
const INTERFACE: &str = "net";
const DISK: &str = "block";

/// Places of one kind of device, in the order in which the host counts them.
#[derive(Debug)]
pub(crate) struct Slots {
    bus: PathBuf,
    kind: &'static str,
    names: Vec<String>,
}

impl Slots {
    /// Those of network devices. The last places of a machine are for so many disks; all other
    /// devices are there from its start.
    pub(crate) fn of_interfaces(disks: usize) -> io::Result<Self> {
        Self::of_interfaces_on(Path::new(BUS), disks)
    }

    fn of_interfaces_on(bus: &Path, disks: usize) -> io::Result<Self> {
        let mut names = places(bus)?;
        names.truncate(names.len().saturating_sub(disks));
        let mut found = Vec::new();
        for name in names {
            let place = bus.join("devices").join(&name);
            if !is_driven(&place) || made_in(&place, INTERFACE)?.is_some() {
                found.push(name);
            }
        }
        Ok(Self {
            bus: bus.to_owned(),
            kind: INTERFACE,
            names: found,
        })
    }

    /// Those of disks, of which there are so many.
    pub(crate) fn of_disks(count: usize) -> io::Result<Self> {
        Self::of_disks_on(Path::new(BUS), count)
    }

    fn of_disks_on(bus: &Path, count: usize) -> io::Result<Self> {
        let mut names = places(bus)?;
        let names = names.split_off(names.len().saturating_sub(count));
        Ok(Self {
            bus: bus.to_owned(),
            kind: DISK,
            names,
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.names.len()
    }

    /// Has the kernel look for the device of a place, unless it has one there. Answers with the
    /// directory in which the kernel shows what it has made of it.
    pub(crate) fn drive(&self, slot: usize) -> io::Result<PathBuf> {
        let name = self.name(slot)?;
        let place = self.place(name);
        if let Some(made) = made_in(&place, self.kind)? {
            return Ok(made);
        }
        fs::write(self.bus.join(DRIVER).join("bind"), name)?;
        made_in(&place, self.kind)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Ends what the kernel has made of a device, if there is one.
    pub(crate) fn let_go(&self, slot: usize) -> io::Result<()> {
        let name = self.name(slot)?;
        match is_driven(&self.place(name)) {
            true => fs::write(self.bus.join(DRIVER).join("unbind"), name),
            false => Ok(()),
        }
    }

    fn name(&self, slot: usize) -> io::Result<&str> {
        let name = self.names.get(slot).map(String::as_str);
        name.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn place(&self, name: &str) -> PathBuf {
        self.bus.join("devices").join(name)
    }
}

/// The names of all places of virtio devices, in their order.
fn places(bus: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(bus.join("devices"))? {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        let number = name.strip_prefix(PREFIX).map(str::parse::<u32>);
        if let Some(Ok(number)) = number {
            found.push((number, name));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

fn is_driven(place: &Path) -> bool {
    place.join("driver").exists()
}

/// The directory of what the kernel has made of the device in a place, if it is of that kind.
fn made_in(place: &Path, kind: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let made = match fs::read_dir(entry.path().join(kind)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            made => made?,
        };
        if let Some(made) = made.into_iter().next() {
            return Ok(Some(made?.path()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel shows of a machine with two places of network devices and two of disks, one
    /// of each empty.
    fn machine() -> tempfile::TempDir {
        let bus = tempfile::tempdir().unwrap();
        for directory in [
            "drivers/virtio-mmio",
            "devices/serial8250",
            "devices/virtio-mmio.0/virtio0",
            "devices/virtio-mmio.9/virtio9/net/eth0",
            "devices/virtio-mmio.10",
            "devices/virtio-mmio.11",
            "devices/virtio-mmio.12/virtio12/block/vda",
        ] {
            fs::create_dir_all(bus.path().join(directory)).unwrap();
        }
        for driven in ["virtio-mmio.0", "virtio-mmio.9", "virtio-mmio.12"] {
            fs::create_dir(bus.path().join("devices").join(driven).join("driver")).unwrap();
        }
        bus
    }

    fn asked(bus: &tempfile::TempDir, what: &str) -> Option<String> {
        fs::read_to_string(bus.path().join(DRIVER).join(what)).ok()
    }

    #[test]
    fn places_are_counted_in_order_and_without_other_devices() {
        let bus = machine();

        let interfaces = Slots::of_interfaces_on(bus.path(), 2).unwrap();
        let disks = Slots::of_disks_on(bus.path(), 2).unwrap();

        assert_eq!(interfaces.names, ["virtio-mmio.9", "virtio-mmio.10"]);
        assert!(interfaces.drive(0).unwrap().ends_with("net/eth0"));
        assert!(interfaces.drive(2).is_err());
        assert_eq!(disks.names, ["virtio-mmio.11", "virtio-mmio.12"]);
        assert!(disks.drive(1).unwrap().ends_with("block/vda"));
    }

    #[test]
    fn more_disks_than_places_leave_none_for_interfaces() {
        let bus = machine();

        assert_eq!(Slots::of_disks_on(bus.path(), 9).unwrap().count(), 5);
        assert_eq!(Slots::of_interfaces_on(bus.path(), 9).unwrap().count(), 0);
    }

    #[test]
    fn device_that_does_not_come_when_called_is_an_error() {
        let bus = machine();
        let slots = Slots::of_interfaces_on(bus.path(), 2).unwrap();

        let error = slots.drive(1).unwrap_err();

        assert_eq!(asked(&bus, "bind").as_deref(), Some("virtio-mmio.10"));
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_a_device_that_is_there_is_let_go() {
        let bus = machine();
        let slots = Slots::of_interfaces_on(bus.path(), 2).unwrap();

        slots.let_go(1).unwrap();
        assert_eq!(asked(&bus, "unbind"), None);

        slots.let_go(0).unwrap();
        assert_eq!(asked(&bus, "unbind").as_deref(), Some("virtio-mmio.9"));
    }
}
