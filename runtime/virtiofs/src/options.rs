//! What the user of the server decides.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the guest kernel may keep what it was told without asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachePolicy {
    /// For "this name is that file".
    pub entry: Duration,
    /// For "there is no such name". Zero: not kept at all.
    pub negative: Duration,
    /// For attributes.
    pub attributes: Duration,
    /// Keep file contents, directory contents and link targets over a new open. Otherwise only the
    /// contents of files that look as they did at the open before.
    pub contents: bool,
}

impl CachePolicy {
    /// Others change the files too: nothing is kept that may have changed, and an open sees what a
    /// close before it wrote.
    pub const SHARED: Self = Self {
        entry: Duration::ZERO,
        negative: Duration::ZERO,
        attributes: Duration::ZERO,
        contents: false,
    };

    /// Only this guest changes the files: everything is kept.
    pub const PRIVATE: Self = Self {
        entry: FOREVER,
        negative: FOREVER,
        attributes: FOREVER,
        contents: true,
    };
}

/// Longer than any guest lives, and short enough for every kernel's arithmetic.
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);

/// Policy for the directory tree of a share, and what limits its guest has.
///
/// A share is a root directory and what is mounted below it, at any time. Which policy a file is
/// under depends on the mount it is on:
///
/// * on the mount that the root directory itself is on: `root`;
/// * on a mount that was found in that one under the name `private_mount`, and on mounts below
///   it: `private`;
/// * on any other mount: `shared`.
///
/// For a pod, the root directory is scaffolding into which the host mounts things while the guest
/// runs, so `root` caches nothing, and `private_mount` is `rootfs`.
#[derive(Debug)]
pub struct Options {
    /// `/proc/<pid>/fd` of this very process, opened as a directory, in a procfs that shows this
    /// process under that number. It is the only way to open a file for reading of which one has
    /// an `O_PATH` descriptor. `open("/proc/self/fd")` gives it, done by the process itself,
    /// before any `pivot_root`; after a fork it must be done again.
    pub proc_self_fd: OwnedFd,
    /// For files on the mount of the root directory.
    pub root: CachePolicy,
    /// For files on mounts named `private_mount`.
    pub private: CachePolicy,
    /// For files on all other mounts.
    pub shared: CachePolicy,
    /// See `private`. A single name.
    pub private_mount: Option<CString>,
    /// Let the guest kernel gather writes and send them later. Then it no longer sees when
    /// someone else changes a file's size or times.
    pub writeback: bool,
    /// Requests of this group and the three after it change nothing: they are made in the guest to
    /// tell its inotify of a change that the host has made. In this order: something was made; what
    /// is no directory was removed or renamed; a directory was; contents or attributes changed.
    pub echo_group: Option<u32>,
    /// Most files known to the guest at one time, each by a descriptor. Beyond: `ENFILE`.
    pub inodes_max: usize,
    /// Most files and directories open at one time. Beyond: `ENFILE`.
    pub handles_max: usize,
}

impl Options {
    /// The options for a pod's share, laid out as in the contract between host and VMM.
    ///
    /// The process needs an `RLIMIT_NOFILE` of [`Options::descriptors_max`] and what else it uses.
    #[must_use]
    pub fn pod(proc_self_fd: OwnedFd) -> Self {
        Self {
            root: CachePolicy::SHARED,
            private_mount: Some(c"rootfs".to_owned()),
            ..Self::single(proc_self_fd, CachePolicy::PRIVATE)
        }
    }

    /// The options for one directory tree under one policy.
    #[must_use]
    pub fn single(proc_self_fd: OwnedFd, policy: CachePolicy) -> Self {
        Self {
            proc_self_fd,
            root: policy,
            private: policy,
            shared: CachePolicy::SHARED,
            private_mount: None,
            writeback: false,
            echo_group: None,
            // A guest forgets files only when its own memory is short, so they are many.
            inodes_max: 896 * 1024,
            handles_max: 64 * 1024,
        }
    }

    /// Most descriptors that a server with these options has open.
    #[must_use]
    pub fn descriptors_max(&self) -> usize {
        const WORK_IN_PROGRESS: usize = 1024;
        self.inodes_max
            .saturating_add(self.handles_max)
            .saturating_add(WORK_IN_PROGRESS)
    }
}
