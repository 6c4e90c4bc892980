//! The server with requests of a guest that means harm: bytes that are no request, and requests
//! that try to get out of the share.

#![cfg(test)]

#[path = "requests/echo.rs"]
mod echo;

use std::cell::RefCell;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use husk_virtiofs::{CachePolicy, Options, ReplyWriter, RequestReader, Server, Worker};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::CapabilitySet;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FORGET: u32 = 2;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;
const ROOT: u64 = 1;

const HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
/// Where a request has the caller's group.
const GROUP: usize = 28;

/// A guest: builds requests, and takes replies apart.
struct Guest<'s> {
    server: &'s Server,
    worker: Worker,
    /// Whose group its requests are made in.
    group: u32,
}

impl<'s> Guest<'s> {
    fn new(server: &'s Server) -> Self {
        let worker = Worker::new(server).unwrap();
        Self {
            server,
            worker,
            group: 0,
        }
    }

    fn init(&mut self) {
        let mut arguments = Vec::new();
        for field in [7_u32, 40, 0, u32::MAX] {
            arguments.extend(field.to_ne_bytes());
        }
        arguments.extend([0; 48]);
        self.call(INIT, 0, &arguments).unwrap();
    }

    /// The body of the reply, or its error.
    fn call(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, i32> {
        let mut request = request(opcode, node, arguments);
        request[GROUP..GROUP + 4].copy_from_slice(&self.group.to_ne_bytes());
        let mut reply = vec![0; 1 << 17];
        let reader = RequestReader::from_bytes(&request);
        let used = self.server.handle(
            &mut self.worker,
            reader,
            ReplyWriter::from_bytes(&mut reply),
        );
        if used == 0 {
            return Ok(Vec::new());
        }
        assert_eq!(u32_at(&reply, 0) as usize, used);
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply[REPLY_HEADER..used].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(LOOKUP, parent, &c_string(name))
            .map(|entry| u64_at(&entry, 0))
    }

    /// Device and inode number say which file it is; here, the inode number.
    fn inode_number(&mut self, node: u64) -> Result<u64, i32> {
        self.call(GETATTR, node, &[0; 16])
            .map(|reply| u64_at(&reply, 16))
    }
}

fn request(opcode: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + arguments.len()).unwrap();
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(99_u64.to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}

fn c_string(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn directory(path: impl AsRef<Path>) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path.as_ref(), flags, Mode::empty()).unwrap()
}

fn options() -> Options {
    Options::single(directory("/proc/self/fd"), CachePolicy::SHARED)
}

fn server(share: &Path) -> Server {
    Server::new(directory(share), options()).unwrap()
}

/// Runs `test` with a share in a directory that has a secret beside it. In a thread of its own,
/// for which [`Worker::new`] may change the current directory.
fn with_share(test: impl FnOnce(&Path, &mut Guest<'_>) + Send) {
    with_share_and(options(), test);
}

fn with_share_and(options: Options, test: impl FnOnce(&Path, &mut Guest<'_>) + Send) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: not root");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("secret"), "outside").unwrap();
    let share = place.path().join("share");
    fs::create_dir(&share).unwrap();
    let server = Server::new(directory(&share), options).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut guest = Guest::new(&server);
            guest.init();
            test(&share, &mut guest);
        });
    });
}

#[test]
fn nothing_is_served_before_init() {
    with_share(|share, _| {
        let server = server(share);
        let mut guest = Guest::new(&server);
        assert_eq!(guest.lookup(ROOT, "x"), Err(libc::EIO));
    });
}

#[test]
fn names_that_lead_out_are_refused() {
    with_share(|_, guest| {
        for name in ["..", ".", "../secret", "/etc/passwd", "a/../../secret", "/"] {
            assert_eq!(guest.lookup(ROOT, name), Err(libc::EINVAL), "{name}");
            assert_eq!(
                guest.call(UNLINK, ROOT, &c_string(name)),
                Err(libc::EINVAL),
                "{name}"
            );
            let mut arguments = vec![0; 8];
            arguments.extend(c_string(name));
            assert_eq!(
                guest.call(MKDIR, ROOT, &arguments),
                Err(libc::EINVAL),
                "{name}"
            );
        }
    });
}

