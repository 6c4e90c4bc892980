//! Whose files are, who may do what, and what is taken from set-user-id files.

use std::os::fd::AsFd;

use rustix::fs::{self, AtFlags, CWD, OFlags};
use rustix::io::Errno;
use rustix::process;

use crate::harness::*;

super::checks!(
    new_files_belong_to_their_maker,
    new_files_in_setgid_directory_get_its_group,
    setgid_is_stripped_for_strangers_to_the_group,
    umask_takes_bits_away,
    unreadable_file_is_refused,
    read_only_file_is_not_written,
    creator_may_write_a_read_only_file_it_made,
    directory_without_search_is_refused,
    directory_without_write_is_refused,
    supplementary_groups_count,
    sticky_directory_protects_others_files,
    chmod_by_a_stranger_is_refused,
    chmod_by_owner_outside_the_group_strips_setgid,
    chown_by_a_user_is_refused,
    owner_may_give_the_file_to_a_group_of_its_own,
    times_by_a_stranger,
    write_by_a_user_clears_setuid,
    write_by_root_keeps_setuid,
    truncate_by_a_user_clears_setuid,
    chown_clears_setuid,
    write_keeps_setgid_without_group_execution,
    link_and_rename_need_directory_rights,
    mknod_of_device_needs_root,
    root_may_do_all_of_it,
);

fn write_as(uid: u32, name: &str) -> Result<(), Problem> {
    as_user(uid, &[], || {
        let file = open(name, OFlags::WRONLY)?;
        rustix::io::write(&file, b"x")?;
        Ok(())
    })
}

fn new_files_belong_to_their_maker() -> Outcome {
    as_user(ALICE, &[], || {
        create("f", 0o644)?;
        mkdir("d", 0o755)?;
        fs::symlink("f", "l")?;
        fs::mknodat(CWD, "p", fs::FileType::Fifo, mode(0o644), 0)?;
        Ok(())
    })?;
    for name in ["f", "d", "l", "p"] {
        let stat = lstat(name)?;
        equal(name, (stat.st_uid, stat.st_gid), (ALICE, ALICE))?;
    }
    Ok(())
}

fn new_files_in_setgid_directory_get_its_group() -> Outcome {
    mkdir("d", 0o2777)?;
    chown("d", 0, CLUB)?;
    fs::chmod("d", mode(0o2777))?;
    as_user(ALICE, &[], || {
        create("d/f", 0o644)?;
        mkdir("d/e", 0o755)?;
        fs::symlink("f", "d/l")?;
        Ok(())
    })?;
    for name in ["d/f", "d/e", "d/l"] {
        let stat = lstat(name)?;
        equal(name, (stat.st_uid, stat.st_gid), (ALICE, CLUB))?;
    }
    equal("mode of the directory", mode_of("d/e")?, 0o2755)?;
    equal("mode of the file", mode_of("d/f")?, 0o644)
}

fn setgid_is_stripped_for_strangers_to_the_group() -> Outcome {
    mkdir("d", 0o777)?;
    chown("d", 0, CLUB)?;
    fs::chmod("d", mode(0o2777))?;
    as_user(ALICE, &[], || Ok(create("d/stranger", 0o2755).map(drop)?))?;
    equal("by a stranger", mode_of("d/stranger")?, 0o755)?;
    as_user(ALICE, &[CLUB], || Ok(create("d/member", 0o2755).map(drop)?))?;
    equal("by a member", mode_of("d/member")?, 0o2755)
}

fn umask_takes_bits_away() -> Outcome {
    process::umask(mode(0o027));
    create("f", 0o666)?;
    mkdir("d", 0o777)?;
    fs::mknodat(CWD, "p", fs::FileType::Fifo, mode(0o666), 0)?;
    as_user(ALICE, &[], || Ok(create("g", 0o666).map(drop)?))?;
    process::umask(mode(0));
    equal("file", mode_of("f")?, 0o640)?;
    equal("directory", mode_of("d")?, 0o750)?;
    equal("fifo", mode_of("p")?, 0o640)?;
    equal("a user's file", mode_of("g")?, 0o640)?;
    create("h", 0o666)?;
    equal("without umask", mode_of("h")?, 0o666)
}

fn unreadable_file_is_refused() -> Outcome {
    create("f", 0o600)?;
    as_user(ALICE, &[], || {
        refused("read", open("f", OFlags::RDONLY), Errno::ACCESS)?;
        refused("write", open("f", OFlags::WRONLY), Errno::ACCESS)?;
        refused(
            "truncate",
            open("f", OFlags::WRONLY | OFlags::TRUNC),
            Errno::ACCESS,
        )?;
        let access = fs::accessat(CWD, "f", fs::Access::READ_OK, AtFlags::EACCESS);
        refused("access", access, Errno::ACCESS)
    })
}

