use super::*;

fn need(minor: u32, is_read_only: bool) -> Need {
    Need {
        origin: Origin::Device(Number { major: 7, minor }),
        node: format!("/dev/loop{minor}").into(),
        is_read_only,
        is_claimed: false,
        is_own: false,
        places: Vec::new(),
    }
}

fn plug(disks: &mut Disks, need: &Need, container: &str) -> usize {
    let slot = disks.free(need).unwrap();
    let disk = Disk {
        origin: need.origin,
        is_read_only: need.is_read_only,
        is_own: need.is_own,
        in_guest: GuestDisk {
            number: Number {
                major: 254,
                minor: 0,
            },
            node: "/dev/vda".into(),
        },
        claim: None,
        users: BTreeSet::from([container.to_owned()]),
    };
    disks.set(slot, Slot::Taken(disk));
    slot
}

#[test]
fn disk_without_a_slot_is_refused_by_name() {
    let mut disks = Disks::new(1);
    plug(&mut disks, &need(0, false), "a");
    let text = disks.free(&need(1, false)).unwrap_err().to_string();
    assert!(
        text.contains("1 slots") && text.contains("/dev/loop1"),
        "{text}"
    );
    assert!(Disks::default().free(&need(1, false)).is_err());
}

#[test]
fn disk_that_one_may_only_read_nobody_can_write_to() {
    let mut disks = Disks::new(2);
    plug(&mut disks, &need(0, true), "a");
    plug(&mut disks, &need(1, false), "a");
    let text = disks.shared(&need(0, false)).unwrap_err().to_string();
    assert!(
        text.contains("/dev/loop0") && text.contains("read-only"),
        "{text}"
    );
    assert!(disks.shared(&need(0, true)).unwrap().is_some());
    assert!(disks.shared(&need(1, true)).unwrap().is_some());
    assert!(disks.shared(&need(2, true)).unwrap().is_none());
}

#[test]
fn root_that_is_written_to_is_one_containers() {
    let own = |minor| Need {
        is_own: true,
        ..need(minor, false)
    };
    let mut disks = Disks::new(2);
    plug(&mut disks, &own(0), "a");
    plug(&mut disks, &need(1, false), "a");
    for need in [own(0), need(0, false), need(0, true), own(1)] {
        let text = disks.shared(&need).unwrap_err().to_string();
        assert!(text.contains("another container's root"), "{text}");
    }
    assert!(disks.shared(&own(2)).unwrap().is_none());
}

#[test]
fn disk_stays_for_as_long_as_a_container_has_it() {
    let mut disks = Disks::new(2);
    let slot = plug(&mut disks, &need(0, false), "a");
    let shared = disks.shared(&need(0, false)).unwrap().unwrap();
    shared.users.insert("b".to_owned());

    assert!(disks.leave("a").is_empty());
    assert!(disks.leave("a").is_empty());
    assert!(disks.leave("c").is_empty());
    assert_eq!(disks.leave("b"), [slot]);
}

#[test]
fn slot_that_the_guest_keeps_is_not_used_again() {
    let mut disks = Disks::new(1);
    disks.set(0, Slot::Lost);
    assert!(disks.free(&need(0, false)).is_err());
    disks.set(0, Slot::Free);
    assert_eq!(disks.free(&need(0, false)).unwrap(), 0);
}