#[test]
fn rename_cannot_bring_anything_in_or_out() {
    with_share(|share, guest| {
        fs::write(share.join("f"), "").unwrap();
        for names in [["../secret", "s"], ["f", "../f"], ["..", "x"], ["f", ".."]] {
            let mut arguments = ROOT.to_ne_bytes().to_vec();
            names
                .iter()
                .for_each(|name| arguments.extend(c_string(name)));
            assert_eq!(
                guest.call(RENAME, ROOT, &arguments),
                Err(libc::EINVAL),
                "{names:?}"
            );
        }
        assert!(share.join("../secret").exists());
    });
}

#[test]
fn symbolic_links_are_never_followed() {
    with_share(|share, guest| {
        symlink("../secret", share.join("file")).unwrap();
        symlink("/", share.join("root")).unwrap();
        symlink("/proc/self/fd", share.join("magic")).unwrap();
        for (name, target) in [
            ("file", "../secret"),
            ("root", "/"),
            ("magic", "/proc/self/fd"),
        ] {
            let link = guest.lookup(ROOT, name).unwrap();
            assert_eq!(
                guest.call(READLINK, link, &[]),
                Ok(target.as_bytes().to_vec())
            );
            assert_eq!(guest.call(OPEN, link, &[0; 8]), Err(libc::ELOOP), "{name}");
            assert_eq!(guest.lookup(link, "etc"), Err(libc::ENOTDIR), "{name}");
        }
    });
}

#[test]
fn devices_and_fifos_are_never_opened() {
    with_share(|share, guest| {
        let null = rustix::fs::makedev(1, 3);
        let mode = Mode::from_raw_mode(0o666);
        for (name, kind, device) in [
            ("null", rustix::fs::FileType::CharacterDevice, null),
            ("fifo", rustix::fs::FileType::Fifo, 0),
        ] {
            rustix::fs::mknodat(CWD, share.join(name), kind, mode, device).unwrap();
            let node = guest.lookup(ROOT, name).unwrap();
            assert_eq!(guest.call(OPEN, node, &[0; 8]), Err(libc::ENXIO), "{name}");
        }
    });
}

#[test]
fn moved_directory_stays_where_it_is_reached_from() {
    with_share(|share, guest| {
        fs::create_dir_all(share.join("a/b")).unwrap();
        let a = guest.lookup(ROOT, "a").unwrap();
        let b = guest.lookup(a, "b").unwrap();
        // The host takes it out of the share: the guest keeps what it had, but has no way up.
        fs::rename(share.join("a/b"), share.join("../b")).unwrap();
        assert_eq!(guest.lookup(b, ".."), Err(libc::EINVAL));
        assert_eq!(guest.lookup(a, "b"), Err(libc::ENOENT));
    });
}

#[test]
fn walks_during_renames_never_leave_the_share() {
    with_share(|share, guest| {
        fs::create_dir_all(share.join("x/y")).unwrap();
        fs::write(share.join("x/y/secret"), "inside").unwrap();
        symlink("../..", share.join("link")).unwrap();
        let inside = rustix::fs::stat(share.join("x/y/secret")).unwrap().st_ino;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let mover = scope.spawn(|| {
                // `x/y` is the directory, then a link that leads out, then the directory again.
                while !stop.load(Ordering::Relaxed) {
                    fs::rename(share.join("x/y"), share.join("kept")).unwrap();
                    fs::rename(share.join("link"), share.join("x/y")).unwrap();
                    fs::rename(share.join("x/y"), share.join("link")).unwrap();
                    fs::rename(share.join("kept"), share.join("x/y")).unwrap();
                }
            });
            for _ in 0..20_000 {
                let x = guest.lookup(ROOT, "x").unwrap();
                let found = guest.lookup(x, "y").and_then(|y| guest.lookup(y, "secret"));
                if let Ok(secret) = found {
                    assert_eq!(guest.inode_number(secret), Ok(inside));
                }
            }
            stop.store(true, Ordering::Relaxed);
            mover.join().unwrap();
        });
    });
}

