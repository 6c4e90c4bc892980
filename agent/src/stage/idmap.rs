//! Mounts with mapped ids.
//!
//! The kernel takes the mapping from a user namespace, and a process that may map has to have rights
//! over the file system. So all of them are made first, by the parent, as trees that are mounted
//! nowhere yet; the child, which may sit in a user namespace, only has to attach them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::process::{Signal, WaitOptions};

use super::mounts::{Depth, Options, clone_tree};
use super::{OrFail, Step, has_own, refusal};
use crate::oci::{IdMapping, Mount, NamespaceKind, Spec};
use crate::sys;

/// The trees of those mounts that have mapped ids, in the places of the mounts.
pub(super) fn prepare(spec: &Spec) -> Step<Vec<Option<OwnedFd>>> {
    spec.mounts
        .iter()
        .map(|mount| match mapping_of(spec, mount)? {
            None => Ok(None),
            Some(mapping) => {
                let step = || {
                    format!(
                        "map the ids of the mount on {}",
                        mount.destination.display()
                    )
                };
                tree_of(mount, &mapping).or_fail(step).map(Some)
            }
        })
        .collect()
}

/// What is mapped, and how deep.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    uids: &'a [IdMapping],
    gids: &'a [IdMapping],
    bind: Depth,
    depth: Depth,
}

fn mapping_of<'a>(spec: &'a Spec, mount: &'a Mount) -> Step<Option<Mapping<'a>>> {
    let options = Options::parse(&mount.options)?;
    let has_mappings = !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty();
    if !has_mappings && options.idmap.is_none() {
        return Ok(None);
    }
    let refuse = |reason: &str| {
        let place = mount.destination.display();
        Err(refusal(format!("mounts: {place} with mapped ids {reason}")))
    };
    if mount.kind != "bind" && options.bind.is_none() {
        return refuse("is no bind mount");
    }
    let (uids, gids) = match has_mappings {
        true => (&mount.uid_mappings, &mount.gid_mappings),
        false if has_own(spec, NamespaceKind::User) => {
            (&spec.linux.uid_mappings, &spec.linux.gid_mappings)
        }
        false => return refuse("has neither mappings nor a user namespace to take them from"),
    };
    if uids.is_empty() || gids.is_empty() {
        return refuse("needs mappings of both users and groups");
    }
    Ok(Some(Mapping {
        uids,
        gids,
        bind: options.bind.unwrap_or(Depth::Single),
        depth: options.idmap.unwrap_or(Depth::Single),
    }))
}

fn tree_of(mount: &Mount, mapping: &Mapping<'_>) -> io::Result<OwnedFd> {
    let tree = clone_tree(&mount.source, mapping.bind)?;
    let namespace = user_namespace(mapping)?;
    let is_recursive = mapping.depth == Depth::Recursive;
    sys::map_mount_ids(tree.as_fd(), namespace.as_fd(), is_recursive)?;
    Ok(tree)
}

/// A user namespace with nobody in it.
fn user_namespace(mapping: &Mapping<'_>) -> io::Result<OwnedFd> {
    let pid = sys::idle_in_user_namespace()?;
    let directory = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let made = || -> io::Result<OwnedFd> {
        std::fs::write(directory.join("uid_map"), IdMapping::lines(mapping.uids))?;
        std::fs::write(directory.join("gid_map"), IdMapping::lines(mapping.gids))?;
        Ok(File::open(directory.join("ns/user"))?.into())
    };
    let made = made();
    rustix::process::kill_process(pid, Signal::KILL)?;
    rustix::process::waitpid(Some(pid), WaitOptions::empty())?;
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(mount: &str, namespaces: &str) -> Step<bool> {
        let text = format!(
            r#"{{"mounts":[{mount}],"linux":{{"namespaces":[{namespaces}],
                "uidMappings":[{{"containerID":0,"hostID":1,"size":2}}],
                "gidMappings":[{{"containerID":0,"hostID":1,"size":2}}]}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).unwrap();
        Ok(mapping_of(&spec, &spec.mounts[0])?.is_some())
    }

    const MAPPINGS: &str = r#""uidMappings":[{"containerID":0,"hostID":5,"size":1}],
        "gidMappings":[{"containerID":0,"hostID":5,"size":1}]"#;

    #[test]
    fn mappings_that_can_not_be_are_refused() {
        for mount in [
            format!(r#"{{"destination":"/a","type":"tmpfs",{MAPPINGS}}}"#),
            r#"{"destination":"/a","type":"bind","options":["idmap"]}"#.to_owned(),
            r#"{"destination":"/a","type":"bind",
                "uidMappings":[{"containerID":0,"hostID":5,"size":1}]}"#
                .to_owned(),
        ] {
            let failure = mapping(&mount, "").unwrap_err();
            assert!(
                failure.is_request_at_fault && failure.text.contains("/a"),
                "{failure}"
            );
        }
    }

    #[test]
    fn mappings_come_from_the_mount_or_the_user_namespace() {
        let own = format!(r#"{{"destination":"/a","type":"bind",{MAPPINGS}}}"#);
        assert!(mapping(&own, "").unwrap());
        let shared = r#"{"destination":"/a","options":["rbind","ridmap"]}"#;
        assert!(mapping(shared, r#"{"type":"user"}"#).unwrap());
        assert!(!mapping(r#"{"destination":"/a","type":"bind"}"#, "").unwrap());
    }
}
