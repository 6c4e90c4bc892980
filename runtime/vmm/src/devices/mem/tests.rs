//! A driver that asks for whatever it likes.

use std::sync::mpsc;

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::GuestAddress;

use super::super::fake::Driver;
use super::*;

const UNIT: u64 = 128 << 20;
const BOOTED: u64 = 256 << 20;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

struct Rig {
    driver: Driver,
    device: MemDevice,
    socket: Socket,
    start: u64,
    shown: mpsc::Receiver<(Vec<u8>, News)>,
}

impl Rig {
    /// A guest that may grow by two units, and is to have so many bytes of them.
    fn asked(bytes: u64) -> Self {
        let growth = Growth::of(BOOTED, BOOTED + 2 * UNIT).unwrap();
        let (mut device, socket) = MemDevice::new(growth).unwrap();
        let (sender, shown) = mpsc::channel();
        device.take_config_space(ConfigSpace::new(move |config, news| {
            sender.send((config.to_vec(), news)).unwrap();
        }));
        let region = usize::try_from(growth.region_bytes()).unwrap();
        let rig = Self {
            driver: Driver::with_more(0, &[(GuestAddress(growth.start), region)]),
            device,
            socket,
            start: growth.start,
            shown,
        };
        if bytes > 0 {
            rig.socket.request(bytes, growth.units_of(bytes));
        }
        rig
    }

    /// The kind of the answer and the state in it.
    fn ask(&mut self, kind: u16, start: u64, blocks: u16) -> (u16, u16) {
        let request = Driver::DATA;
        let answer = Driver::DATA + 0x100;
        self.put(request, kind, start, blocks);
        self.driver.write(answer, &[0xff; 10]);
        self.driver.add(&[(request, 24, false), (answer, 10, true)]);
        let used = self.driver.run(&mut self.device);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].1, 10);
        let bytes = self.driver.read(answer, 10);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (word(0), word(8))
    }

    fn put(&self, at: u64, kind: u16, start: u64, blocks: u16) {
        let mut bytes = [0xee; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&start.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.driver.write(at, &bytes);
    }

    /// Asks for blocks from that one of the region on.
    fn plug(&mut self, block: u64, blocks: u16) -> u16 {
        self.ask(PLUG, self.start + block * BLOCK_BYTES, blocks).0
    }

    fn unplug(&mut self, block: u64, blocks: u16) -> u16 {
        self.ask(UNPLUG, self.start + block * BLOCK_BYTES, blocks).0
    }

    fn state(&mut self, block: u64, blocks: u16) -> (u16, u16) {
        self.ask(STATE, self.start + block * BLOCK_BYTES, blocks)
    }

    fn field(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn has_reached(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.socket.reached_fd(),
            PollFlags::IN,
        )];
        let now = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).unwrap() == 1
    }
}

#[test]
fn ranges_that_are_none_are_errors_whatever_is_asked() {
    let mut rig = Rig::asked(UNIT);
    let start = rig.start;
    let unit_blocks = u16::try_from(UNIT / BLOCK_BYTES).unwrap();
    for (what, at, blocks) in [
        ("no block", start, 0),
        ("not at a block", start + 4096, 1),
        ("not at a byte of one", start + 1, 1),
        ("before the region", start - BLOCK_BYTES, 1),
        ("at zero", 0, 1),
        ("too long", start, unit_blocks + 1),
        ("behind what is usable", start + UNIT, 1),
        ("behind the region", start + 2 * UNIT, 1),
        ("at the end of all", u64::MAX - BLOCK_BYTES + 1, 1),
        ("as many as there are numbers", start, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(rig.ask(kind, at, blocks).0, ERROR, "{kind}: {what}");
        }
    }
    assert_eq!(rig.socket.plugged_bytes(), 0);
}

#[test]
fn requests_that_are_none_are_errors() {
    let mut rig = Rig::asked(UNIT);

    for kind in [4, 255, u16::MAX] {
        assert_eq!(rig.ask(kind, rig.start, 1).0, ERROR, "{kind}");
    }
    assert_eq!(rig.socket.plugged_bytes(), 0);
}