#[test]
fn forgotten_file_is_unknown() {
    with_share(|share, guest| {
        fs::write(share.join("f"), "").unwrap();
        let node = guest.lookup(ROOT, "f").unwrap();
        assert_eq!(guest.lookup(ROOT, "f"), Ok(node));
        guest.call(FORGET, node, &1_u64.to_ne_bytes()).unwrap();
        assert!(guest.inode_number(node).is_ok());
        guest.call(FORGET, node, &1_u64.to_ne_bytes()).unwrap();
        assert_eq!(guest.inode_number(node), Err(libc::ESTALE));
        assert_eq!(guest.server.counters().inodes, 1);
    });
}

#[test]
fn more_forgets_than_lookups_do_no_harm() {
    with_share(|share, guest| {
        fs::write(share.join("f"), "").unwrap();
        let node = guest.lookup(ROOT, "f").unwrap();
        guest.call(FORGET, node, &u64::MAX.to_ne_bytes()).unwrap();
        guest.call(FORGET, node, &u64::MAX.to_ne_bytes()).unwrap();
        guest.call(FORGET, ROOT, &u64::MAX.to_ne_bytes()).unwrap();
        assert!(guest.lookup(ROOT, "f").is_ok());
    });
}

#[test]
fn file_that_is_made_as_it_is_read_is_not_cut_at_its_size() {
    const DIRECT_IO: u32 = 1;
    with_share(|share, guest| {
        fs::write(share.join("file"), "").unwrap();
        let file = guest.lookup(ROOT, "file").unwrap();
        let opened = guest.call(OPEN, file, &[0; 8]).unwrap();
        assert_eq!(u32_at(&opened, 8) & DIRECT_IO, 0);

        let server = server(Path::new("/proc"));
        let mut guest = Guest::new(&server);
        guest.init();
        let uptime = guest.lookup(ROOT, "uptime").unwrap();
        let opened = guest.call(OPEN, uptime, &[0; 8]).unwrap();
        assert_eq!(u32_at(&opened, 8) & DIRECT_IO, DIRECT_IO);
        let mut arguments = [u64_at(&opened, 0), 0].map(u64::to_ne_bytes).concat();
        arguments.extend(4096_u32.to_ne_bytes());
        arguments.resize(40, 0);
        assert!(!guest.call(READ, uptime, &arguments).unwrap().is_empty());
    });
}

#[test]
fn file_beyond_the_limit_is_refused_until_another_is_forgotten() {
    with_share(|share, _| {
        for name in ["a", "b"] {
            fs::write(share.join(name), "").unwrap();
        }
        let options = Options {
            // The root is one of them.
            inodes_max: 2,
            ..options()
        };
        let server = Server::new(directory(share), options).unwrap();
        let mut guest = Guest::new(&server);
        guest.init();
        let first = guest.lookup(ROOT, "a").unwrap();
        assert_eq!(guest.lookup(ROOT, "b"), Err(libc::ENFILE));
        guest.call(FORGET, first, &1_u64.to_ne_bytes()).unwrap();
        assert!(guest.lookup(ROOT, "b").is_ok());
    });
}

#[test]
fn link_works_without_the_right_to_open_files_by_handle() {
    with_share(|share, guest| {
        fs::write(share.join("file"), "").unwrap();
        symlink("file", share.join("link")).unwrap();
        let known = ["file", "link"].map(|name| guest.lookup(ROOT, name).unwrap());
        let mut capabilities = rustix::thread::capabilities(None).unwrap();
        let by_handle = CapabilitySet::DAC_READ_SEARCH;
        capabilities.effective.remove(by_handle);
        rustix::thread::set_capabilities(None, capabilities).unwrap();

        for (node, name) in known.into_iter().zip(["file2", "link2"]) {
            let mut arguments = node.to_ne_bytes().to_vec();
            arguments.extend(c_string(name));
            assert!(guest.call(LINK, ROOT, &arguments).is_ok(), "{name}");
        }

        let links = rustix::fs::stat(share.join("file2")).unwrap().st_nlink;
        assert_eq!(links, 2);
        // Of the link itself, which is not followed.
        let target = fs::read_link(share.join("link2")).unwrap();
        assert_eq!(target, Path::new("file"));
    });
}

#[test]
fn open_directory_is_no_file() {
    with_share(|_, guest| {
        assert_eq!(guest.call(OPEN, ROOT, &[0; 8]), Err(libc::EISDIR));
        assert_eq!(guest.call(READ, ROOT, &[0; 40]), Err(libc::EBADF));
    });
}

