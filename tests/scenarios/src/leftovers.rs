//! What a machine has before and after: a runtime must leave it as it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Programs whose processes belong to a container's life.
const PROGRAMS: [&str; 5] = [
    "containerd-shim",
    "containerd-shim-runc-v2",
    "containerd-shim-husk-v2",
    "husk-vmm",
    "runc",
];

/// Where runtimes keep files, and containerd its sockets of shims.
const DIRECTORIES: [&str; 4] = [
    "/run/husk",
    "/run/containerd/s",
    "/run/containerd/runc",
    "/run/containerd/fifo",
];

/// cgroup v2, where both runtimes make their own.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Deepest directory that is looked into.
const DEPTH_MAX: usize = 6;

/// What could be left behind.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    found: BTreeSet<String>,
}

impl Machine {
    /// Looks at processes, mounts, cgroups, sockets, interfaces and files.
    pub(crate) fn look() -> Result<Self> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/proc").context("cannot list /proc")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // A process may end while it is looked at.
            let Ok(command) = fs::read_to_string(format!("/proc/{name}/comm")) else {
                continue;
            };
            // comm is cut to 15 characters.
            let command = command.trim_end();
            if PROGRAMS
                .iter()
                .any(|program| program.get(..15).unwrap_or(program) == command)
            {
                found.insert(format!("process {command} {name}"));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read mounts")?;
        for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            if point.starts_with("/run/") {
                found.insert(format!("mount {point}"));
            }
        }
        for directory in DIRECTORIES {
            walk("file", Path::new(directory), DEPTH_MAX, &mut found);
        }
        walk_cgroups(Path::new(CGROUPS), DEPTH_MAX, &mut found);
        if let Ok(interfaces) = fs::read_dir("/sys/class/net") {
            for interface in interfaces.flatten() {
                found.insert(format!(
                    "interface {}",
                    interface.file_name().to_string_lossy()
                ));
            }
        }
        Ok(Self { found })
    }

    /// Fails with what is there now and was not before.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let now = Self::look()?;
        let left: Vec<_> = now.found.difference(&self.found).collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

/// All below a directory. The directories of namespaces and the one of sockets are no one's.
fn walk(kind: &str, directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && depth > 0 {
            walk(kind, &path, depth - 1, found);
        }
        let shared = [Path::new("/run/husk"), Path::new("/run/containerd/runc")]
            .contains(&directory)
            && is_directory;
        if !shared {
            found.insert(format!("{kind} {}", path.display()));
        }
    }
}

fn walk_cgroups(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // The parents of pods' cgroups: ctr's default namespace, and Husk's own.
            let path = entry.path();
            let parent = ["/sys/fs/cgroup/default", "/sys/fs/cgroup/husk"];
            if !parent.iter().any(|shared| Path::new(shared) == path) {
                found.insert(format!("cgroup {}", path.display()));
            }
            if depth > 0 {
                walk_cgroups(&path, depth - 1, found);
            }
        }
    }
}
