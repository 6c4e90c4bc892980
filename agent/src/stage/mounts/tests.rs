use std::os::unix::fs::symlink;

use super::*;

fn root() -> (tempfile::TempDir, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let fd = open_here(dir.path()).unwrap();
    (dir, fd)
}

#[test]
fn symlink_out_of_the_root_stays_inside() {
    let (dir, fd) = root();
    symlink("/etc", dir.path().join("way-out")).unwrap();
    open_or_create(fd.as_fd(), Path::new("/way-out/made"), Kind::File).unwrap();
    assert!(!Path::new("/etc/made").exists());
    assert!(dir.path().join("etc/made").is_file());
}

#[test]
fn relative_symlink_into_nowhere_is_followed() {
    let (dir, fd) = root();
    std::fs::create_dir(dir.path().join("etc")).unwrap();
    symlink("../../run/stub", dir.path().join("etc/resolv.conf")).unwrap();
    open_or_create(fd.as_fd(), Path::new("/etc/resolv.conf"), Kind::File).unwrap();
    assert!(dir.path().join("run/stub").is_file());
}

#[test]
fn symlink_to_itself_is_an_error() {
    let (dir, fd) = root();
    symlink("loop", dir.path().join("loop")).unwrap();
    assert!(open_or_create(fd.as_fd(), Path::new("/loop"), Kind::File).is_err());
}

#[test]
fn dots_do_not_lead_out_of_the_root() {
    let (dir, fd) = root();
    std::fs::create_dir(dir.path().join("inner")).unwrap();
    let found = open_in(fd.as_fd(), Path::new("/../../inner")).unwrap();
    let here = open_here(&dir.path().join("inner")).unwrap();
    let (a, b) = (
        rustix::fs::fstat(&found).unwrap(),
        rustix::fs::fstat(&here).unwrap(),
    );
    assert_eq!(a.st_ino, b.st_ino);
}

#[test]
fn missing_destination_is_made_with_its_parents() {
    let (dir, fd) = root();
    open_or_create(fd.as_fd(), Path::new("/a/b/c"), Kind::File).unwrap();
    assert!(dir.path().join("a/b/c").is_file());
}

#[test]
fn missing_source_is_named() {
    let error = clone_tree(Path::new("/no/such/source"), Depth::Single).unwrap_err();
    assert!(error.to_string().contains("/no/such/source"), "{error}");
}