#[test]
fn chains_without_a_request_or_room_for_an_answer_do_nothing() {
    let mut rig = Rig::asked(UNIT);
    let answer = Driver::DATA + 0x100;
    rig.put(Driver::DATA, PLUG, rig.start, 1);
    rig.driver.add(&[(answer, 10, true)]);
    rig.driver
        .add(&[(Driver::DATA, 23, false), (answer, 10, true)]);
    rig.driver
        .add(&[(Driver::OUTSIDE, 24, false), (answer, 10, true)]);
    rig.driver.add_head(9999);

    let used = rig.driver.run(&mut rig.device);

    let written: Vec<_> = used.iter().map(|(_, bytes)| *bytes).collect();
    assert_eq!(written, [10, 10, 10]);
    assert_eq!(rig.driver.read(answer, 2), ERROR.to_le_bytes());
    assert_eq!(rig.socket.plugged_bytes(), 0);
}

#[test]
fn answers_without_room_are_not_written() {
    let mut rig = Rig::asked(UNIT);
    let answer = Driver::DATA + 0x100;
    rig.put(Driver::DATA, STATE, rig.start, 1);
    rig.driver.write(answer, &[0xff; 10]);
    rig.driver
        .add(&[(Driver::DATA, 24, false), (answer, 9, true)]);
    rig.driver
        .add(&[(Driver::DATA, 24, false), (Driver::OUTSIDE, 10, true)]);
    rig.driver.add(&[(Driver::DATA, 24, false)]);

    let used = rig.driver.run(&mut rig.device);

    assert!(used.iter().all(|(_, bytes)| *bytes == 0), "{used:?}");
    assert_eq!(rig.driver.read(answer, 10), [0xff; 10]);
}

#[test]
fn requests_and_answers_in_pieces_are_as_good() {
    let mut rig = Rig::asked(UNIT);
    let answer = Driver::DATA + 0x100;
    rig.put(Driver::DATA, PLUG, rig.start, 3);
    rig.driver.add(&[
        (Driver::DATA, 1, false),
        (Driver::DATA + 1, 23, false),
        (answer, 9, true),
        (answer + 9, 100, true),
    ]);

    let used = rig.driver.run(&mut rig.device);

    assert_eq!(used, [(0, 10)]);
    assert_eq!(rig.driver.read(answer, 2), ACK.to_le_bytes());
    assert_eq!(rig.socket.plugged_bytes(), 3 * BLOCK_BYTES);
}

#[test]
fn nothing_can_be_plugged_before_it_is_requested() {
    let mut rig = Rig::asked(0);

    assert_eq!(rig.plug(0, 1), ERROR);
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(rig.socket.plugged_bytes(), 0);
}

#[test]
fn no_more_is_plugged_than_was_requested() {
    let mut rig = Rig::asked(3 * BLOCK_BYTES);

    assert_eq!(rig.plug(0, 4), NACK);
    assert_eq!(rig.plug(0, 2), ACK);
    assert_eq!(rig.plug(2, 2), NACK);
    assert_eq!(rig.plug(9, 1), ACK);
    assert_eq!(rig.plug(10, 1), NACK);
    assert_eq!(rig.socket.plugged_bytes(), 3 * BLOCK_BYTES);
    // Less is requested than it has: it may keep that, and have nothing more.
    rig.socket.request(BLOCK_BYTES, UNIT);
    assert_eq!(rig.plug(20, 1), NACK);
    assert_eq!(rig.unplug(9, 1), ACK);
    assert_eq!(rig.plug(9, 1), NACK);
}

