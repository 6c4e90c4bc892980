//! Removing a directory that mounts may be below.
//!
//! What is mounted there is somebody else's: a mount that comes while its directory is being removed
//! must stop the removal, and not be emptied.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;
use rustix::path::Arg;

/// Removes a directory and all below it. Nothing there is no error; at a mount point it stops.
pub(crate) fn remove_tree(directory: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match rustix::fs::open(parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        parent => parent?,
    };
    Ok(name.into_with_c_str(|name| remove_at(parent.as_fd(), name))?)
}

fn remove_at(parent: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match openat2(parent, name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return unlinkat(parent, name, AtFlags::empty()),
        Err(errno) => return Err(errno),
    };
    let names: Vec<_> = Dir::read_from(&directory)?
        .map(|entry| Ok(entry?.file_name().to_owned()))
        .collect::<rustix::io::Result<_>>()?;
    for name in names {
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            remove_at(directory.as_fd(), &name)?;
        }
    }
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use nix::mount::{MsFlags, mount, umount};

    use super::*;

    /// One with directories to be removed, and one with a file that must stay.
    fn make_trees(directory: &Path) -> (PathBuf, PathBuf) {
        let (tree, other) = (directory.join("tree"), directory.join("other"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("file"), "").unwrap();
        (tree, other)
    }

    #[test]
    fn tree_is_removed_and_what_its_links_lead_to_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, other) = make_trees(directory.path());
        fs::write(tree.join("a/file"), "").unwrap();
        symlink(&other, tree.join("link")).unwrap();

        remove_tree(&tree).unwrap();
        remove_tree(&tree).unwrap();

        assert!(!tree.exists());
        assert!(other.join("file").exists());
    }

    #[test]
    fn mount_below_it_stops_it_and_stays_whole() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, other) = make_trees(directory.path());
        let none = None::<&str>;
        mount(Some(&other), &tree.join("a"), none, MsFlags::MS_BIND, none).unwrap();

        let removed = remove_tree(&tree);

        let is_there = other.join("file").exists();
        umount(&tree.join("a")).unwrap();
        let errno = removed.unwrap_err().raw_os_error();
        assert_eq!(errno, Some(Errno::XDEV.raw_os_error()));
        assert!(is_there);
    }
}