fn read_only_file_is_not_written() -> Outcome {
    write_file("f", b"keep")?;
    fs::chmod("f", mode(0o444))?;
    as_user(ALICE, &[], || {
        open("f", OFlags::RDONLY)?;
        refused("write", open("f", OFlags::RDWR), Errno::ACCESS)
    })?;
    equal("content", content_of("f")?, b"keep".to_vec())
}

fn creator_may_write_a_read_only_file_it_made() -> Outcome {
    as_user(ALICE, &[], || {
        let file = create("f", 0o400)?;
        rustix::io::write(&file, b"mine")?;
        refused("again", open("f", OFlags::WRONLY), Errno::ACCESS)
    })?;
    equal("content", content_of("f")?, b"mine".to_vec())
}

fn directory_without_search_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    create("d/f", 0o644)?;
    fs::chmod("d", mode(0o644))?;
    as_user(ALICE, &[], || {
        refused("open", open("d/f", OFlags::RDONLY), Errno::ACCESS)?;
        refused("stat", lstat("d/f"), Errno::ACCESS)?;
        open("d", OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(())
    })
}

fn directory_without_write_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    create("d/f", 0o666)?;
    as_user(ALICE, &[], || {
        refused("create", create("d/g", 0o644), Errno::ACCESS)?;
        refused("mkdir", mkdir("d/e", 0o755), Errno::ACCESS)?;
        refused("symlink", fs::symlink("x", "d/l"), Errno::ACCESS)?;
        refused("unlink", fs::unlink("d/f"), Errno::ACCESS)?;
        refused("rename", fs::rename("d/f", "d/g"), Errno::ACCESS)
    })?;
    lstat("d/f")?;
    Ok(())
}

fn supplementary_groups_count() -> Outcome {
    create("f", 0o060)?;
    chown("f", 0, CLUB)?;
    fs::chmod("f", mode(0o060))?;
    as_user(ALICE, &[], || {
        refused("a stranger", open("f", OFlags::RDWR), Errno::ACCESS)
    })?;
    as_user(ALICE, &[CLUB], || Ok(open("f", OFlags::RDWR).map(drop)?))
}

fn sticky_directory_protects_others_files() -> Outcome {
    mkdir("d", 0o1777)?;
    fs::chmod("d", mode(0o1777))?;
    as_user(ALICE, &[], || Ok(create("d/f", 0o666).map(drop)?))?;
    as_user(BOB, &[], || {
        refused("unlink", fs::unlink("d/f"), Errno::PERM)?;
        refused("rename", fs::rename("d/f", "d/g"), Errno::PERM)?;
        create("d/mine", 0o644)?;
        refused("rename over", fs::rename("d/mine", "d/f"), Errno::PERM)?;
        Ok(fs::unlink("d/mine")?)
    })?;
    as_user(ALICE, &[], || Ok(fs::unlink("d/f")?))
}

fn chmod_by_a_stranger_is_refused() -> Outcome {
    create("f", 0o666)?;
    as_user(ALICE, &[], || {
        refused("chmod", fs::chmod("f", mode(0o777)), Errno::PERM)
    })
}

fn chmod_by_owner_outside_the_group_strips_setgid() -> Outcome {
    create("f", 0o755)?;
    chown("f", ALICE, CLUB)?;
    as_user(ALICE, &[], || Ok(fs::chmod("f", mode(0o2755))?))?;
    equal("by a stranger to the group", mode_of("f")?, 0o755)?;
    as_user(ALICE, &[CLUB], || Ok(fs::chmod("f", mode(0o2755))?))?;
    equal("by a member", mode_of("f")?, 0o2755)
}

fn chown_by_a_user_is_refused() -> Outcome {
    as_user(ALICE, &[], || {
        create("f", 0o644)?;
        refused("to another user", chown("f", BOB, ALICE), Errno::PERM)?;
        refused("to a foreign group", chown("f", ALICE, CLUB), Errno::PERM)
    })
}

fn owner_may_give_the_file_to_a_group_of_its_own() -> Outcome {
    as_user(ALICE, &[CLUB], || {
        create("f", 0o644)?;
        Ok(chown("f", ALICE, CLUB)?)
    })?;
    equal("group", lstat("f")?.st_gid, CLUB)
}

