//! A pod's directory, and what is recorded there for whoever must clean up.
//!
//! ```text
//! /run/husk/<namespace>/<pod>/    mode 0700
//!     layout/                     skeleton of the share: <container>/rootfs, <container>/mounts/<n>
//!     shared/                     `layout` again, bind-mounted read-only, with shared propagation:
//!                                 the VMM's root. All mounts are made below it
//!     staging/                    private mount, where a mount is finished before it moves there
//!     console.log  vmm.log        what the guest's kernel and agent, and the VMM, have written
//!     vmm.pid  state.json         for people; for `cleanup`
//!     hooks/<container>.json      poststop hooks that have not run yet
//! ```
//!
//! `shared` shows `layout` read-only because the VMM, and with it a guest that has taken it over,
//! could otherwise fill the host's `/run`.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::process::Identity;
use crate::remove::remove_tree;
use crate::{StartError, mounts};

/// Longest name of a namespace or an id: containerd's own limit.
const NAME_CHARS_MAX: usize = 76;

/// How often a directory is made again that an ending sandbox removes at the same time.
const CREATE_TRIES_MAX: u32 = 16;

/// A pod's directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    root: PathBuf,
    path: PathBuf,
}

/// What must be known to clean up.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Record {
    /// The process that made the sandbox.
    pub(crate) owner: Option<Identity>,
    pub(crate) vmm: Option<Identity>,
    pub(crate) cgroup: Option<PathBuf>,
    /// Somebody else's network namespace, whose interfaces were redirected.
    pub(crate) netns: Option<PathBuf>,
}

/// Whether a name can be that of a namespace, a pod or a container: as containerd allows it.
pub(crate) fn is_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric();
    name.len() <= NAME_CHARS_MAX
        && name.starts_with(is_plain)
        && name.chars().all(|c| is_plain(c) || "._-".contains(c))
}

impl StateDir {
    /// The place of a pod's directory, whether it is there or not.
    pub(crate) fn locate(root: &Path, namespace: &str, id: &str) -> Result<Self, StartError> {
        for (what, name) in [("namespace", namespace), ("sandbox", id)] {
            if !is_name(name) {
                return Err(StartError::Name {
                    name: name.to_owned(),
                    what,
                    max: NAME_CHARS_MAX,
                });
            }
        }
        Ok(Self {
            root: root.to_owned(),
            path: root.join(namespace).join(id),
        })
    }

    /// Makes the directory and the share in it. The pod's directory itself may be there already,
    /// but not a share in it.
    pub(crate) fn create(&self) -> Result<(), StartError> {
        self.create_parents()?;
        match fs::create_dir(self.layout()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StartError::AlreadyExists {
                    path: self.path.clone(),
                });
            }
            Err(source) => return Err(state_error("create the directory", self.layout(), source)),
        }
        for path in [self.shared(), self.staging()] {
            fs::create_dir(&path)
                .map_err(|source| state_error("create the directory", path, source))?;
        }
        mounts::mount_share(&self.layout(), &self.shared())
            .map_err(|source| state_error("mount the share", self.shared(), source))?;
        mounts::mount_private(&self.staging())
            .map_err(|source| state_error("mount", self.staging(), source))
    }

    fn create_parents(&self) -> Result<(), StartError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let mut tries = 0;
        loop {
            tries += 1;
            match builder.create(&self.path) {
                Ok(()) => return Ok(()),
                // Another sandbox has just removed the empty parent.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && tries < CREATE_TRIES_MAX => {}
                Err(source) => {
                    let path = self.path.clone();
                    return Err(state_error("create the directory", path, source));
                }
            }
        }
    }

    /// Removes the directory, in which nothing is mounted any more, and its parents if they are
    /// empty.
    pub(crate) fn remove(&self) -> io::Result<()> {
        remove_tree(&self.path)?;
        for parent in self.path.ancestors().skip(1) {
            // Not empty, or gone: somebody else's business in either case.
            if !parent.starts_with(&self.root) || fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn layout(&self) -> PathBuf {
        self.path.join("layout")
    }

    pub(crate) fn shared(&self) -> PathBuf {
        self.path.join("shared")
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.path.join("staging")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What must run when the containers are gone.
    pub(crate) fn hooks(&self) -> PathBuf {
        self.path.join("hooks")
    }

    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    fn record_path(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// Replaces the record, at once or not at all.
    pub(crate) fn write_record(&self, record: &Record) -> Result<(), StartError> {
        let path = self.record_path();
        let new = self.path.join("state.json.new");
        let write = || -> io::Result<()> {
            fs::write(&new, serde_json::to_vec(record)?)?;
            fs::rename(&new, &path)?;
            if let Some(vmm) = &record.vmm {
                fs::write(self.path.join("vmm.pid"), format!("{}\n", vmm.pid))?;
            }
            Ok(())
        };
        write().map_err(|source| state_error("write", path.clone(), source))
    }

    /// The record; an empty one where there is none, or none that can be understood.
    pub(crate) fn read_record(&self) -> Record {
        fs::read(self.record_path())
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    /// Opens a log for appending.
    pub(crate) fn open_log(path: &Path) -> Result<fs::File, StartError> {
        fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| state_error("create", path.to_owned(), source))
    }
}

fn state_error(operation: &'static str, path: PathBuf, source: io::Error) -> StartError {
    StartError::State {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let long = "x".repeat(NAME_CHARS_MAX + 1);
        for name in ["", ".", "..", "a/b", "../x", "-a", "a b", "a\0", "ä", &long] {
            assert!(!is_name(name), "{name:?}");
            assert!(StateDir::locate(Path::new("/x"), "ns", name).is_err());
            assert!(StateDir::locate(Path::new("/x"), name, "id").is_err());
        }
    }

    #[test]
    fn names_of_containerd_are_names() {
        for name in ["k8s.io", "t1", "a-b_c.d", "moby"] {
            assert!(is_name(name), "{name:?}");
        }
    }

    #[test]
    fn garbled_record_is_an_empty_one() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::locate(directory.path(), "ns", "id").unwrap();
        fs::create_dir_all(state.path()).unwrap();
        for text in ["", "{", "[]", "{\"vmm\":{\"pid\":\"x\"}}"] {
            fs::write(state.record_path(), text).unwrap();
            assert_eq!(state.read_record(), Record::default(), "{text}");
        }
    }

    #[test]
    fn removal_takes_empty_parents_along_and_can_be_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("husk");
        let a = StateDir::locate(&root, "ns", "a").unwrap();
        let b = StateDir::locate(&root, "ns", "b").unwrap();
        a.create_parents().unwrap();
        b.create_parents().unwrap();
        a.remove().unwrap();
        assert!(b.path().exists());
        b.remove().unwrap();
        b.remove().unwrap();
        assert!(!root.exists());
        assert!(directory.path().exists());
    }
}
