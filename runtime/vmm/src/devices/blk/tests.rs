//! A driver that sends what it likes, and files as disks.

use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::io::Write;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::super::fake::Driver;
use super::*;

const DISK_BYTES: usize = 64 * 1024;
const SECTORS: u64 = 128;

const HEADER: u64 = Driver::DATA;
const STATUS: u64 = Driver::DATA + 0x100;
const BUFFER: u64 = Driver::DATA + 0x1000;
/// No status of virtio.
const UNTOUCHED: u8 = 0xee;

/// A disk whose every sector holds its number.
struct Rig {
    driver: Driver,
    device: BlkDevice,
    socket: Socket,
    file: File,
}

impl Rig {
    fn new() -> Self {
        Self::of(|_| {})
    }

    fn of(change: impl FnOnce(&mut Geometry)) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content()).unwrap();
        let mut geometry = geometry();
        change(&mut geometry);
        let (device, socket) = BlkDevice::new();
        let handed_over = file.try_clone().unwrap().into();
        socket.plug(handed_over, geometry).unwrap();
        Self {
            driver: Driver::new(0),
            device,
            socket,
            file,
        }
    }

    /// Sends a request with a header, then what is said, then the status. Returns the status and the
    /// bytes that the device says to have written.
    fn ask(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = (HEADER, 16, false);
        let status = (STATUS, 1, true);
        let chain: Vec<_> = [head]
            .iter()
            .chain(data)
            .chain([&status])
            .copied()
            .collect();
        self.send(kind, sector, &chain)
    }

    fn send(&mut self, kind: u32, sector: u64, chain: &[(u64, u32, bool)]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[UNTOUCHED]);
        self.driver.add(chain);
        let used = self.driver.run(&mut self.device);
        assert_eq!(used.len(), 1);
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }

    fn zero(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut part = sector.to_le_bytes().to_vec();
        part.extend(sectors.to_le_bytes());
        part.extend(flags.to_le_bytes());
        self.driver.write(BUFFER, &part);
        self.ask(kind, 0, &[(BUFFER, 16, false)]).0
    }

    fn file(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.file.rewind().unwrap();
        self.file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

fn geometry() -> Geometry {
    Geometry {
        bytes: DISK_BYTES as u64,
        block_bytes: 512,
        is_read_only: false,
        can_zero: true,
        serial: "husk7".to_owned(),
    }
}

fn content() -> Vec<u8> {
    (0..DISK_BYTES)
        .map(|at| u8::try_from(at / 512).unwrap())
        .collect()
}

fn status(code: u32) -> u8 {
    u8::try_from(code).unwrap()
}

fn ok() -> u8 {
    status(VIRTIO_BLK_S_OK)
}

fn io_error() -> u8 {
    status(VIRTIO_BLK_S_IOERR)
}

fn unknown() -> u8 {
    status(VIRTIO_BLK_S_UNSUPP)
}

#[test]
fn chain_without_a_place_for_its_status_comes_back_empty() {
    for chain in [
        vec![(HEADER, 16, false)],
        vec![(HEADER, 16, false), (STATUS, 0, true)],
        vec![(HEADER, 16, false), (Driver::OUTSIDE, 1, true)],
        vec![
            (HEADER, 16, false),
            (BUFFER, 512, true),
            (Driver::OUTSIDE, 1, true),
        ],
        vec![(HEADER, 16, false), (u64::MAX, 512, true)],
    ] {
        let mut rig = Rig::new();

        assert_eq!(
            rig.send(VIRTIO_BLK_T_IN, 0, &chain),
            (UNTOUCHED, 0),
            "{chain:x?}"
        );

        assert_eq!(rig.file(), content());
    }
}

#[test]
fn chain_that_is_no_request_fails() {
    let status = (STATUS, 1, true);
    for chain in [
        vec![status],
        vec![(HEADER, 15, false), status],
        vec![(Driver::OUTSIDE, 16, false), status],
        vec![(HEADER, 16, false), (Driver::OUTSIDE, 512, false), status],
        vec![(HEADER, 16, false), (BUFFER, 1 << 31, false), status],
        // What the device reads comes first.
        vec![(BUFFER, 512, true), (HEADER, 16, false), status],
    ] {
        let mut rig = Rig::new();

        assert_eq!(
            rig.send(VIRTIO_BLK_T_OUT, 0, &chain),
            (io_error(), 1),
            "{chain:x?}"
        );

        assert_eq!(rig.file(), content());
    }
}

#[test]
fn head_outside_of_the_table_does_not_end_the_device() {
    let mut rig = Rig::new();
    rig.driver.add_head(9999);

    let answer = rig.ask(VIRTIO_BLK_T_IN, 3, &[(BUFFER, 512, true)]);

    assert_eq!(answer, (ok(), 513));
}

#[test]
fn data_of_no_whole_sectors_fails() {
    for bytes in [1, 511, 513] {
        let mut rig = Rig::new();

        assert_eq!(
            rig.ask(VIRTIO_BLK_T_IN, 0, &[(BUFFER, bytes, true)]).0,
            io_error()
        );
        assert_eq!(
            rig.ask(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, bytes, false)]).0,
            io_error()
        );

        assert_eq!(rig.file(), content());
    }
}

