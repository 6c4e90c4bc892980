//! Modes, owners, sizes and times.

use rustix::fs::{
    self, AtFlags, CWD, OFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    chmod_sets_every_bit,
    chmod_by_descriptor_works,
    chmod_of_unlinked_file_works,
    chown_sets_owner_and_group_apart,
    chown_of_symlink_changes_the_link,
    truncate_cuts_and_grows,
    truncate_of_wrong_things_is_refused,
    truncate_by_descriptor_needs_write_access,
    open_with_truncate_empties_the_file,
    times_are_set_to_the_nanosecond,
    times_now_and_omit_work,
    times_of_symlink_are_its_own,
    times_before_1970_are_kept,
    write_changes_mtime_and_ctime,
    chmod_changes_ctime_only,
    names_change_times_of_their_directory,
    statx_tells_the_birth_time,
    statfs_tells_sane_numbers,
    attributes_by_descriptor_and_name_agree,
);

const THEN: Timespec = Timespec {
    tv_sec: 1_234_567_890,
    tv_nsec: 123_456_789,
};

fn set_times(name: &str, atime: Timespec, mtime: Timespec, flags: AtFlags) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: atime,
        last_modification: mtime,
    };
    fs::utimensat(CWD, name, &times, flags)
}

fn chmod_sets_every_bit() -> Outcome {
    create("f", 0o600)?;
    mkdir("d", 0o700)?;
    for bits in [0, 0o7777, 0o4711, 0o2755, 0o1777, 0o444, 0o644] {
        for name in ["f", "d"] {
            fs::chmod(name, mode(bits))?;
            equal(name, mode_of(name)?, bits)?;
        }
    }
    refused("of nothing", fs::chmod("none", mode(0o644)), Errno::NOENT)
}

fn chmod_by_descriptor_works() -> Outcome {
    let file = create("f", 0o600)?;
    fs::fchmod(&file, mode(0o751))?;
    equal("by name", mode_of("f")?, 0o751)?;
    equal("by descriptor", fs::fstat(&file)?.st_mode & 0o7777, 0o751)
}

fn chmod_of_unlinked_file_works() -> Outcome {
    let file = create("f", 0o600)?;
    fs::unlink("f")?;
    fs::fchmod(&file, mode(0o644))?;
    fs::ftruncate(&file, 100)?;
    let stat = fs::fstat(&file)?;
    equal("mode", stat.st_mode & 0o7777, 0o644)?;
    equal("size and links", (stat.st_size, stat.st_nlink), (100, 0))
}

fn chown_sets_owner_and_group_apart() -> Outcome {
    create("f", 0o644)?;
    chown("f", ALICE, BOB)?;
    let stat = lstat("f")?;
    equal("both", (stat.st_uid, stat.st_gid), (ALICE, BOB))?;
    let uid = rustix::process::Uid::from_raw(BOB);
    fs::chownat(CWD, "f", Some(uid), None, AtFlags::empty())?;
    let stat = lstat("f")?;
    equal("the owner", (stat.st_uid, stat.st_gid), (BOB, BOB))?;
    let gid = rustix::process::Gid::from_raw(CLUB);
    fs::chownat(CWD, "f", None, Some(gid), AtFlags::empty())?;
    let stat = lstat("f")?;
    equal("the group", (stat.st_uid, stat.st_gid), (BOB, CLUB))
}

fn chown_of_symlink_changes_the_link() -> Outcome {
    create("f", 0o644)?;
    fs::symlink("f", "l")?;
    chown("l", ALICE, ALICE)?;
    equal("the link", lstat("l")?.st_uid, ALICE)?;
    equal("the file", lstat("f")?.st_uid, 0)
}

fn truncate_cuts_and_grows() -> Outcome {
    write_file("f", b"0123456789")?;
    let file = open("f", OFlags::RDWR)?;
    fs::ftruncate(&file, 4)?;
    equal("cut", content_of("f")?, b"0123".to_vec())?;
    fs::ftruncate(&file, 6)?;
    equal("grown", content_of("f")?, b"0123\0\0".to_vec())?;
    fs::ftruncate(&file, 10_000)?;
    equal("size", lstat("f")?.st_size, 10_000)?;
    std::fs::File::options().write(true).open("f")?.set_len(0)?;
    equal("emptied", fs::fstat(&file)?.st_size, 0)
}

fn truncate_of_wrong_things_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    // There is no truncate by path in the library: the C library's error is open's.
    refused(
        "directory",
        open("d", OFlags::WRONLY | OFlags::TRUNC),
        Errno::ISDIR,
    )?;
    refused(
        "nothing",
        open("none", OFlags::WRONLY | OFlags::TRUNC),
        Errno::NOENT,
    )?;
    let file = create("f", 0o644)?;
    refused("negative", fs::ftruncate(&file, u64::MAX), Errno::INVAL)
}

fn truncate_by_descriptor_needs_write_access() -> Outcome {
    create("f", 0o644)?;
    let file = open("f", OFlags::RDONLY)?;
    refused("ftruncate", fs::ftruncate(&file, 1), Errno::INVAL)
}

fn open_with_truncate_empties_the_file() -> Outcome {
    write_file("f", b"content")?;
    let before = open("f", OFlags::RDONLY)?;
    open("f", OFlags::WRONLY | OFlags::TRUNC)?;
    equal("size", lstat("f")?.st_size, 0)?;
    let mut buffer = [0; 8];
    equal(
        "read by an older descriptor",
        rustix::io::pread(&before, &mut buffer, 0)?,
        0,
    )
}

