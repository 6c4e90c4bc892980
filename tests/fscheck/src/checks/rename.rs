//! Renames, with and without flags.

use rustix::fs::{self, CWD, FileType, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    rename_replaces_a_file,
    rename_to_another_link_of_the_file_does_nothing,
    rename_replaces_an_empty_directory_only,
    rename_between_file_and_directory_is_refused,
    rename_of_missing_file_is_refused,
    rename_into_itself_is_refused,
    rename_keeps_open_files,
    rename_of_symlink_moves_the_link,
    rename_without_replacing,
    rename_exchanges,
    rename_leaves_a_whiteout,
    rename_with_wrong_flags_is_refused,
    rename_to_another_file_system_is_refused,
    rename_of_dot_is_refused,
);

fn rename_replaces_a_file() -> Outcome {
    write_file("f", b"new")?;
    write_file("g", b"old")?;
    let inode = lstat("f")?.st_ino;
    fs::rename("f", "g")?;
    is_gone("f")?;
    equal("content", content_of("g")?, b"new".to_vec())?;
    equal("inode", lstat("g")?.st_ino, inode)
}

fn rename_to_another_link_of_the_file_does_nothing() -> Outcome {
    create("f", 0o644)?;
    fs::link("f", "g")?;
    fs::rename("f", "g")?;
    equal("links", lstat("f")?.st_nlink, 2)?;
    fs::rename("f", "f")?;
    equal("links after", lstat("g")?.st_nlink, 2)
}

fn rename_replaces_an_empty_directory_only() -> Outcome {
    mkdir("d", 0o755)?;
    create("d/f", 0o644)?;
    mkdir("empty", 0o755)?;
    fs::rename("d", "empty")?;
    lstat("empty/f")?;
    mkdir("d", 0o755)?;
    refused("over a full one", fs::rename("d", "empty"), Errno::NOTEMPTY)
}

fn rename_between_file_and_directory_is_refused() -> Outcome {
    create("f", 0o644)?;
    mkdir("d", 0o755)?;
    refused("file over directory", fs::rename("f", "d"), Errno::ISDIR)?;
    refused("directory over file", fs::rename("d", "f"), Errno::NOTDIR)?;
    refused(
        "file to a name with slash",
        fs::rename("f", "g/"),
        Errno::NOTDIR,
    )
}

fn rename_of_missing_file_is_refused() -> Outcome {
    refused("rename", fs::rename("none", "f"), Errno::NOENT)?;
    create("f", 0o644)?;
    refused("into nowhere", fs::rename("f", "none/f"), Errno::NOENT)?;
    refused("below a file", fs::rename("f", "f/g"), Errno::NOTDIR)
}

fn rename_into_itself_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    mkdir("d/e", 0o755)?;
    refused("into its child", fs::rename("d", "d/e/d"), Errno::INVAL)?;
    refused("over its parent", fs::rename("d/e", "d"), Errno::NOTEMPTY)
}

fn rename_keeps_open_files() -> Outcome {
    write_file("f", b"1234")?;
    write_file("g", b"abcd")?;
    let (moved, replaced) = (open("f", OFlags::RDWR)?, open("g", OFlags::RDONLY)?);
    fs::rename("f", "g")?;
    rustix::io::pwrite(&moved, b"56", 4)?;
    equal("the moved one", content_of("g")?, b"123456".to_vec())?;
    let mut buffer = [0; 4];
    rustix::io::pread(&replaced, &mut buffer, 0)?;
    equal("the replaced one", &buffer, b"abcd")?;
    equal("its links", fs::fstat(&replaced)?.st_nlink, 0)
}

fn rename_of_symlink_moves_the_link() -> Outcome {
    mkdir("d", 0o755)?;
    fs::symlink("d", "l")?;
    fs::rename("l", "m")?;
    equal("type", kind_of("m")?, FileType::Symlink)?;
    equal("the directory", kind_of("d")?, FileType::Directory)
}

fn rename_without_replacing() -> Outcome {
    create("f", 0o644)?;
    create("g", 0o644)?;
    let rename = |to| fs::renameat_with(CWD, "f", CWD, to, RenameFlags::NOREPLACE);
    refused("over a file", rename("g"), Errno::EXIST)?;
    supported("RENAME_NOREPLACE", rename("h"))?;
    is_gone("f")?;
    lstat("h")?;
    Ok(())
}

fn rename_exchanges() -> Outcome {
    write_file("f", b"file")?;
    mkdir("d", 0o755)?;
    create("d/inside", 0o644)?;
    let exchange = |from, to| fs::renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE);
    supported("RENAME_EXCHANGE", exchange("f", "d"))?;
    equal("the file", content_of("d")?, b"file".to_vec())?;
    lstat("f/inside")?;
    refused("with nothing", exchange("f", "none"), Errno::NOENT)
}

fn rename_leaves_a_whiteout() -> Outcome {
    create("f", 0o644)?;
    let flags = RenameFlags::WHITEOUT;
    match fs::renameat_with(CWD, "f", CWD, "g", flags) {
        Err(Errno::INVAL) => return skip("RENAME_WHITEOUT is not supported"),
        result => result?,
    }
    let whiteout = lstat("f")?;
    equal("type", kind_of("f")?, FileType::CharacterDevice)?;
    equal("device", whiteout.st_rdev, 0)
}

fn rename_with_wrong_flags_is_refused() -> Outcome {
    create("f", 0o644)?;
    create("g", 0o644)?;
    let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
    refused(
        "both",
        fs::renameat_with(CWD, "f", CWD, "g", both),
        Errno::INVAL,
    )?;
    let unknown = RenameFlags::from_bits_retain(1 << 20);
    refused(
        "unknown",
        fs::renameat_with(CWD, "f", CWD, "g", unknown),
        Errno::INVAL,
    )
}

fn rename_to_another_file_system_is_refused() -> Outcome {
    create("f", 0o644)?;
    let other = "/dev/shm";
    match lstat(other) {
        Ok(stat) if stat.st_dev != lstat("f")?.st_dev => {}
        _ => return skip("there is no other file system at /dev/shm"),
    }
    let name = format!("{other}/fscheck-{}", std::process::id());
    refused("rename", fs::rename("f", &name), Errno::XDEV)?;
    refused("link", fs::link("f", &name), Errno::XDEV)
}

fn rename_of_dot_is_refused() -> Outcome {
    mkdir("d", 0o755)?;
    refused("of .", fs::rename("d/.", "e"), Errno::BUSY)?;
    refused("to ..", fs::rename("d", "d/.."), Errno::BUSY)
}
