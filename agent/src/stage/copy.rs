//! Copies a tree of files: what a new file system starts with that covers it (`tmpcopyup`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};

/// Deepest directory that is copied. Each level takes descriptors and stack, and the tree is the
/// image's.
const DEPTH_MAX: usize = 128;

/// Copies what is in one directory into another: contents, kinds, owners, modes and times.
pub(super) fn copy_tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // The two may be places only (O_PATH), which can't be read.
    let from = open(from, ".", OFlags::DIRECTORY)?;
    let to = open(to, ".", OFlags::DIRECTORY)?;
    copy_entries(&from, &to, 0)
}

fn copy_entries(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other(format!(
            "directories are more than {DEPTH_MAX} deep"
        )));
    }
    for entry in rustix::fs::Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & MODE_BITS);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, mode)?;
                let inner = open(from.as_fd(), name, OFlags::DIRECTORY)?;
                let copy = open(to.as_fd(), name, OFlags::DIRECTORY)?;
                copy_entries(&inner, &copy, depth + 1)?;
            }
            FileType::RegularFile => {
                let mut original = File::from(open(from.as_fd(), name, OFlags::empty())?);
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                let mut copy = File::from(rustix::fs::openat(to, name, flags, mode)?);
                io::copy(&mut original, &mut copy)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&target, to, name)?;
            }
            kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        dress(to, name, &stat)?;
    }
    Ok(())
}

/// Gives a copy the attributes of what it is a copy of. The mode comes after the owner, whose change
/// takes set-user-id away.
fn dress(to: &OwnedFd, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(stat.st_mode & MODE_BITS);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |tv_sec, tv_nsec: u64| Timespec {
        tv_sec,
        tv_nsec: tv_nsec.try_into().unwrap_or_default(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::utimensat(
        to,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn open<P: rustix::path::Arg>(
    directory: BorrowedFd<'_>,
    name: P,
    flags: OFlags,
) -> io::Result<OwnedFd> {
    // Not blocking: the image may have swapped a pipe in.
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?)
}

const MODE_BITS: u32 = 0o7777;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;
    use crate::stage::mounts::open_here;

    fn copy(from: &tempfile::TempDir) -> io::Result<tempfile::TempDir> {
        let to = tempfile::tempdir()?;
        copy_tree(
            open_here(from.path())?.as_fd(),
            open_here(to.path())?.as_fd(),
        )?;
        Ok(to)
    }

    #[test]
    fn endless_depth_is_refused() {
        let from = tempfile::tempdir().unwrap();
        let deep: std::path::PathBuf = std::iter::repeat_n("d", DEPTH_MAX + 2).collect();
        fs::create_dir_all(from.path().join(deep)).unwrap();
        assert!(copy(&from).is_err());
    }

    #[test]
    fn copy_is_like_the_original() {
        let from = tempfile::tempdir().unwrap();
        fs::create_dir(from.path().join("sub")).unwrap();
        fs::write(from.path().join("sub/file"), "text").unwrap();
        fs::set_permissions(
            from.path().join("sub/file"),
            fs::Permissions::from_mode(0o4750),
        )
        .unwrap();
        symlink("/etc/passwd", from.path().join("link")).unwrap();
        let to = copy(&from).unwrap();
        assert_eq!(
            fs::read_to_string(to.path().join("sub/file")).unwrap(),
            "text"
        );
        let (a, b) = (from.path().join("sub/file"), to.path().join("sub/file"));
        let (a, b) = (fs::metadata(a).unwrap(), fs::metadata(b).unwrap());
        assert_eq!((a.mode(), a.mtime_nsec()), (b.mode(), b.mtime_nsec()));
        let link = fs::read_link(to.path().join("link")).unwrap();
        assert_eq!(link, std::path::Path::new("/etc/passwd"));
    }
}
