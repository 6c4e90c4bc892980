//! Names: making, finding and removing them, links.

use rustix::fs::{self, AtFlags, CWD, FileType, OFlags};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    open_of_missing_file_is_refused,
    create_makes_a_file,
    exclusive_create_of_existing_file_is_refused,
    exclusive_create_does_not_follow_a_link,
    create_through_dangling_link_makes_its_target,
    create_below_a_file_is_refused,
    create_in_missing_directory_is_refused,
    name_of_255_bytes_works_and_256_is_refused,
    odd_bytes_in_names_are_kept,
    open_of_directory_for_writing_is_refused,
    open_as_directory_of_a_file_is_refused,
    mkdir_and_rmdir_keep_link_counts,
    mkdir_over_anything_is_refused,
    rmdir_of_full_directory_is_refused,
    rmdir_of_a_file_is_refused,
    rmdir_of_dot_is_refused,
    unlink_of_directory_is_refused,
    unlink_of_missing_file_is_refused,
    link_makes_a_second_name,
    link_over_existing_name_is_refused,
    link_of_directory_is_refused,
    link_to_missing_file_is_refused,
    link_of_symlink_links_the_link,
    symlink_keeps_its_target,
    symlink_target_of_4095_bytes_works,
    symlink_loop_is_refused,
    symlink_is_not_followed_when_told,
    readlink_of_a_file_is_refused,
    dotdot_leads_to_the_parent,
    removed_directory_takes_no_files,
    long_path_is_walked,
);

fn open_of_missing_file_is_refused() -> Outcome {
    refused("open", open("none", OFlags::RDONLY), Errno::NOENT)?;
    refused("stat", lstat("none"), Errno::NOENT)?;
    // Again, with whatever is cached of the first time.
    refused("open again", open("none", OFlags::RDONLY), Errno::NOENT)?;
    create("none", 0o644)?;
    lstat("none")?;
    Ok(())
}

fn create_makes_a_file() -> Outcome {
    create("f", 0o640)?;
    let stat = lstat("f")?;
    equal("type", kind_of("f")?, FileType::RegularFile)?;
    equal("mode", stat.st_mode & 0o7777, 0o640)?;
    equal("size", stat.st_size, 0)?;
    equal("links", stat.st_nlink, 1)?;
    equal("owner", (stat.st_uid, stat.st_gid), (0, 0))
}

fn exclusive_create_of_existing_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    refused("create", create("f", 0o644), Errno::EXIST)?;
    mkdir("d", 0o755)?;
    refused("create over a directory", create("d", 0o644), Errno::EXIST)
}

fn exclusive_create_does_not_follow_a_link() -> Outcome {
    fs::symlink("target", "link")?;
    refused("create", create("link", 0o644), Errno::EXIST)?;
    is_gone("target")
}

fn create_through_dangling_link_makes_its_target() -> Outcome {
    fs::symlink("target", "link")?;
    fs::open("link", OFlags::CREATE | OFlags::WRONLY, mode(0o600))?;
    equal("type", kind_of("target")?, FileType::RegularFile)
}

fn create_below_a_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    refused("create", create("f/g", 0o644), Errno::NOTDIR)?;
    refused("stat", lstat("f/g"), Errno::NOTDIR)?;
    refused("mkdir", mkdir("f/d", 0o755), Errno::NOTDIR)
}

fn create_in_missing_directory_is_refused() -> Outcome {
    refused("create", create("none/f", 0o644), Errno::NOENT)?;
    refused("mkdir", mkdir("none/d", 0o755), Errno::NOENT)?;
    refused("symlink", fs::symlink("x", "none/l"), Errno::NOENT)
}

fn name_of_255_bytes_works_and_256_is_refused() -> Outcome {
    let longest = "n".repeat(255);
    create(&longest, 0o644)?;
    lstat(&longest)?;
    fs::rename(&longest, "short")?;
    fs::rename("short", &longest)?;
    fs::unlink(&longest)?;
    let longer = "n".repeat(256);
    refused("create", create(&longer, 0o644), Errno::NAMETOOLONG)?;
    refused("stat", lstat(&longer), Errno::NAMETOOLONG)?;
    refused("mkdir", mkdir(&longer, 0o755), Errno::NAMETOOLONG)?;
    refused("symlink", fs::symlink("x", &longer), Errno::NAMETOOLONG)?;
    refused("unlink", fs::unlink(&longer), Errno::NAMETOOLONG)
}