#[test]
fn what_lies_behind_the_end_fails() {
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (i64::MAX.unsigned_abs() / 512, 512),
    ] {
        let mut rig = Rig::new();

        assert_eq!(
            rig.ask(VIRTIO_BLK_T_IN, sector, &[(BUFFER, bytes, true)]).0,
            io_error()
        );
        assert_eq!(
            rig.ask(VIRTIO_BLK_T_OUT, sector, &[(BUFFER, bytes, false)])
                .0,
            io_error()
        );

        assert_eq!(rig.file(), content());
    }
}

#[test]
fn more_data_than_a_request_may_have_fails() {
    let mut rig = Rig::of(|geometry| geometry.bytes = 1 << 40);
    rig.file.set_len(1 << 40).unwrap();
    // The same memory over and over, the queue included: nothing must be written to it.
    let data = vec![(0, 0xf_0000, true); 140];

    assert_eq!(rig.ask(VIRTIO_BLK_T_IN, 0, &data), (io_error(), 1));
}

#[test]
fn unknown_requests_are_told_to_be() {
    for kind in [2, 5, 9, 14, 24, u32::MAX] {
        let mut rig = Rig::new();

        assert_eq!(
            rig.ask(kind, 0, &[(BUFFER, 512, true)]),
            (unknown(), 1),
            "{kind}"
        );
    }
}

#[test]
fn read_only_disk_takes_no_write_whoever_opened_it() {
    let mut rig = Rig::of(|geometry| geometry.is_read_only = true);

    assert_eq!(
        rig.ask(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, 512, false)]).0,
        io_error()
    );
    assert_eq!(rig.zero(VIRTIO_BLK_T_DISCARD, 0, 1, 0), io_error());
    assert_eq!(rig.zero(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), io_error());
    assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[]).0, ok());
    assert_eq!(rig.ask(VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, true)]).0, ok());

    assert_eq!(rig.file(), content());
}

#[test]
fn parts_to_be_made_zero_that_make_no_sense_are_refused() {
    let mut rig = Rig::new();
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for (kind, sector, sectors, flags, expected) in [
        (discard, SECTORS, 1, 0, io_error()),
        (discard, u64::MAX, 1, 0, io_error()),
        (discard, 0, u32::MAX, 0, io_error()),
        (discard, 0, 1, 1, unknown()),
        (zeroes, 0, 1, 2, unknown()),
        (zeroes, SECTORS - 1, 2, 1, io_error()),
    ] {
        assert_eq!(
            rig.zero(kind, sector, sectors, flags),
            expected,
            "{kind} {sector} {flags}"
        );
    }
    for bytes in [0, 15, 17, 16 * 17] {
        let data = [(BUFFER, bytes, false)];
        assert_eq!(rig.ask(discard, 0, &data).0, io_error(), "{bytes}");
    }

    assert_eq!(rig.file(), content());
}

#[test]
fn good_part_before_a_bad_one_is_left_alone() {
    let mut rig = Rig::new();
    let mut parts = [0; 32];
    parts[8] = 1;
    parts[16..24].copy_from_slice(&SECTORS.to_le_bytes());
    parts[24] = 1;
    rig.driver.write(BUFFER, &parts);

    assert_eq!(
        rig.ask(VIRTIO_BLK_T_DISCARD, 0, &[(BUFFER, 32, false)]).0,
        io_error()
    );

    assert_eq!(rig.file(), content());
}

#[test]
fn disk_that_can_not_zero_says_so() {
    let mut rig = Rig::of(|geometry| geometry.can_zero = false);

    assert_eq!(rig.zero(VIRTIO_BLK_T_DISCARD, 0, 1, 0), unknown());

    assert_eq!(rig.file(), content());
}

#[test]
fn file_that_has_become_shorter_fails() {
    let mut rig = Rig::new();
    rig.file.set_len(1024).unwrap();

    assert_eq!(
        rig.ask(VIRTIO_BLK_T_IN, 8, &[(BUFFER, 512, true)]).0,
        io_error()
    );
    assert_eq!(rig.ask(VIRTIO_BLK_T_IN, 1, &[(BUFFER, 512, true)]).0, ok());
}

#[test]
fn disk_that_was_pulled_out_fails() {
    let mut rig = Rig::new();
    rig.socket.pull();

    assert_eq!(
        rig.ask(VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, true)]),
        (io_error(), 1)
    );
    assert_eq!(
        rig.ask(VIRTIO_BLK_T_GET_ID, 0, &[(BUFFER, 20, true)]).0,
        io_error()
    );
}

/// Plugs a disk of almost the usual kind into a device.
fn plug_with(change: fn(&mut Geometry)) -> Result<Looks, DiskError> {
    let mut geometry = geometry();
    change(&mut geometry);
    let (_device, socket) = BlkDevice::new();
    socket.plug(tempfile::tempfile().unwrap().into(), geometry)
}