#[test]
fn what_is_plugged_is_not_plugged_again_nor_what_is_not_unplugged() {
    let mut rig = Rig::asked(UNIT);

    assert_eq!(rig.plug(4, 4), ACK);
    assert_eq!(rig.plug(7, 2), ERROR);
    assert_eq!(rig.plug(3, 2), ERROR);
    assert_eq!(rig.unplug(7, 2), ERROR);
    assert_eq!(rig.unplug(0, 1), ERROR);
    assert_eq!(rig.socket.plugged_bytes(), 4 * BLOCK_BYTES);
    assert_eq!(rig.unplug(5, 2), ACK);
    assert_eq!(rig.unplug(5, 1), ERROR);
    assert_eq!(rig.socket.plugged_bytes(), 2 * BLOCK_BYTES);
}

#[test]
fn the_state_is_that_of_all_blocks_named() {
    let mut rig = Rig::asked(UNIT);
    rig.plug(1, 2);

    assert_eq!(rig.state(1, 2), (ACK, 0));
    assert_eq!(rig.state(3, 9), (ACK, 1));
    assert_eq!(rig.state(0, 2), (ACK, 2));
    assert_eq!(rig.ask(UNPLUG_ALL, 7, 7).0, ACK);
    assert_eq!(rig.state(0, 64), (ACK, 1));
}

#[test]
fn what_is_unplugged_is_the_hosts_again() {
    let mut rig = Rig::asked(UNIT);
    rig.plug(0, 3);
    let pages = [0, 1, 2].map(|block| rig.start + block * BLOCK_BYTES + 4096);
    for page in pages {
        rig.driver.write(page, &[7]);
    }

    assert_eq!(rig.unplug(1, 1), ACK);

    assert_eq!(pages.map(|page| rig.driver.read(page, 1)[0]), [7, 0, 7]);
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(pages.map(|page| rig.driver.read(page, 1)[0]), [0, 0, 0]);
}

#[test]
fn the_host_hears_of_memory_that_it_has_asked_for_once() {
    let mut rig = Rig::asked(4 * BLOCK_BYTES);
    rig.plug(0, 3);
    assert!(!rig.has_reached());
    rig.plug(3, 1);
    assert!(rig.has_reached());
    assert!(rig.socket.take_reached());
    assert!(!rig.socket.take_reached());

    // Taken back and forth, it is not told again.
    rig.unplug(3, 1);
    rig.plug(3, 1);
    assert!(!rig.has_reached());
    // Less is there at once; more is not.
    assert!(rig.socket.request(BLOCK_BYTES, UNIT));
    assert!(!rig.socket.request(5 * BLOCK_BYTES, UNIT));
    rig.plug(4, 1);
    assert!(rig.has_reached());
    // What was reached for one request is nothing to the next.
    assert!(!rig.socket.request(6 * BLOCK_BYTES, UNIT));
    assert!(!rig.has_reached());
}

#[test]
fn the_driver_is_told_what_is_requested_and_shown_what_it_has() {
    let mut rig = Rig::asked(BLOCK_BYTES + 1);
    let (config, news) = rig.shown.try_recv().unwrap();
    assert_eq!((config.len(), news), (56, News::Told));

    rig.plug(0, 1);

    let (config, news) = rig.shown.try_recv().unwrap();
    assert_eq!(news, News::Known);
    let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    let words: Vec<_> = (0..7).map(|index| word(index * 8)).collect();
    let expected = [
        BLOCK_BYTES,
        0,
        rig.start,
        2 * UNIT,
        UNIT,
        BLOCK_BYTES,
        2 * BLOCK_BYTES,
    ];
    assert_eq!(words, expected);
    let fields: Vec<_> = (0..8).map(|index| rig.field(index * 8)).collect();
    assert_eq!(fields[..7], expected);
    assert_eq!((fields[7], rig.field(u64::MAX)), (0, 0));
}

#[test]
fn what_was_usable_stays_so_and_never_more_than_was_given() {
    let mut rig = Rig::asked(2 * UNIT);
    rig.socket.request(0, 0);
    assert_eq!(rig.field(32), 2 * UNIT);
    assert_eq!(rig.state(127, 1), (ACK, 1));
    // Requested is what can be had.
    rig.socket.request(u64::MAX, 0);
    assert_eq!(rig.field(48), 2 * UNIT);
}
