//! Who a command runs as: `--user` in numbers, by the root file system's own lists.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// A user in numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) home: Option<String>,
}

/// Longest `/etc/passwd` or `/etc/group` that is read.
const LIST_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Looks up `USER[:GROUP]`, each a number or a name.
pub(crate) fn look_up(wanted: &str, rootfs: &Path) -> Result<User> {
    let passwd = read_list(rootfs, "etc/passwd");
    let group = read_list(rootfs, "etc/group");
    resolve(wanted, &passwd, &group)
}

fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User> {
    let (name, wanted_group) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let number = name.parse::<u32>().ok();
    // passwd(5): name, password, uid, gid, comment, home, shell.
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| match number {
            Some(uid) => fields.get(2).and_then(|field| field.parse().ok()) == Some(uid),
            None => fields.first() == Some(&name),
        });
    let field = |index: usize| entry.as_ref().and_then(|fields| fields.get(index).copied());
    let Some(uid) = number.or_else(|| field(2)?.parse().ok()) else {
        bail!("user {name:?} is not in the root file system's /etc/passwd");
    };
    let mut user = User {
        uid,
        gid: field(3).and_then(|gid| gid.parse().ok()).unwrap_or(0),
        additional_gids: Vec::new(),
        home: field(5).filter(|home| !home.is_empty()).map(str::to_owned),
    };
    if let Some(wanted) = wanted_group {
        user.gid = find_group(wanted, group).with_context(|| {
            format!("group {wanted:?} is not in the root file system's /etc/group")
        })?;
    } else if let Some(name) = field(0) {
        user.additional_gids = groups_of(name, group);
    }
    Ok(user)
}

/// group(5): name, password, gid, members.
fn find_group(wanted: &str, group: &str) -> Option<u32> {
    if let Ok(gid) = wanted.parse() {
        return Some(gid);
    }
    let entry = group
        .lines()
        .find(|line| line.split(':').next() == Some(wanted))?;
    entry.split(':').nth(2)?.parse().ok()
}

fn groups_of(name: &str, group: &str) -> Vec<u32> {
    group
        .lines()
        .filter(|line| {
            let members = line.split(':').nth(3).unwrap_or_default();
            members.split(',').any(|member| member == name)
        })
        .filter_map(|line| line.split(':').nth(2)?.parse().ok())
        .collect()
}

/// A file of the root file system, whose links are not followed out of it. A missing one is empty.
fn read_list(rootfs: &Path, path: &str) -> String {
    let mut text = String::new();
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Not blocking: it might be a FIFO.
    let file = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = rustix::fs::openat(CWD, rootfs, directory, Mode::empty()).and_then(|root| {
        rustix::fs::openat2(root, path, file, Mode::empty(), ResolveFlags::IN_ROOT)
    });
    if let Ok(file) = opened
        && File::from(file)
            .take(LIST_BYTES_MAX)
            .read_to_string(&mut text)
            .is_err()
    {
        text.clear();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbad\nann:x:1000:100::/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\naudio:x:29:ann,bob\nbad:x\n";

    #[test]
    fn unknown_names_are_errors() {
        for wanted in ["bob", "", "bad", "ann:none", "-1", "4294967296"] {
            assert!(resolve(wanted, PASSWD, GROUP).is_err(), "{wanted}");
        }
    }

    #[test]
    fn name_brings_its_groups_and_home() {
        let user = resolve("ann", PASSWD, GROUP).unwrap();
        let expected = User {
            uid: 1000,
            gid: 100,
            additional_gids: vec![29],
            home: Some("/home/ann".to_owned()),
        };
        assert_eq!(user, expected);
    }

    #[test]
    fn number_needs_no_entry() {
        let user = resolve("5:6", "", "").unwrap();
        assert_eq!((user.uid, user.gid), (5, 6));
        assert_eq!(user.home, None);
    }

    #[test]
    fn link_out_of_the_root_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), PASSWD).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("etc")).unwrap();
        assert_eq!(read_list(root.path(), "etc/passwd"), "");
    }
}