#[test]
fn unknown_operation_is_refused() {
    with_share(|_, guest| {
        for opcode in [0, 7, 19, 31, 4096, u32::MAX] {
            assert_eq!(
                guest.call(opcode, ROOT, &[0; 64]),
                Err(libc::ENOSYS),
                "{opcode}"
            );
        }
    });
}

#[test]
fn request_of_another_length_than_it_says_is_refused() {
    with_share(|_, guest| {
        let mut bytes = request(GETATTR, ROOT, &[0; 16]);
        bytes[0] = 200;
        let mut reply = [0; 256];
        let reader = RequestReader::from_bytes(&bytes);
        let used = guest.server.handle(
            &mut guest.worker,
            reader,
            ReplyWriter::from_bytes(&mut reply),
        );
        assert_eq!(used, REPLY_HEADER);
        assert_eq!(u32_at(&reply, 4).cast_signed(), -libc::EIO);
    });
}

#[test]
fn request_longer_than_any_is_refused() {
    const LONGEST: usize = (1 << 20) + 68 * 1024;
    with_share(|share, guest| {
        fs::write(share.join("f"), "").unwrap();
        let node = guest.lookup(ROOT, "f").unwrap();
        let mut arguments = vec![0; LONGEST + 1 - HEADER];
        arguments[..4].copy_from_slice(&1_u32.to_ne_bytes());
        arguments[8..16].copy_from_slice(&node.to_ne_bytes());
        arguments[16..24].copy_from_slice(&1_u64.to_ne_bytes());

        guest.call(BATCH_FORGET, 0, &arguments).unwrap();
        assert_eq!(guest.server.counters().malformed, 1);
        assert!(guest.inode_number(node).is_ok());

        arguments.pop();
        guest.call(BATCH_FORGET, 0, &arguments).unwrap();
        assert_eq!(guest.inode_number(node), Err(libc::ESTALE));
    });
}

#[test]
fn random_bytes_do_no_harm() {
    with_share(|share, guest| {
        let config = Config {
            failure_persistence: None,
            cases: 4000,
            ..Config::default()
        };
        let random = vec(any::<u8>(), 0..200);
        let (server, worker) = (guest.server, RefCell::new(&mut guest.worker));
        TestRunner::new(config)
            .run(&random, |bytes| {
                let mut reply = [0; 512];
                let reader = RequestReader::from_bytes(&bytes);
                let writer = ReplyWriter::from_bytes(&mut reply);
                prop_assert!(server.handle(&mut worker.borrow_mut(), reader, writer) <= 512);
                Ok(())
            })
            .unwrap();
        assert!(share.join("../secret").exists());
    });
}

#[test]
fn random_arguments_do_no_harm() {
    with_share(|share, guest| {
        fs::write(share.join("f"), "content").unwrap();
        guest.lookup(ROOT, "f").unwrap();
        let config = Config {
            failure_persistence: None,
            cases: 20_000,
            ..Config::default()
        };
        // Small numbers name nodes and handles that there are.
        let field = prop_oneof![Just(0_u64), 0..5_u64, any::<u64>(), Just(u64::MAX)];
        // Not INIT and DESTROY, which would end the session.
        let opcode = (1..56_u32).prop_filter("session", |opcode| ![INIT, 38].contains(opcode));
        let name = prop_oneof![
            Just(&b"f\0g\0"[..]),
            Just(&b"g\0f\0"[..]),
            Just(&b"..\0"[..])
        ];
        let random = (opcode, 0..5_u64, vec(field, 0..12), name, 0..600_usize);
        let (server, worker) = (guest.server, RefCell::new(&mut guest.worker));
        TestRunner::new(config)
            .run(&random, |(opcode, node, fields, name, room)| {
                let mut arguments: Vec<u8> = fields
                    .iter()
                    .flat_map(|field| field.to_ne_bytes())
                    .collect();
                arguments.extend(name);
                let bytes = request(opcode, node, &arguments);
                let mut reply = vec![0; room];
                let reader = RequestReader::from_bytes(&bytes);
                let writer = ReplyWriter::from_bytes(&mut reply);
                prop_assert!(server.handle(&mut worker.borrow_mut(), reader, writer) <= room);
                Ok(())
            })
            .unwrap();
        assert_eq!(fs::read(share.join("../secret")).unwrap(), b"outside");
    });
}
