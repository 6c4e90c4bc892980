//! Requests that repeat, for the guest's inotify, what the host has done: they must change nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use husk_virtiofs::Options;

use super::{
    Guest, LOOKUP, MKDIR, OPEN, RENAME, ROOT, UNLINK, c_string, options, u32_at, u64_at,
    with_share_and,
};

const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const RMDIR: u32 = 11;
const WRITE: u32 = 16;
const CREATE: u32 = 35;

const GROUP: u32 = 0xc0ff_ee00;
const MADE: u32 = GROUP;
const GONE_FILE: u32 = GROUP + 1;
const GONE_DIRECTORY: u32 = GROUP + 2;
const TOUCHED: u32 = GROUP + 3;

fn with_echoes(test: impl FnOnce(&Path, &mut Guest<'_>) + Send) {
    let echo_group = Some(GROUP);
    with_share_and(
        Options {
            echo_group,
            ..options()
        },
        test,
    );
}

/// Structure of zeros, then names.
fn arguments(zeros: usize, names: &[&str]) -> Vec<u8> {
    let mut bytes = vec![0; zeros];
    names.iter().for_each(|name| bytes.extend(c_string(name)));
    bytes
}

/// Node, and mode, of an entry.
fn entry(reply: &[u8]) -> (u64, u32) {
    (u64_at(reply, 0), u32_at(reply, 40 + 60))
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_the_host_has_made_is_found_by_making_it() {
    with_echoes(|share, guest| {
        fs::write(share.join("file"), "contents").unwrap();
        fs::create_dir(share.join("directory")).unwrap();
        symlink("target", share.join("link")).unwrap();
        for (name, opcode, request, kind) in [
            ("file", MKNOD, arguments(16, &["file"]), 0o100_000),
            ("directory", MKDIR, arguments(8, &["directory"]), 0o040_000),
            ("link", SYMLINK, arguments(0, &["link", "else"]), 0o120_000),
        ] {
            guest.group = MADE;
            assert_eq!(guest.lookup(ROOT, name), Err(libc::ENOENT), "{name}");
            let (made, mode) = entry(&guest.call(opcode, ROOT, &request).unwrap());
            assert_eq!(mode & 0o170_000, kind, "{name}");
            guest.group = 0;
            assert_eq!(guest.lookup(ROOT, name), Ok(made), "{name}");
        }
        assert_eq!(names_in(share), ["directory", "file", "link"]);
        assert_eq!(fs::read(share.join("file")).unwrap(), b"contents");
        assert_eq!(
            fs::read_link(share.join("link")).unwrap(),
            Path::new("target")
        );
    });
}

#[test]
fn what_is_gone_again_is_made_for_the_guest_alone() {
    with_echoes(|share, guest| {
        let mut mknod = 0o100_600_u32.to_ne_bytes().to_vec();
        mknod.extend(arguments(12, &["x"]));
        for (opcode, request, kind) in [
            (MKNOD, mknod, 0o100_000),
            (MKDIR, arguments(8, &["x"]), 0o040_000),
            (SYMLINK, arguments(0, &["x", "y"]), 0o120_000),
        ] {
            guest.group = MADE;
            let reply = guest.call(opcode, ROOT, &request).unwrap();
            let (made, mode) = entry(&reply);
            assert_eq!(mode & 0o170_000, kind);
            // For no time.
            assert_eq!((u64_at(&reply, 16), u32_at(&reply, 32)), (0, 0));
            assert_eq!(guest.inode_number(made), Err(libc::ESTALE));
            guest.group = 0;
            assert_eq!(guest.lookup(ROOT, "x"), Err(libc::ENOENT));
        }
        assert!(names_in(share).is_empty());
    });
}

#[test]
fn what_no_echo_asks_for_is_refused() {
    with_echoes(|share, guest| {
        fs::write(share.join("file"), "contents").unwrap();
        fs::create_dir(share.join("directory")).unwrap();
        let file = guest.lookup(ROOT, "file").unwrap();
        for (group, opcode, node, request) in [
            (MADE, CREATE, ROOT, arguments(16, &["x"])),
            (GONE_FILE, CREATE, ROOT, arguments(16, &["x"])),
            (GONE_FILE, MKDIR, ROOT, arguments(8, &["x"])),
            (GONE_DIRECTORY, MKNOD, ROOT, arguments(16, &["x"])),
            (TOUCHED, SYMLINK, ROOT, arguments(0, &["x", "y"])),
            (TOUCHED, UNLINK, ROOT, arguments(0, &["file"])),
            (MADE, RMDIR, ROOT, arguments(0, &["directory"])),
            (MADE, SETATTR, file, arguments(88, &[])),
            (GONE_FILE, SETATTR, file, arguments(88, &[])),
        ] {
            guest.group = group;
            let refused = guest.call(opcode, node, &request);
            assert_eq!(refused, Err(libc::EPERM), "{group:x} {opcode}");
        }
        let mut flags = (libc::O_WRONLY | libc::O_TRUNC).to_ne_bytes().to_vec();
        flags.resize(8, 0);
        for group in [MADE, GONE_FILE, GONE_DIRECTORY] {
            guest.group = group;
            guest.call(OPEN, file, &flags).unwrap();
        }
        assert_eq!(names_in(share), ["directory", "file"]);
        assert_eq!(fs::read(share.join("file")).unwrap(), b"contents");
    });
}

#[test]
fn what_has_gone_is_found_once_more_and_removed() {
    with_echoes(|share, guest| {
        fs::write(share.join("stays"), "").unwrap();
        fs::create_dir(share.join("kept")).unwrap();
        for (group, opcode, gone, kept, kind) in [
            (GONE_FILE, UNLINK, "gone", "stays", 0o100_000),
            (GONE_DIRECTORY, RMDIR, "gone", "kept", 0o040_000),
        ] {
            guest.group = group;
            let (first, mode) = entry(&guest.call(LOOKUP, ROOT, &c_string(gone)).unwrap());
            assert_eq!(mode & 0o170_000, kind);
            // Each is a file of its own, and nothing is known of any.
            assert_ne!(guest.lookup(ROOT, gone).unwrap(), first);
            assert_eq!(guest.inode_number(first), Err(libc::ESTALE));
            assert_eq!(guest.call(opcode, ROOT, &c_string(gone)), Ok(Vec::new()));
            // What is there stays, even if the echo comes late.
            assert_eq!(guest.call(opcode, ROOT, &c_string(kept)), Ok(Vec::new()));
        }
        guest.group = GONE_FILE;
        let mut request = ROOT.to_ne_bytes().to_vec();
        request.extend(arguments(0, &["gone", "stays"]));
        assert_eq!(guest.call(RENAME, ROOT, &request), Ok(Vec::new()));
        assert_eq!(names_in(share), ["kept", "stays"]);
    });
}

#[test]
fn touching_a_file_leaves_it_as_it_is() {
    with_echoes(|share, guest| {
        const EVERYTHING: u32 = 0x7f;
        let path = share.join("file");
        fs::write(&path, "contents").unwrap();
        let before = fs::metadata(&path).unwrap();
        guest.group = TOUCHED;
        let reply = guest.call(LOOKUP, ROOT, &c_string("file")).unwrap();
        // Not to be believed for any time.
        assert_eq!((u64_at(&reply, 16), u32_at(&reply, 32)), (0, 0));
        let (file, _) = entry(&reply);
        let mut request = EVERYTHING.to_ne_bytes().to_vec();
        request.resize(88, 0);
        let attributes = guest.call(SETATTR, file, &request).unwrap();
        assert_eq!(u64_at(&attributes, 16 + 8), 8);

        let mut flags = (libc::O_WRONLY | libc::O_TRUNC).to_ne_bytes().to_vec();
        flags.resize(8, 0);
        let opened = guest.call(OPEN, file, &flags).unwrap();
        let mut write = u64_at(&opened, 0).to_ne_bytes().to_vec();
        write.extend([0; 8]);
        write.extend(1_u32.to_ne_bytes());
        write.resize(40, 0);
        write.push(b'x');
        assert_eq!(guest.call(WRITE, file, &write), Err(libc::EPERM));
        // Nor by another group: it is open for reading.
        guest.group = 0;
        assert_eq!(guest.call(WRITE, file, &write), Err(libc::EBADF));

        let after = fs::metadata(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"contents");
        assert_eq!(
            (after.mode(), after.uid(), after.gid(), after.ctime_nsec()),
            (
                before.mode(),
                before.uid(),
                before.gid(),
                before.ctime_nsec()
            )
        );
    });
}

#[test]
fn other_groups_make_no_echoes() {
    with_echoes(|share, guest| {
        for group in [0, GROUP - 1, GROUP + 4, u32::MAX] {
            guest.group = group;
            assert_eq!(guest.lookup(ROOT, "gone"), Err(libc::ENOENT), "{group}");
        }
        assert!(names_in(share).is_empty());
    });
}
