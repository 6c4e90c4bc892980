//! Extended attributes.

use rustix::fs::{self, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    attribute_is_kept,
    attribute_flags_are_obeyed,
    missing_attribute_is_refused,
    sizes_are_probed,
    attributes_are_listed,
    attribute_by_descriptor_works,
    attribute_of_directory_works,
    empty_and_binary_values_are_kept,
    wrong_attribute_names_are_refused,
    user_attribute_of_symlink_is_refused,
    attributes_need_rights,
    capability_is_kept_and_cleared_by_writing,
);

const NONE: XattrFlags = XattrFlags::empty();

fn set(name: &str, attribute: &str, value: &[u8]) -> Result<(), Problem> {
    supported(
        "user attributes",
        fs::setxattr(name, attribute, value, NONE),
    )
}

fn value_of(name: &str, attribute: &str) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 65536];
    let length = fs::getxattr(name, attribute, &mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn attribute_is_kept() -> Outcome {
    create("f", 0o644)?;
    set("f", "user.one", b"value")?;
    equal("value", value_of("f", "user.one")?, b"value".to_vec())?;
    set("f", "user.one", b"other")?;
    equal("new value", value_of("f", "user.one")?, b"other".to_vec())?;
    fs::removexattr("f", "user.one")?;
    refused("removed", value_of("f", "user.one"), Errno::NODATA)
}

fn attribute_flags_are_obeyed() -> Outcome {
    create("f", 0o644)?;
    let replace = fs::setxattr("f", "user.a", b"1", XattrFlags::REPLACE);
    if replace == Err(Errno::OPNOTSUPP) {
        return skip("user attributes are not supported");
    }
    refused("replace", replace, Errno::NODATA)?;
    fs::setxattr("f", "user.a", b"1", XattrFlags::CREATE)?;
    refused(
        "create",
        fs::setxattr("f", "user.a", b"2", XattrFlags::CREATE),
        Errno::EXIST,
    )?;
    fs::setxattr("f", "user.a", b"3", XattrFlags::REPLACE)?;
    equal("value", value_of("f", "user.a")?, b"3".to_vec())
}

fn missing_attribute_is_refused() -> Outcome {
    create("f", 0o644)?;
    set("f", "user.there", b"")?;
    refused("get", value_of("f", "user.none"), Errno::NODATA)?;
    refused("remove", fs::removexattr("f", "user.none"), Errno::NODATA)?;
    refused("of nothing", value_of("none", "user.none"), Errno::NOENT)
}

fn sizes_are_probed() -> Outcome {
    create("f", 0o644)?;
    set("f", "user.a", b"0123456789")?;
    equal("size", fs::getxattr_query("f", "user.a")?, 10)?;
    refused(
        "too small",
        fs::getxattr("f", "user.a", &mut [0_u8; 9]),
        Errno::RANGE,
    )?;
    equal("list", fs::listxattr_query("f")?, 7)?;
    refused(
        "list too small",
        fs::listxattr("f", &mut [0_u8; 6]),
        Errno::RANGE,
    )?;
    equal("exact", fs::getxattr("f", "user.a", &mut [0_u8; 10])?, 10)
}

fn attributes_are_listed() -> Outcome {
    create("f", 0o644)?;
    for attribute in ["user.b", "user.a", "user.c"] {
        set("f", attribute, b"x")?;
    }
    let mut buffer = vec![0; 1024];
    let length = fs::listxattr("f", &mut buffer)?;
    buffer.truncate(length);
    let mut names: Vec<_> = buffer
        .split(|byte| *byte == 0)
        .map(<[u8]>::to_vec)
        .collect();
    names.retain(|name| name.starts_with(b"user."));
    names.sort();
    equal(
        "names",
        names,
        [b"user.a", b"user.b", b"user.c"]
            .map(|name| name.to_vec())
            .into(),
    )
}

fn attribute_by_descriptor_works() -> Outcome {
    let file = create("f", 0o644)?;
    supported(
        "user attributes",
        fs::fsetxattr(&file, "user.a", b"fd", NONE),
    )?;
    equal("by name", value_of("f", "user.a")?, b"fd".to_vec())?;
    fs::unlink("f")?;
    let mut buffer = [0_u8; 2];
    equal(
        "after unlink",
        fs::fgetxattr(&file, "user.a", &mut buffer)?,
        2,
    )?;
    Ok(fs::fremovexattr(&file, "user.a")?)
}

fn attribute_of_directory_works() -> Outcome {
    mkdir("d", 0o755)?;
    set("d", "user.a", b"dir")?;
    equal("value", value_of("d", "user.a")?, b"dir".to_vec())
}

fn empty_and_binary_values_are_kept() -> Outcome {
    create("f", 0o644)?;
    set("f", "user.empty", b"")?;
    equal("empty", value_of("f", "user.empty")?, Vec::new())?;
    let binary: Vec<u8> = (0..=255).collect();
    set("f", "user.binary", &binary)?;
    equal("binary", value_of("f", "user.binary")?, binary)
}

fn wrong_attribute_names_are_refused() -> Outcome {
    create("f", 0o644)?;
    refused(
        "no namespace",
        fs::setxattr("f", "name", b"x", NONE),
        Errno::OPNOTSUPP,
    )?;
    let long = format!("user.{}", "n".repeat(251));
    refused(
        "too long",
        fs::setxattr("f", &long, b"x", NONE),
        Errno::RANGE,
    )?;
    refused("empty", fs::setxattr("f", "", b"x", NONE), Errno::RANGE)
}

fn user_attribute_of_symlink_is_refused() -> Outcome {
    fs::symlink("none", "l")?;
    refused("set", fs::lsetxattr("l", "user.a", b"x", NONE), Errno::PERM)
}

fn attributes_need_rights() -> Outcome {
    create("f", 0o644)?;
    set("f", "user.a", b"x")?;
    fs::chmod("f", mode(0o600))?;
    as_user(ALICE, &[], || {
        refused("get", value_of("f", "user.a"), Errno::ACCESS)?;
        refused(
            "set",
            fs::setxattr("f", "user.a", b"y", NONE),
            Errno::ACCESS,
        )
    })
}

fn capability_is_kept_and_cleared_by_writing() -> Outcome {
    /// `cap_net_raw+ep`, `struct vfs_cap_data` of revision 2.
    const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    create("f", 0o777)?;
    let name = "security.capability";
    supported(
        "file capabilities",
        fs::setxattr("f", name, CAPABILITY, NONE),
    )?;
    equal("value", value_of("f", name)?, CAPABILITY.to_vec())?;
    as_user(ALICE, &[], || {
        rustix::io::write(open("f", OFlags::WRONLY)?, b"x")?;
        Ok(())
    })?;
    refused("after a write", value_of("f", name), Errno::NODATA)
}
