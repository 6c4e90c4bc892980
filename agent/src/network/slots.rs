//! The places of the machine's network devices, which may come and go while it runs.
//!
//! The kernel knows all places from its start. In one that is empty it has found a placeholder, and
//! left it alone; told to look again, it finds the device that has come. A device that has gone it
//! has to be told to let go of.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel shows devices that it was told of, and their drivers.
const BUS: &str = "/sys/bus/platform";

/// How it calls the places of virtio devices, before their number.
const PREFIX: &str = "virtio-mmio.";

/// The driver of all of them.
const DRIVER: &str = "drivers/virtio-mmio";

/// The places, in the order in which the host counts network devices.
#[derive(Debug)]
pub(super) struct Slots {
    bus: PathBuf,
    names: Vec<String>,
}

impl Slots {
    /// Those of this machine: the other devices of a machine are all there from its start.
    pub(super) fn find() -> io::Result<Self> {
        Self::on(Path::new(BUS))
    }

    fn on(bus: &Path) -> io::Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir(bus.join("devices"))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let number = name.strip_prefix(PREFIX).map(str::parse::<u32>);
            let Some(Ok(number)) = number else {
                continue;
            };
            let place = entry.path();
            if !is_driven(&place) || interface_of(&place)?.is_some() {
                found.push((number, name));
            }
        }
        found.sort_unstable();
        Ok(Self {
            bus: bus.to_owned(),
            names: found.into_iter().map(|(_, name)| name).collect(),
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// The index of a device's interface, once the kernel has been made to look for the device.
    pub(super) fn drive(&self, slot: usize) -> io::Result<u32> {
        let name = self.name(slot)?;
        let place = self.place(name);
        if let Some(index) = interface_of(&place)? {
            return Ok(index);
        }
        fs::write(self.bus.join(DRIVER).join("bind"), name)?;
        interface_of(&place)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Ends a device's interface, if it has one.
    pub(super) fn let_go(&self, slot: usize) -> io::Result<()> {
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

fn is_driven(place: &Path) -> bool {
    place.join("driver").exists()
}

/// The index of the interface of the device in a place.
fn interface_of(place: &Path) -> io::Result<Option<u32>> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b"virtio") {
            continue;
        }
        let interfaces = match fs::read_dir(entry.path().join("net")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            interfaces => interfaces?,
        };
        if let Some(interface) = interfaces.into_iter().next() {
            let index = fs::read_to_string(interface?.path().join("ifindex"))?;
            return Ok(index.trim().parse().ok());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel shows of a machine with two places of network devices, one of them empty.
    fn machine() -> (tempfile::TempDir, Slots) {
        let bus = tempfile::tempdir().unwrap();
        for directory in [
            "drivers/virtio-mmio",
            "devices/serial8250",
            "devices/virtio-mmio.0/virtio0/block",
            "devices/virtio-mmio.9/virtio9/net/eth0",
            "devices/virtio-mmio.10",
        ] {
            fs::create_dir_all(bus.path().join(directory)).unwrap();
        }
        for driven in ["virtio-mmio.0", "virtio-mmio.9"] {
            fs::create_dir(bus.path().join("devices").join(driven).join("driver")).unwrap();
        }
        let index = "devices/virtio-mmio.9/virtio9/net/eth0/ifindex";
        fs::write(bus.path().join(index), "7\n").unwrap();
        let slots = Slots::on(bus.path()).unwrap();
        (bus, slots)
    }

    #[test]
    fn places_are_counted_in_order_and_without_other_devices() {
        let (_bus, slots) = machine();

        assert_eq!(slots.names, ["virtio-mmio.9", "virtio-mmio.10"]);
        assert_eq!(slots.drive(0).unwrap(), 7);
        assert!(slots.drive(2).is_err());
    }

    #[test]
    fn device_that_does_not_come_when_called_is_an_error() {
        let (bus, slots) = machine();

        let error = slots.drive(1).unwrap_err();

        let asked = fs::read_to_string(bus.path().join("drivers/virtio-mmio/bind")).unwrap();
        assert_eq!(asked, "virtio-mmio.10");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_a_device_that_is_there_is_let_go() {
        let (bus, slots) = machine();
        let asked = || fs::read_to_string(bus.path().join("drivers/virtio-mmio/unbind")).ok();

        slots.let_go(1).unwrap();
        assert_eq!(asked(), None);

        slots.let_go(0).unwrap();
        assert_eq!(asked().as_deref(), Some("virtio-mmio.9"));
    }
}