fn odd_bytes_in_names_are_kept() -> Outcome {
    for name in [
        " ", "\n", "\u{1}", "...", "-rf", "\u{fffd}", "*?[", "a\tb\\",
    ] {
        create(name, 0o644)?;
        lstat(name)?;
        fs::unlink(name)?;
    }
    let bytes: &[u8] = b"\xff\xfe\x80";
    fs::mkdir(bytes, mode(0o755))?;
    Ok(fs::rmdir(bytes)?)
}

fn open_of_directory_for_writing_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    refused("open to write", open("d", OFlags::WRONLY), Errno::ISDIR)?;
    refused(
        "open to read and write",
        open("d", OFlags::RDWR),
        Errno::ISDIR,
    )?;
    let made = fs::open("d", OFlags::CREATE | OFlags::RDONLY, mode(0o644));
    refused("open to create", made, Errno::ISDIR)?;
    let directory = open("d", OFlags::RDONLY)?;
    refused(
        "read",
        rustix::io::read(&directory, &mut [0; 8]),
        Errno::ISDIR,
    )
}

fn open_as_directory_of_a_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    refused(
        "open",
        open("f", OFlags::RDONLY | OFlags::DIRECTORY),
        Errno::NOTDIR,
    )?;
    refused("open with slash", open("f/", OFlags::RDONLY), Errno::NOTDIR)
}

fn mkdir_and_rmdir_keep_link_counts() -> Outcome {
    mkdir("d", 0o755)?;
    let before = lstat("d")?.st_nlink;
    mkdir("d/e", 0o700)?;
    equal("mode", mode_of("d/e")?, 0o700)?;
    let after = lstat("d")?.st_nlink;
    // Some file systems count 1 always.
    holds(
        "a directory's link count grows by its directories",
        after == before + 1 || before == 1,
    )?;
    fs::rmdir("d/e")?;
    equal("links at the end", lstat("d")?.st_nlink, before)
}

fn mkdir_over_anything_is_refused() -> Outcome {
    create("f", 0o644)?;
    mkdir("d", 0o755)?;
    fs::symlink("none", "l")?;
    for name in ["f", "d", "l"] {
        refused(name, mkdir(name, 0o755), Errno::EXIST)?;
    }
    Ok(())
}

fn rmdir_of_full_directory_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    create("d/f", 0o644)?;
    refused("rmdir", fs::rmdir("d"), Errno::NOTEMPTY)?;
    fs::unlink("d/f")?;
    fs::rmdir("d")?;
    is_gone("d")
}

fn rmdir_of_a_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    refused("rmdir", fs::rmdir("f"), Errno::NOTDIR)?;
    refused("rmdir of nothing", fs::rmdir("none"), Errno::NOENT)
}

fn rmdir_of_dot_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    refused("rmdir of .", fs::rmdir("d/."), Errno::INVAL)?;
    refused("rmdir of ..", fs::rmdir("d/.."), Errno::NOTEMPTY)
}

fn unlink_of_directory_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    refused("unlink", fs::unlink("d"), Errno::ISDIR)
}

fn unlink_of_missing_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    fs::unlink("f")?;
    refused("unlink", fs::unlink("f"), Errno::NOENT)
}

fn link_makes_a_second_name() -> Outcome {
    write_file("f", b"shared")?;
    fs::link("f", "g")?;
    let (one, two) = (lstat("f")?, lstat("g")?);
    equal("inode", two.st_ino, one.st_ino)?;
    equal("links by the first", one.st_nlink, 2)?;
    equal("links by the second", two.st_nlink, 2)?;
    write_file("g", b"changed")?;
    equal("content", content_of("f")?, b"changed".to_vec())?;
    fs::unlink("f")?;
    equal("links at the end", lstat("g")?.st_nlink, 1)
}

fn link_over_existing_name_is_refused() -> Outcome {
    create("f", 0o644)?;
    create("g", 0o644)?;
    mkdir("d", 0o755)?;
    refused("over a file", fs::link("f", "g"), Errno::EXIST)?;
    refused("over itself", fs::link("f", "f"), Errno::EXIST)?;
    refused("over a directory", fs::link("f", "d"), Errno::EXIST)
}

fn link_of_directory_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    refused("link", fs::link("d", "e"), Errno::PERM)
}

fn link_to_missing_file_is_refused() -> Outcome {
    refused("link", fs::link("none", "f"), Errno::NOENT)?;
    create("f", 0o644)?;
    refused(
        "in a missing directory",
        fs::link("f", "none/f"),
        Errno::NOENT,
    )?;
    refused("below a file", fs::link("f", "f/g"), Errno::NOTDIR)
}

