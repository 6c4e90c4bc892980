//! What a machine has before and after: a runtime must leave it as it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::host::{self, Process};

/// Programs whose processes belong to a container's life.
const PROGRAMS: [&str; 5] = [
    "containerd-shim",
    "containerd-shim-runc-v2",
    "containerd-shim-husk-v2",
    "husk-vmm",
    "runc",
];

/// Where runtimes keep files. Not /run/containerd/s, where runc's shim leaves its socket when it is
/// killed; Husk's are in its own directory.
const DIRECTORIES: [&str; 3] = ["/run/husk", "/run/containerd/runc", "/run/containerd/fifo"];

/// cgroup v2, where both runtimes make their own.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Deepest directory that is looked into.
const DEPTH_MAX: usize = 6;

/// For what containerd clears up by itself after the user has his answer.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);

/// Something a runtime could leave behind. In the order in which it goes away.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Process { name: String, pid: i32 },
    Mount(String),
    File(String),
    Cgroup(String),
    Interface(String),
}

/// What could be left behind.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    found: BTreeSet<Left>,
}

impl Machine {
    /// Looks at processes, mounts, cgroups, sockets, interfaces and files.
    pub(crate) fn look() -> Result<Self> {
        let mut found = BTreeSet::new();
        for process in Process::all()? {
            if PROGRAMS.iter().any(|program| process.is(program)) {
                let (name, pid) = (process.name, process.pid);
                found.insert(Left::Process { name, pid });
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read mounts")?;
        for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            if point.starts_with("/run/") {
                found.insert(Left::Mount(point.to_owned()));
            }
        }
        for directory in DIRECTORIES {
            walk_files(Path::new(directory), DEPTH_MAX, &mut found);
        }
        walk_cgroups(Path::new(CGROUPS), DEPTH_MAX, &mut found);
        if let Ok(interfaces) = fs::read_dir("/sys/class/net") {
            for interface in interfaces.flatten() {
                let name = interface.file_name().to_string_lossy().into_owned();
                // The bridge of all pods.
                if name != "husk-cri0" {
                    found.insert(Left::Interface(name));
                }
            }
        }
        Ok(Self { found })
    }

    /// Fails with what is there now, was not before, and does not go away by itself.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE_DEADLINE;
        loop {
            let now = Self::look()?;
            let left: Vec<_> = now.found.difference(&self.found).collect();
            let Some(first) = left.first() else {
                return Ok(());
            };
            if !goes_away(first, deadline)? {
                bail!("left behind: {left:?}");
            }
        }
    }
}

/// Waits for what may take a moment after the user has his answer.
fn goes_away(left: &Left, deadline: Instant) -> Result<bool> {
    match left {
        Left::Process { pid, .. } => {
            let mut all = Process::all()?;
            all.retain(|process| process.pid == *pid);
            match all.first() {
                Some(process) => process.ends_before(deadline),
                None => Ok(true),
            }
        }
        Left::File(path) => host::path_becomes(Path::new(path), false, deadline),
        Left::Mount(_) => host::mounts_change(deadline),
        // They go before the files do.
        Left::Cgroup(_) | Left::Interface(_) => Ok(false),
    }
}

/// All below a directory. The directories of namespaces and the one of sockets are no one's.
fn walk_files(directory: &Path, depth: usize, found: &mut BTreeSet<Left>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && depth > 0 {
            walk_files(&path, depth - 1, found);
        }
        let shared = [Path::new("/run/husk"), Path::new("/run/containerd/runc")]
            .contains(&directory)
            && is_directory;
        if !shared {
            found.insert(Left::File(path.display().to_string()));
        }
    }
}

fn walk_cgroups(directory: &Path, depth: usize, found: &mut BTreeSet<Left>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // The parents of pods' cgroups: ctr's default namespace, CRI's, and Husk's own.
            let path = entry.path();
            let parent = [
                "/sys/fs/cgroup/default",
                "/sys/fs/cgroup/k8s.io",
                "/sys/fs/cgroup/husk",
            ];
            if !parent.iter().any(|shared| Path::new(shared) == path) {
                found.insert(Left::Cgroup(path.display().to_string()));
            }
            if depth > 0 {
                walk_cgroups(&path, depth - 1, found);
            }
        }
    }
}
