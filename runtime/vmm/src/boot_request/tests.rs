use std::os::unix::net::UnixStream;

use super::*;

fn config() -> BootConfig {
    BootConfig {
        vcpus: 1,
        memory_mib: 128,
        memory_max_mib: 256,
        cmdline_extra: "quiet".to_owned(),
        shared_dir: "/srv".to_owned(),
        cgroup_dir: String::new(),
        net: Vec::new(),
        disks: 0,
        share_cache_ms: 0,
        share_echo_group: None,
    }
}

/// Descriptors of the right kinds; any character device stands for /dev/kvm.
fn descriptors() -> Vec<OwnedFd> {
    let file = || tempfile::tempfile().unwrap().into();
    let (agent, _) = UnixStream::pair().unwrap();
    let device = File::open("/dev/null").unwrap();
    vec![device.into(), file(), file(), file(), agent.into()]
}

fn refusal(change: impl FnOnce(&mut BootConfig)) -> String {
    let mut config = config();
    change(&mut config);
    Boot::new(config, descriptors()).unwrap_err().to_string()
}

fn refusal_of_descriptor(index: usize, replacement: OwnedFd) -> String {
    let mut descriptors = descriptors();
    descriptors[index] = replacement;
    Boot::new(config(), descriptors).unwrap_err().to_string()
}

#[test]
fn numbers_outside_the_limits_are_refused() {
    assert!(refusal(|c| c.vcpus = 0).contains("0 virtual CPUs"));
    assert!(refusal(|c| c.vcpus = VCPUS_MAX + 1).contains("virtual CPUs"));
    assert!(refusal(|c| c.memory_mib = MEMORY_MIB_MIN - 1).contains("MiB"));
    assert!(refusal(|c| c.memory_mib = MEMORY_MIB_MAX + 1).contains("MiB"));
    assert!(refusal(|c| c.memory_max_mib = MEMORY_MIB_MAX + 1).contains("MiB"));
    assert!(refusal(|c| c.disks = DISKS_MAX + 1).contains("17 slots for disks"));
}

#[test]
fn command_line_takes_printable_words_only() {
    assert!(refusal(|c| c.cmdline_extra = "a\nb".to_owned()).contains("command line"));
    assert!(refusal(|c| c.cmdline_extra = "a\0".to_owned()).contains("command line"));
    assert!(refusal(|c| c.cmdline_extra = "ä".to_owned()).contains("command line"));
    assert!(refusal(|c| c.cmdline_extra = "x".repeat(1025)).contains("command line"));
}

#[test]
fn paths_must_be_absolute() {
    assert!(refusal(|c| c.shared_dir = "srv".to_owned()).contains("shared_dir \"srv\""));
    assert!(refusal(|c| c.shared_dir = String::new()).contains("shared_dir"));
    assert!(refusal(|c| c.shared_dir = "/a\0b".to_owned()).contains("shared_dir"));
    assert!(refusal(|c| c.cgroup_dir = "pod".to_owned()).contains("cgroup_dir"));
}

#[test]
fn descriptors_must_be_as_many_and_of_the_kind_named() {
    let regular = || OwnedFd::from(tempfile::tempfile().unwrap());
    let directory = || OwnedFd::from(File::open("/").unwrap());

    let missing = Boot::new(config(), vec![regular()]).unwrap_err();
    let mut one_more = descriptors();
    one_more.push(regular());
    let surplus = Boot::new(config(), one_more).unwrap_err();

    assert!(missing.to_string().contains("1 descriptors"));
    assert!(surplus.to_string().contains("6 descriptors"));
    assert!(refusal_of_descriptor(0, regular()).contains("/dev/kvm"));
    assert!(refusal_of_descriptor(1, directory()).contains("kernel"));
    assert!(refusal_of_descriptor(2, directory()).contains("initrd"));
    assert!(refusal_of_descriptor(3, directory()).contains("console"));
    assert!(refusal_of_descriptor(4, regular()).contains("agent"));
    let (datagram, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
    assert!(refusal_of_descriptor(4, datagram.into()).contains("agent"));
}

#[test]
fn good_request_is_taken_with_an_empty_cgroup_as_none() {
    let boot = Boot::new(config(), descriptors()).unwrap();

    assert_eq!(boot.cgroup_dir, None);
    assert_eq!(boot.shared_dir, PathBuf::from("/srv"));
}

#[test]
fn taps_come_one_for_each_network_device_with_an_address() {
    let booted = |devices: usize, taps: Vec<OwnedFd>| {
        let mac = Some([2; 6]);
        let mut net = vec![NetConfig { mac: None }];
        net.extend(vec![NetConfig { mac }; devices]);
        let mut descriptors = descriptors();
        descriptors.extend(taps);
        let boot = Boot::new(BootConfig { net, ..config() }, descriptors);
        boot.map(|boot| boot.net.iter().map(Option::is_some).collect::<Vec<_>>())
    };
    let refusal = |devices, taps| booted(devices, taps).unwrap_err().to_string();
    let device = || File::open("/dev/null").unwrap().into();
    let file = || tempfile::tempfile().unwrap().into();

    assert!(refusal(1, vec![]).contains("it takes 6"));
    assert!(refusal(0, vec![device()]).contains("it takes 5"));
    assert!(refusal(1, vec![file()]).contains("a tap"));
    assert!(refusal(NET_DEVICES_MAX, vec![]).contains("network devices"));
    let is_plugged = booted(2, vec![device(), device()]).unwrap();
    assert_eq!(is_plugged, [false, true, true]);
}