fn link_of_symlink_links_the_link() -> Outcome {
    fs::symlink("none", "l")?;
    fs::linkat(CWD, "l", CWD, "m", AtFlags::empty())?;
    equal("type", kind_of("m")?, FileType::Symlink)?;
    equal("inode", lstat("m")?.st_ino, lstat("l")?.st_ino)
}

fn symlink_keeps_its_target() -> Outcome {
    let target = "../some//where/./else";
    fs::symlink(target, "l")?;
    equal(
        "target",
        fs::readlink("l", Vec::new())?
            .to_string_lossy()
            .into_owned(),
        target.into(),
    )?;
    equal("size", lstat("l")?.st_size, 21)?;
    equal("type", kind_of("l")?, FileType::Symlink)?;
    equal("mode", mode_of("l")?, 0o777)?;
    refused("symlink over it", fs::symlink("x", "l"), Errno::EXIST)
}

fn symlink_target_of_4095_bytes_works() -> Outcome {
    let target = "t".repeat(4095);
    fs::symlink(&target, "l")?;
    equal("length", fs::readlink("l", Vec::new())?.count_bytes(), 4095)?;
    refused(
        "4096",
        fs::symlink("t".repeat(4096), "m"),
        Errno::NAMETOOLONG,
    )?;
    refused("nothing", fs::symlink("", "m"), Errno::NOENT)
}

fn symlink_loop_is_refused() -> Outcome {
    fs::symlink("b", "a")?;
    fs::symlink("a", "b")?;
    fs::symlink("self/x", "self")?;
    refused("open", open("a", OFlags::RDONLY), Errno::LOOP)?;
    refused("open below", open("self", OFlags::RDONLY), Errno::LOOP)?;
    refused("stat below", lstat("a/x"), Errno::LOOP)
}

fn symlink_is_not_followed_when_told() -> Outcome {
    create("f", 0o644)?;
    fs::symlink("f", "l")?;
    refused(
        "open",
        open("l", OFlags::RDONLY | OFlags::NOFOLLOW),
        Errno::LOOP,
    )?;
    open("l", OFlags::RDONLY)?;
    Ok(())
}

fn readlink_of_a_file_is_refused() -> Outcome {
    create("f", 0o644)?;
    refused("of a file", fs::readlink("f", Vec::new()), Errno::INVAL)?;
    refused(
        "of a directory",
        fs::readlink(".", Vec::new()),
        Errno::INVAL,
    )
}

fn dotdot_leads_to_the_parent() -> Outcome {
    mkdir("d", 0o755)?;
    mkdir("d/e", 0o755)?;
    equal("inode", lstat("d/e/..")?.st_ino, lstat("d")?.st_ino)?;
    equal("inode of .", lstat("d/e/.")?.st_ino, lstat("d/e")?.st_ino)?;
    fs::rename("d/e", "e")?;
    equal(
        "inode after a move",
        lstat("e/..")?.st_ino,
        lstat(".")?.st_ino,
    )
}

fn removed_directory_takes_no_files() -> Outcome {
    mkdir("d", 0o755)?;
    let directory = open("d", OFlags::RDONLY | OFlags::DIRECTORY)?;
    fs::rmdir("d")?;
    let flags = OFlags::CREATE | OFlags::WRONLY;
    refused(
        "create",
        fs::openat(&directory, "f", flags, mode(0o644)),
        Errno::NOENT,
    )?;
    refused(
        "mkdir",
        fs::mkdirat(&directory, "e", mode(0o755)),
        Errno::NOENT,
    )?;
    equal("links", fs::fstat(&directory)?.st_nlink, 0)
}

fn long_path_is_walked() -> Outcome {
    // Longer than PATH_MAX from the root, by steps.
    let name = "p".repeat(200);
    let mut directory = open(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
    for _ in 0..30 {
        fs::mkdirat(&directory, &name, mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        directory = fs::openat(&directory, &name, flags, mode(0))?;
    }
    let flags = OFlags::CREATE | OFlags::WRONLY;
    fs::openat(&directory, "f", flags, mode(0o644))?;
    fs::statat(&directory, "f", AtFlags::empty())?;
    refused(
        "a path too long",
        lstat(&"p/".repeat(2048)),
        Errno::NAMETOOLONG,
    )
}