#[test]
fn disks_that_can_not_be_are_refused() {
    let plug = |change| plug_with(change).unwrap_err().to_string();

    assert!(plug(|it| it.bytes = 0).contains("0 bytes"));
    assert!(plug(|it| it.bytes = 511).contains("511 bytes"));
    assert!(plug(|it| it.bytes = u64::MAX).contains("bytes in blocks"));
    assert!(plug(|it| it.block_bytes = 0).contains("blocks of 0"));
    assert!(plug(|it| it.block_bytes = 1000).contains("blocks of 1000"));
    assert!(plug(|it| it.block_bytes = 65536).contains("blocks of 65536"));
    assert!(plug(|it| it.serial = String::new()).contains("serial"));
    assert!(plug(|it| it.serial = "x".repeat(21)).contains("serial"));
    assert!(plug(|it| it.serial = "a\nb".to_owned()).contains("serial"));
}

#[test]
fn what_was_written_is_read_again_however_it_is_cut() {
    let mut rig = Rig::new();
    let data: Vec<u8> = (0..1024_u32).map(|at| (at % 251) as u8).collect();
    rig.driver.write(BUFFER, &data);
    let written = rig.send(
        VIRTIO_BLK_T_OUT,
        5,
        &[
            (HEADER, 7, false),
            (HEADER + 7, 9, false),
            (BUFFER, 1000, false),
            (BUFFER + 1000, 0, false),
            (BUFFER + 1000, 24, false),
            (STATUS, 1, true),
        ],
    );
    assert_eq!(written, (ok(), 1));
    assert_eq!(rig.file()[5 * 512..7 * 512], data);

    // The status is the last byte of the data's own buffer.
    let last = STATUS - 1023;
    let pieces = [
        (HEADER, 16, false),
        (BUFFER + 0x1000, 1, true),
        (last, 1024, true),
    ];
    let read = rig.send(VIRTIO_BLK_T_IN, 5, &pieces);

    assert_eq!(read, (ok(), 1025));
    assert_eq!(rig.driver.read(BUFFER + 0x1000, 1), data[..1]);
    assert_eq!(rig.driver.read(last, 1023), data[1..]);
}

#[test]
fn requests_of_one_kick_are_all_answered() {
    let mut rig = Rig::new();
    for sector in 0..8 {
        let header = HEADER + 16 * sector;
        let mut bytes = [0; 16];
        bytes[8] = u8::try_from(sector).unwrap();
        rig.driver.write(header, &bytes);
        let buffer = BUFFER + 0x400 * sector;
        rig.driver.add(&[(header, 16, false), (buffer, 513, true)]);
    }

    let used = rig.driver.run(&mut rig.device);

    assert_eq!(used.len(), 8);
    for sector in 0..8_u8 {
        let got = rig.driver.read(BUFFER + 0x400 * u64::from(sector), 513);
        assert_eq!(got[..512], [sector; 512]);
        assert_eq!(got[512], ok());
    }
}

#[test]
fn parts_are_made_zero() {
    let mut rig = Rig::new();

    assert_eq!(rig.zero(VIRTIO_BLK_T_WRITE_ZEROES, 16, 8, 1), ok());

    let mut expected = content();
    expected[16 * 512..24 * 512].fill(0);
    assert_eq!(rig.file(), expected);
    assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[]).0, ok());
}

#[test]
fn serial_number_is_told_as_far_as_there_is_room() {
    let mut rig = Rig::new();
    rig.driver.write(BUFFER, &[0xff; 20]);

    assert_eq!(
        rig.ask(VIRTIO_BLK_T_GET_ID, 0, &[(BUFFER, 3, true)]),
        (ok(), 4)
    );
    assert_eq!(rig.driver.read(BUFFER, 4), [b'h', b'u', b's', 0xff]);
    assert_eq!(
        rig.ask(VIRTIO_BLK_T_GET_ID, 0, &[(BUFFER, 20, true)]),
        (ok(), 21)
    );
    assert_eq!(rig.driver.read(BUFFER, 6), *b"husk7\0");
}

#[test]
fn looks_are_those_of_the_disk() {
    let looks = |change| plug_with(change).unwrap();
    let has = |looks: &Looks, bit: u32| looks.features & (1 << bit) != 0;

    let large = looks(|it| {
        it.bytes = (3 << 40) + 4095;
        it.block_bytes = 4096;
    });
    assert_eq!(large.config[..8], (3_u64 << 31).to_le_bytes());
    assert_eq!(large.config[20..24], 4096_u32.to_le_bytes());
    assert!(has(&large, VIRTIO_BLK_F_DISCARD) && !has(&large, VIRTIO_BLK_F_RO));

    let read_only = looks(|it| it.is_read_only = true);
    assert!(has(&read_only, VIRTIO_BLK_F_RO) && !has(&read_only, VIRTIO_BLK_F_DISCARD));
}
