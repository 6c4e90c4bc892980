//! The real program and what the host gives it after the start: mounts, a cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use husk_vmm_control::Call;
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use crate::parent::{Parent, SPIN, is_able, proc_value, status_of};

/// Gives this thread, and what it starts, mounts of their own: none is left behind.
fn isolate_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
}

fn tmpfs(target: &Path) {
    mount("tmpfs", target, "tmpfs", MountFlags::empty(), None).unwrap();
}

#[test]
fn mounts_made_later_in_a_shared_directory_appear_and_go() {
    if !is_able() {
        return;
    }
    isolate_mounts();
    let mut parent = Parent::new(SPIN);
    let share = parent.share.path().to_owned();
    mount_bind(&share, &share).unwrap();
    mount_change(&share, MountPropagationFlags::SHARED).unwrap();
    let early = share.join("early");
    fs::create_dir(&early).unwrap();
    tmpfs(&early);
    fs::write(early.join("marker"), "").unwrap();
    let pid = parent.boot();
    let inside = PathBuf::from(format!("/proc/{pid}/root"));
    let late = share.join("late");
    fs::create_dir(&late).unwrap();

    tmpfs(&late);
    fs::write(late.join("marker"), "").unwrap();

    assert!(inside.join("early/marker").exists());
    assert!(inside.join("late/marker").exists());
    unmount(&late, UnmountFlags::empty()).unwrap();
    assert!(!inside.join("late/marker").exists());

    drop(parent);
    status_of(pid);
    unmount(&early, UnmountFlags::empty()).unwrap();
    unmount(&share, UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(&share).unwrap();
}

#[test]
fn machine_lives_in_the_cgroup_it_was_given() {
    if !is_able() {
        return;
    }
    let Some(mountpoint) = cgroup2() else {
        eprintln!("SKIPPED: no cgroup v2 hierarchy");
        return;
    };
    let group = mountpoint.join(format!("husk-test-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    let mut parent = Parent::new(SPIN);
    group
        .to_str()
        .unwrap()
        .clone_into(&mut parent.config.cgroup_dir);

    let pid = parent.boot();

    let expected = format!(":/{}", group.file_name().unwrap().to_str().unwrap());
    assert_eq!(proc_value(&format!("{pid}/cgroup"), "0:"), expected);
    parent.ask(Call::Stop).unwrap();
    status_of(pid);
    fs::remove_dir(&group).unwrap();
}

fn cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let is_cgroup2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    let line = mounts.lines().find(is_cgroup2)?;
    line.split(' ').nth(1).map(PathBuf::from)
}
