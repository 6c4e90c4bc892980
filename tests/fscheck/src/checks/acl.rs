//! POSIX access control lists, as the kernel stores them in extended attributes.

use rustix::fs::{self, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::process;

use crate::harness::*;

super::checks!(
    acl_lets_a_user_in,
    acl_mask_limits_a_user,
    acl_shuts_a_user_out,
    acl_sets_the_mode,
    chmod_changes_the_mask,
    default_acl_is_inherited,
    default_acl_takes_the_place_of_umask,
    wrong_acl_is_refused,
    default_acl_of_a_file_is_refused,
    removed_acl_is_gone,
);

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Tags of `linux/posix_acl.h`.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// An ACL as an attribute's value: version 2, then entries of tag, permissions and id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

/// `user::owner,user:ALICE:alice,group::0,mask::mask,other::other`
fn acl_for_alice(owner: u16, alice: u16, mask: u16, other: u16) -> Vec<u8> {
    acl(&[
        (USER_OBJ, owner, NO_ID),
        (USER, alice, ALICE),
        (GROUP_OBJ, 0, NO_ID),
        (MASK, mask, NO_ID),
        (OTHER, other, NO_ID),
    ])
}

fn set(name: &str, attribute: &str, value: &[u8]) -> Result<(), Problem> {
    supported(
        "ACLs",
        fs::setxattr(name, attribute, value, XattrFlags::empty()),
    )
}

fn has(name: &str, attribute: &str) -> Result<bool, Errno> {
    match fs::getxattr_query(name, attribute) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn acl_lets_a_user_in() -> Outcome {
    create("f", 0o600)?;
    set("f", ACCESS, &acl_for_alice(6, 6, 6, 0))?;
    as_user(ALICE, &[], || Ok(open("f", OFlags::RDWR).map(drop)?))?;
    as_user(BOB, &[], || {
        refused("another", open("f", OFlags::RDONLY), Errno::ACCESS)
    })
}

fn acl_mask_limits_a_user() -> Outcome {
    create("f", 0o600)?;
    set("f", ACCESS, &acl_for_alice(6, 6, 4, 0))?;
    as_user(ALICE, &[], || {
        open("f", OFlags::RDONLY)?;
        refused("write", open("f", OFlags::WRONLY), Errno::ACCESS)
    })
}

fn acl_shuts_a_user_out() -> Outcome {
    create("f", 0o644)?;
    set("f", ACCESS, &acl_for_alice(6, 0, 7, 4))?;
    as_user(ALICE, &[], || {
        refused("read", open("f", OFlags::RDONLY), Errno::ACCESS)
    })?;
    as_user(BOB, &[], || Ok(open("f", OFlags::RDONLY).map(drop)?))
}

fn acl_sets_the_mode() -> Outcome {
    create("f", 0o600)?;
    set("f", ACCESS, &acl_for_alice(7, 6, 5, 4))?;
    equal("mode", mode_of("f")?, 0o754)?;
    let small = acl(&[
        (USER_OBJ, 6, NO_ID),
        (GROUP_OBJ, 4, NO_ID),
        (OTHER, 0, NO_ID),
    ]);
    set("f", ACCESS, &small)?;
    equal("mode of a small one", mode_of("f")?, 0o640)?;
    equal("a small one is none", has("f", ACCESS)?, false)
}

fn chmod_changes_the_mask() -> Outcome {
    create("f", 0o600)?;
    set("f", ACCESS, &acl_for_alice(6, 6, 6, 0))?;
    fs::chmod("f", mode(0o600))?;
    as_user(ALICE, &[], || {
        refused("read", open("f", OFlags::RDONLY), Errno::ACCESS)
    })?;
    fs::chmod("f", mode(0o640))?;
    as_user(ALICE, &[], || Ok(open("f", OFlags::RDONLY).map(drop)?))
}

fn default_acl_is_inherited() -> Outcome {
    mkdir("d", 0o777)?;
    set("d", DEFAULT, &acl_for_alice(7, 7, 7, 0))?;
    create("d/f", 0o666)?;
    mkdir("d/e", 0o777)?;
    equal("the file has one", has("d/f", ACCESS)?, true)?;
    equal(
        "the directory has a default one",
        has("d/e", DEFAULT)?,
        true,
    )?;
    as_user(ALICE, &[], || Ok(open("d/f", OFlags::RDWR).map(drop)?))?;
    as_user(BOB, &[], || {
        refused("another", open("d/f", OFlags::RDONLY), Errno::ACCESS)
    })?;
    equal("mode", mode_of("d/f")?, 0o660)
}

fn default_acl_takes_the_place_of_umask() -> Outcome {
    mkdir("d", 0o777)?;
    set("d", DEFAULT, &acl_for_alice(7, 7, 7, 5))?;
    process::umask(mode(0o077));
    create("d/f", 0o666)?;
    mkdir("d/e", 0o777)?;
    create("plain", 0o666)?;
    process::umask(mode(0));
    equal("file", mode_of("d/f")?, 0o664)?;
    equal("directory", mode_of("d/e")?, 0o775)?;
    equal("file elsewhere", mode_of("plain")?, 0o600)
}

fn wrong_acl_is_refused() -> Outcome {
    create("f", 0o600)?;
    set("f", ACCESS, &acl_for_alice(6, 6, 6, 0))?;
    let set = |value: &[u8]| fs::setxattr("f", ACCESS, value, XattrFlags::empty());
    refused(
        "no entries but one",
        set(&acl(&[(USER_OBJ, 6, NO_ID)])),
        Errno::INVAL,
    )?;
    refused("garbage", set(b"garbage!"), Errno::OPNOTSUPP)?;
    refused(
        "cut off",
        set(&acl_for_alice(6, 6, 6, 0)[..10]),
        Errno::INVAL,
    )
}

fn default_acl_of_a_file_is_refused() -> Outcome {
    create("f", 0o600)?;
    mkdir("d", 0o755)?;
    set("d", DEFAULT, &acl_for_alice(7, 7, 7, 0))?;
    let value = acl_for_alice(7, 7, 7, 0);
    refused(
        "set",
        fs::setxattr("f", DEFAULT, &value, XattrFlags::empty()),
        Errno::ACCESS,
    )
}

fn removed_acl_is_gone() -> Outcome {
    mkdir("d", 0o755)?;
    set("d", DEFAULT, &acl_for_alice(7, 7, 7, 0))?;
    fs::removexattr("d", DEFAULT)?;
    equal("has one", has("d", DEFAULT)?, false)?;
    create("d/f", 0o644)?;
    equal("mode", mode_of("d/f")?, 0o644)
}