fn times_are_set_to_the_nanosecond() -> Outcome {
    create("f", 0o644)?;
    let later = Timespec {
        tv_sec: THEN.tv_sec + 5,
        tv_nsec: 987_654_321,
    };
    set_times("f", THEN, later, AtFlags::empty())?;
    let stat = lstat("f")?;
    equal(
        "atime",
        (stat.st_atime, stat.st_atime_nsec),
        (1_234_567_890, 123_456_789),
    )?;
    equal(
        "mtime",
        (stat.st_mtime, stat.st_mtime_nsec),
        (1_234_567_895, 987_654_321),
    )
}

fn times_now_and_omit_work() -> Outcome {
    create("f", 0o644)?;
    set_times("f", THEN, THEN, AtFlags::empty())?;
    let special = |nanoseconds| Timespec {
        tv_sec: 0,
        tv_nsec: nanoseconds,
    };
    set_times(
        "f",
        special(UTIME_OMIT),
        special(UTIME_NOW),
        AtFlags::empty(),
    )?;
    let stat = lstat("f")?;
    equal("atime", stat.st_atime, THEN.tv_sec)?;
    holds("mtime is now", stat.st_mtime > THEN.tv_sec + 1_000_000)?;
    set_times(
        "f",
        special(UTIME_NOW),
        special(UTIME_OMIT),
        AtFlags::empty(),
    )?;
    let after = lstat("f")?;
    holds("atime is now", after.st_atime > THEN.tv_sec + 1_000_000)?;
    equal("mtime", after.st_mtime, stat.st_mtime)?;
    set_times(
        "f",
        special(UTIME_OMIT),
        special(UTIME_OMIT),
        AtFlags::empty(),
    )?;
    equal("neither", lstat("f")?.st_mtime, stat.st_mtime)
}

fn times_of_symlink_are_its_own() -> Outcome {
    create("f", 0o644)?;
    fs::symlink("f", "l")?;
    set_times("l", THEN, THEN, AtFlags::SYMLINK_NOFOLLOW)?;
    equal("the link", lstat("l")?.st_mtime, THEN.tv_sec)?;
    holds(
        "the file keeps its own",
        lstat("f")?.st_mtime != THEN.tv_sec,
    )
}

fn times_before_1970_are_kept() -> Outcome {
    create("f", 0o644)?;
    let early = Timespec {
        tv_sec: -86_400,
        tv_nsec: 0,
    };
    set_times("f", early, early, AtFlags::empty())?;
    equal("mtime", lstat("f")?.st_mtime, -86_400)
}

fn write_changes_mtime_and_ctime() -> Outcome {
    let file = create("f", 0o644)?;
    set_times("f", THEN, THEN, AtFlags::empty())?;
    rustix::io::write(&file, b"x")?;
    let stat = lstat("f")?;
    holds("mtime is new", stat.st_mtime != THEN.tv_sec)?;
    equal("atime", stat.st_atime, THEN.tv_sec)?;
    set_times("f", THEN, THEN, AtFlags::empty())?;
    fs::ftruncate(&file, 9)?;
    holds(
        "mtime is new after truncate",
        lstat("f")?.st_mtime != THEN.tv_sec,
    )
}

fn chmod_changes_ctime_only() -> Outcome {
    create("f", 0o644)?;
    set_times("f", THEN, THEN, AtFlags::empty())?;
    fs::chmod("f", mode(0o600))?;
    let stat = lstat("f")?;
    equal("mtime", stat.st_mtime, THEN.tv_sec)?;
    holds("ctime is now", stat.st_ctime > THEN.tv_sec + 1_000_000)
}

fn names_change_times_of_their_directory() -> Outcome {
    mkdir("d", 0o755)?;
    type Step = fn() -> Result<(), Errno>;
    let steps: [(&str, Step); 4] = [
        ("create", || create("d/f", 0o644).map(drop)),
        ("link", || fs::link("d/f", "d/g")),
        ("rename", || fs::rename("d/g", "d/h")),
        ("unlink", || fs::unlink("d/h")),
    ];
    for (what, step) in steps {
        set_times("d", THEN, THEN, AtFlags::empty())?;
        step()?;
        holds(
            &format!("{what} changes mtime"),
            lstat("d")?.st_mtime != THEN.tv_sec,
        )?;
    }
    Ok(())
}

fn statx_tells_the_birth_time() -> Outcome {
    create("f", 0o644)?;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = supported("statx", fs::statx(CWD, "f", AtFlags::empty(), mask))?;
    if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return skip("there is no birth time here");
    }
    holds(
        "it is not later than ctime",
        stat.stx_btime.tv_sec <= stat.stx_ctime.tv_sec,
    )?;
    holds("it is not long ago", stat.stx_btime.tv_sec > THEN.tv_sec)
}

fn statfs_tells_sane_numbers() -> Outcome {
    let found = fs::statvfs(".")?;
    equal("longest name", found.f_namemax, 255)?;
    holds("free blocks are blocks", found.f_bfree <= found.f_blocks)?;
    holds("available blocks are free", found.f_bavail <= found.f_bfree)?;
    holds(
        "there are blocks",
        found.f_blocks > 0 && found.f_frsize >= 512,
    )
}

fn attributes_by_descriptor_and_name_agree() -> Outcome {
    let file = create("f", 0o644)?;
    for round in 1..=20_u8 {
        rustix::io::write(&file, &[round; 100])?;
        let (one, two) = (fs::fstat(&file)?, lstat("f")?);
        equal("size", one.st_size, two.st_size)?;
        equal("size after writes", two.st_size, i64::from(round) * 100)?;
        equal("inode", one.st_ino, two.st_ino)?;
    }
    Ok(())
}
