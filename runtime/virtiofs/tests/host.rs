//! The server mounted on the host, against the host's own file system.
//!
//! Takes root and `/dev/fuse`; skips, loudly, where they are not there.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use husk_virtiofs::front::Mounted;
use husk_virtiofs::{CachePolicy, Options, Server};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// As many as a small guest has.
const THREADS: usize = 2;

#[test]
fn shared_share_is_like_the_host() {
    compare(CachePolicy::SHARED, false);
}

#[test]
fn private_share_is_like_the_host() {
    compare(CachePolicy::PRIVATE, false);
}

#[test]
fn share_with_writeback_is_like_the_host() {
    compare(CachePolicy::PRIVATE, true);
}

/// Runs all checks on the host's file system and on a mount of the server over it.
fn compare(policy: CachePolicy, writeback: bool) {
    if let Some(reason) = unusable() {
        eprintln!("SKIPPED: the server can't be mounted: {reason}");
        return;
    }
    let program = build_checks();
    let place = tempfile::tempdir_in(host_directory()).unwrap();
    let (share, mount_point) = (place.path().join("share"), place.path().join("mount"));
    std::fs::create_dir(&share).unwrap();
    std::fs::create_dir(&mount_point).unwrap();
    // Other users have to get there.
    for path in [place.path(), &share, &mount_point] {
        rustix::fs::chmod(path, Mode::from_raw_mode(0o755)).unwrap();
    }

    let expected = run(&program, &share);

    let options = Options {
        writeback,
        ..Options::single(directory("/proc/self/fd".as_ref()), policy)
    };
    let server = Arc::new(Server::new(directory(&share), options).unwrap());
    let mounted = Mounted::new(&server, &mount_point, THREADS).unwrap();
    let got = run(&program, &mount_point);
    mounted.unmount().unwrap();

    assert_eq!(got, expected);
    assert!(expected.ends_with(" 0 skipped\n"), "{expected}");
    assert!(expected.contains(" 0 failed, "), "{expected}");
    assert_eq!(server.counters().handles, 0);
}

fn run(program: &Path, directory: &Path) -> String {
    let output = Command::new(program).arg(directory).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Builds the checks beside this test and returns where they are.
fn build_checks() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", "husk-fscheck"])
        .status()
        .unwrap();
    assert!(built.success());
    // This test is in `deps` of the directory of the profile.
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    profile.join("husk-fscheck")
}

/// A directory on a real file system: the one that the build is on.
fn host_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn directory(path: &Path) -> std::os::fd::OwnedFd {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).unwrap()
}

fn unusable() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    match openat(
        CWD,
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(_) => None,
        Err(errno) => Some(format!("/dev/fuse: {errno}")),
    }
}