fn times_by_a_stranger() -> Outcome {
    create("writable", 0o666)?;
    create("readable", 0o644)?;
    let time = |nanoseconds| fs::Timespec {
        tv_sec: 1_000,
        tv_nsec: nanoseconds,
    };
    let set = |name, nanoseconds| {
        let times = fs::Timestamps {
            last_access: time(nanoseconds),
            last_modification: time(nanoseconds),
        };
        fs::utimensat(CWD, name, &times, AtFlags::empty())
    };
    as_user(ALICE, &[], || {
        set("writable", fs::UTIME_NOW)?;
        refused("a chosen time", set("writable", 0), Errno::PERM)?;
        refused(
            "now, without write access",
            set("readable", fs::UTIME_NOW),
            Errno::ACCESS,
        )
    })
}

fn write_by_a_user_clears_setuid() -> Outcome {
    create("f", 0o777)?;
    chown("f", BOB, BOB)?;
    fs::chmod("f", mode(0o6777))?;
    write_as(ALICE, "f")?;
    equal("mode", mode_of("f")?, 0o777)?;
    fs::chmod("f", mode(0o6777))?;
    as_user(ALICE, &[], || {
        let file = open("f", OFlags::WRONLY)?;
        let allocated = fs::fallocate(&file, fs::FallocateFlags::empty(), 0, 100);
        supported("fallocate", allocated)
    })?;
    equal("mode after fallocate", mode_of("f")?, 0o777)
}

fn write_by_root_keeps_setuid() -> Outcome {
    let file = create("f", 0o755)?;
    fs::chmod("f", mode(0o6755))?;
    rustix::io::write(&file, b"x")?;
    equal("after write", mode_of("f")?, 0o6755)?;
    fs::ftruncate(&file, 0)?;
    equal("after truncate", mode_of("f")?, 0o6755)
}

fn truncate_by_a_user_clears_setuid() -> Outcome {
    write_file("f", b"0123456789")?;
    chown("f", BOB, BOB)?;
    let reset = || fs::chmod("f", mode(0o6777));
    reset()?;
    as_user(ALICE, &[], || {
        Ok(fs::ftruncate(open("f", OFlags::WRONLY)?, 5)?)
    })?;
    equal("by descriptor", mode_of("f")?, 0o777)?;
    reset()?;
    as_user(ALICE, &[], || {
        Ok(open("f", OFlags::WRONLY | OFlags::TRUNC).map(drop)?)
    })?;
    equal("by open", mode_of("f")?, 0o777)
}

fn chown_clears_setuid() -> Outcome {
    create("f", 0o777)?;
    chown("f", ALICE, ALICE)?;
    fs::chmod("f", mode(0o6755))?;
    as_user(ALICE, &[CLUB], || Ok(chown("f", ALICE, CLUB)?))?;
    equal("by the owner", mode_of("f")?, 0o755)?;
    mkdir("d", 0o755)?;
    fs::chmod("d", mode(0o6755))?;
    chown("d", ALICE, ALICE)?;
    equal("a directory keeps them", mode_of("d")?, 0o6755)
}

fn write_keeps_setgid_without_group_execution() -> Outcome {
    create("f", 0o666)?;
    chown("f", ALICE, ALICE)?;
    // Without group execution, set-group-id once meant mandatory locking.
    as_user(ALICE, &[], || Ok(fs::chmod("f", mode(0o2666))?))?;
    write_as(ALICE, "f")?;
    equal("mode", mode_of("f")?, 0o2666)
}

fn link_and_rename_need_directory_rights() -> Outcome {
    mkdir("closed", 0o755)?;
    mkdir("open", 0o777)?;
    chown("open", ALICE, ALICE)?;
    as_user(ALICE, &[], || {
        create("open/f", 0o644)?;
        mkdir("open/d", 0o755)?;
        refused("link", fs::link("open/f", "closed/f"), Errno::ACCESS)?;
        refused("rename", fs::rename("open/f", "closed/f"), Errno::ACCESS)?;
        refused(
            "rename of a directory",
            fs::rename("open/d", "closed/d"),
            Errno::ACCESS,
        )
    })
}

fn mknod_of_device_needs_root() -> Outcome {
    as_user(ALICE, &[], || {
        let device = fs::makedev(1, 3);
        let made = fs::mknodat(
            CWD,
            "null",
            fs::FileType::CharacterDevice,
            mode(0o666),
            device,
        );
        refused("mknod", made, Errno::PERM)
    })
}

fn root_may_do_all_of_it() -> Outcome {
    as_user(ALICE, &[], || {
        mkdir("d", 0o700)?;
        create("d/f", 0o000)?;
        Ok(())
    })?;
    let file = open("d/f", OFlags::RDWR)?;
    rustix::io::write(file.as_fd(), b"root")?;
    create("d/g", 0o600)?;
    fs::chmod("d/f", mode(0o644))?;
    fs::unlink("d/f")?;
    equal("owner of the new file", lstat("d/g")?.st_uid, 0)
}
