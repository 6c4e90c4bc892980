//! A driver that reports what it likes.

use super::super::fake::Driver;
use super::*;

const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;
const MARK: u8 = 0xee;

/// Pages from `Driver::DATA` on that tests look at.
const PAGES: usize = 40;
const NONE: [usize; 0] = [];

/// `VIRTQ_DESC_F_NEXT`, `VIRTQ_DESC_F_WRITE`, `VIRTQ_DESC_F_INDIRECT`
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A driver of one queue, in whose pages is something.
fn driver(index: usize) -> Driver {
    let driver = Driver::new(index);
    driver.write(Driver::DATA, &[MARK; PAGES * PAGE_BYTES]);
    driver
}

/// The address of a page.
#[expect(clippy::arithmetic_side_effects, reason = "numbers of tests are small")]
fn page(number: u64) -> u64 {
    Driver::DATA + number * PAGE
}

/// The pages that are zero now; each is whole, or wholly gone.
fn gone(driver: &Driver) -> Vec<usize> {
    let all = driver.read(Driver::DATA, PAGES * PAGE_BYTES);
    let pages = all.chunks(PAGE_BYTES).enumerate();
    pages
        .filter_map(|(number, bytes)| {
            let is_all = |wanted| bytes.iter().all(|byte| *byte == wanted);
            let is_gone = is_all(0);
            assert!(is_gone || is_all(MARK), "page {number} is gone in part");
            is_gone.then_some(number)
        })
        .collect()
}

fn descriptor(address: u64, bytes: u32, flags: u16, next: u16) -> Vec<u8> {
    [
        address.to_le_bytes().as_slice(),
        &bytes.to_le_bytes(),
        &flags.to_le_bytes(),
        &next.to_le_bytes(),
    ]
    .concat()
}

/// What comes of one report: the pages that are gone.
fn report(ranges: &[(u64, u32, bool)]) -> Vec<usize> {
    let mut driver = driver(REPORTS);
    driver.add(ranges);

    let used = driver.run(&mut BalloonDevice::default());

    assert_eq!(used, [(0, 0)]);
    gone(&driver)
}

#[test]
fn only_whole_pages_within_a_range_are_given_back() {
    assert_eq!(report(&[(page(1) + 1, 3 * 4096, true)]), [2, 3]);
    assert_eq!(report(&[(page(1), 2 * 4096 - 1, true)]), [1]);
    assert_eq!(report(&[(page(1) + 1, 4096, true)]), NONE);
    assert_eq!(report(&[(page(1), 4095, true)]), NONE);
    assert_eq!(report(&[(page(1), 0, true)]), NONE);
}

#[test]
fn range_outside_of_memory_is_passed_over() {
    for outside in [Driver::OUTSIDE, u64::MAX - 4095, u64::MAX] {
        let ranges = [(outside, 65536, true), (page(3), 4096, true)];
        assert_eq!(report(&ranges), [3], "{outside:#x}");
    }
}

#[test]
fn range_that_leaves_memory_is_given_back_as_far_as_there_is_memory() {
    let mut driver = Driver::new(REPORTS);
    let end = 0x10_0000;
    driver.write(end - 2 * PAGE, &[MARK; 2 * PAGE_BYTES]);
    driver.add(&[(end - PAGE, u32::MAX, true)]);

    let used = driver.run(&mut BalloonDevice::default());

    assert_eq!(used, [(0, 0)]);
    assert_eq!(driver.read(end - PAGE - 1, 2), [MARK, 0]);
}

#[test]
fn buffers_that_are_not_the_devices_to_write_stay() {
    let ranges = [
        (page(0), 4096, false),
        (page(1), 4096, true),
        (page(2), 4096, false),
    ];
    assert_eq!(report(&ranges), [1]);
}

#[test]
fn ranges_may_overlap() {
    let ranges = [
        (page(4), 2 * 4096, true),
        (page(5), 2 * 4096, true),
        (page(4), 2 * 4096, true),
    ];
    assert_eq!(report(&ranges), [4, 5, 6]);
}

#[test]
fn ranges_beyond_the_limit_stay() {
    let ranges: Vec<_> = (0..40).map(|number| (page(number), 4096, true)).collect();
    assert_eq!(report(&ranges), Vec::from_iter(0..32));
}

#[test]
fn bytes_beyond_the_limit_stay() {
    let most = u32::try_from(REPORT_BYTES_MAX).unwrap();
    let ranges = [
        (Driver::OUTSIDE, most - 4096, true),
        (page(0), 2 * 4096, true),
        (page(2), 4096, true),
    ];
    assert_eq!(report(&ranges), [0]);
}

#[test]
fn chain_without_an_end_comes_back() {
    let mut driver = driver(REPORTS);
    driver.write(0, &descriptor(page(7), 4096, NEXT | WRITE, 0));
    driver.add_head(0);

    let used = driver.run(&mut BalloonDevice::default());

    assert_eq!(used, [(0, 0)]);
    assert_eq!(gone(&driver), [7]);
}

#[test]
fn table_of_many_ranges_is_followed_to_the_limit_only() {
    const TABLE: u64 = 0x4_0000;
    const ENTRIES: u16 = 2048;
    let mut driver = driver(REPORTS);
    for entry in 0..ENTRIES {
        let address = page(u64::from(entry) % PAGES as u64);
        let bytes = descriptor(address, 4096, NEXT | WRITE, entry + 1);
        driver.write(TABLE + u64::from(entry) * 16, &bytes);
    }
    driver.write(0, &descriptor(TABLE, u32::from(ENTRIES) * 16, INDIRECT, 0));
    driver.add_head(0);

    let used = driver.run(&mut BalloonDevice::default());

    assert_eq!(used, [(0, 0)]);
    assert_eq!(gone(&driver), Vec::from_iter(0..32));
}

#[test]
fn head_outside_of_the_table_does_not_end_the_device() {
    let mut driver = driver(REPORTS);
    driver.add_head(9999);
    driver.add(&[(page(0), 4096, true)]);

    let used = driver.run(&mut BalloonDevice::default());

    assert_eq!(used, [(0, 0)]);
    assert_eq!(gone(&driver), [0]);
}

#[test]
fn queue_that_reports_itself_fails_the_device_and_nothing_else() {
    let mut driver = driver(REPORTS);
    let mut device = BalloonDevice::default();
    driver.add(&[(0, 0x3000, true)]);

    let failed = driver.run_with(&mut device, PAGE_REPORTING).unwrap_err();

    assert!(
        matches!(failed, DeviceError::Queue { index: REPORTS, .. }),
        "{failed}"
    );
    assert_eq!(gone(&driver), NONE);
}

#[test]
fn balloon_takes_nothing_and_gives_its_buffers_back() {
    for index in [0, 1] {
        let mut driver = driver(index);
        let numbers = u32::try_from(page(0) / PAGE).unwrap();
        driver.write(page(1), &numbers.to_le_bytes());
        driver.write(page(1) + 4, &[MARK; 4]);
        driver.add(&[(page(1), 8, false)]);
        driver.add(&[(page(2), 4096, true)]);

        let used = driver.run(&mut BalloonDevice::default());

        assert_eq!(used, [(0, 0), (1, 0)]);
        driver.write(page(1), &[MARK; 4]);
        assert_eq!(gone(&driver), NONE, "queue {index}");
    }
}

#[test]
fn without_the_feature_nothing_is_given_back() {
    let mut driver = driver(REPORTS);
    driver.add(&[(page(0), 4096, true)]);

    driver.run_with(&mut BalloonDevice::default(), 0).unwrap();

    assert_eq!(gone(&driver), NONE);
}

#[test]
fn host_never_asks_for_memory() {
    let mut config = [MARK; 16];

    BalloonDevice::default().read_config(0, &mut config);

    assert_eq!(config, [0; 16]);
}
