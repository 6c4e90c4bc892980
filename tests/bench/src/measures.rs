//! What is measured, in which unit, and what Husk is held to: the data behind every report.

/// One thing that is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measure {
    /// For programs.
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) section: Section,
    pub(crate) better: Better,
    pub(crate) target: Target,
}

/// Which way is forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Less,
    More,
}

/// What Husk is held to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target {
    /// Told, and not judged.
    None,
    /// In the unit of the measure.
    Absolute(f64),
    /// As a multiple of what runc has in the same run.
    OfRunc(f64),
}

impl Target {
    /// The limit in the measure's unit; `None` where there is none, or nothing to compare with.
    pub(crate) fn limit(self, runc: Option<f64>) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Absolute(limit) => Some(limit),
            Self::OfRunc(ratio) => Some(ratio * runc?),
        }
    }
}

impl Better {
    /// Whether a value is on the good side of a limit, or on it.
    pub(crate) fn meets(self, value: f64, limit: f64) -> bool {
        match self {
            Self::Less => value <= limit,
            Self::More => value >= limit,
        }
    }
}

/// Measures that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    Starts,
    Memory,
    Files,
    Network,
    Sizes,
}

impl Section {
    pub(crate) const ALL: [Self; 5] = [
        Self::Starts,
        Self::Memory,
        Self::Files,
        Self::Network,
        Self::Sizes,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Starts => "Starting, running, ending",
            Self::Memory => "Memory",
            Self::Files => "Files",
            Self::Network => "Network",
            Self::Sizes => "Sizes",
        }
    }
}

/// The measure of that name.
pub(crate) fn find(name: &str) -> Option<&'static Measure> {
    ALL.iter().find(|measure| measure.name == name)
}

const fn measure(
    section: Section,
    name: &'static str,
    unit: &'static str,
    title: &'static str,
) -> Measure {
    Measure {
        name,
        title,
        unit,
        section,
        better: Better::Less,
        target: Target::None,
    }
}

impl Measure {
    const fn more(mut self) -> Self {
        self.better = Better::More;
        self
    }

    const fn within(mut self, target: Target) -> Self {
        self.target = target;
        self
    }
}

use Section::{Files, Memory, Network, Sizes, Starts};
use Target::{Absolute, OfRunc};

/// In the order in which they are told.
pub(crate) const ALL: &[Measure] = &[
    measure(Starts, "start_total", "s", "ctr run --rm echo, to the end").within(OfRunc(1.0)),
    measure(
        Starts,
        "start_first_byte",
        "s",
        "the same, to the first byte of output",
    ),
    measure(
        Starts,
        "start_total_cold",
        "s",
        "ctr run --rm echo after all caches were dropped",
    ),
    measure(
        Starts,
        "start_first_byte_cold",
        "s",
        "the same, to the first byte of output",
    ),
    measure(
        Starts,
        "vmm_to_hello",
        "s",
        "VMM process start to the agent's hello",
    )
    .within(Absolute(0.20)),
    measure(
        Starts,
        "start_exits",
        "exits",
        "exits of the virtual CPU in one start",
    ),
    measure(
        Starts,
        "exec_true",
        "s",
        "ctr task exec true in a running container",
    )
    .within(OfRunc(0.5)),
    measure(
        Starts,
        "kill_delete",
        "s",
        "kill and delete a running container (ctr task rm -f)",
    ),
    measure(
        Starts,
        "pod_cri",
        "s",
        "a pod with one container, through CRI",
    ),
    measure(Starts, "starts_10", "s", "10 × ctr run --rm true at once"),
    measure(Starts, "starts_50", "s", "50 × ctr run --rm true at once").within(OfRunc(1.2)),
    measure(
        Memory,
        "pss_host",
        "MiB",
        "PSS of one pod's host processes, without guest RAM",
    )
    .within(Absolute(8.0)),
    measure(
        Memory,
        "guest_idle_memory",
        "MiB",
        "guest RAM touched by an idle pod",
    )
    .within(Absolute(32.0)),
    measure(
        Memory,
        "pss_pod_1",
        "MiB",
        "PSS of everything of a pod, alone",
    ),
    measure(Memory, "pss_pod_10", "MiB", "the same of each of 10 pods"),
    measure(Memory, "pss_pod_50", "MiB", "the same of each of 50 pods"),
    measure(
        Memory,
        "memory_used",
        "MiB",
        "more PSS while a container holds 256 MiB",
    ),
    measure(
        Memory,
        "memory_kept",
        "MiB",
        "of that, still held after it was freed",
    ),
    measure(
        Files,
        "fs_read_cached",
        "MB/s",
        "read 16 MiB of a volume again, 1 MiB each",
    )
    .more()
    .within(OfRunc(0.8)),
    measure(
        Files,
        "fs_read_first",
        "MB/s",
        "the first read of it, in the host's cache only",
    )
    .more(),
    measure(
        Files,
        "fs_read_4k",
        "MB/s",
        "the same file again, 4 KiB each",
    )
    .more(),
    measure(
        Files,
        "fs_read_random_4k",
        "MB/s",
        "the same at random places, 4 KiB each",
    )
    .more(),
    measure(
        Files,
        "fs_read_random_1m",
        "MB/s",
        "the same at random places, 1 MiB each",
    )
    .more(),
    measure(
        Files,
        "fs_write_1m",
        "MB/s",
        "write a new file in the root, 1 MiB each",
    )
    .more(),
    measure(
        Files,
        "fs_write_4k",
        "MB/s",
        "write a new file in the root, 4 KiB each",
    )
    .more(),
    measure(
        Files,
        "fs_write_random_4k",
        "MB/s",
        "overwrite it at random places, 4 KiB each",
    )
    .more(),
    measure(
        Files,
        "fs_write_random_1m",
        "MB/s",
        "overwrite it at random places, 1 MiB each",
    )
    .more(),
    measure(
        Files,
        "fs_write_fsync_1m",
        "MB/s",
        "write 1 MiB and fsync, again and again",
    )
    .more(),
    measure(
        Files,
        "fs_write_fsync_4k",
        "ops/s",
        "write 4 KiB and fsync, again and again",
    )
    .more(),
    measure(
        Files,
        "fs_small_files",
        "µs/file",
        "small files created, stat'ed and removed",
    )
    .within(OfRunc(2.0)),
    measure(
        Files,
        "fs_create",
        "µs/file",
        "of that: created with 1 KiB in each",
    ),
    measure(Files, "fs_stat", "µs/file", "of that: stat'ed"),
    measure(Files, "fs_readdir", "µs/file", "listed"),
    measure(Files, "fs_unlink", "µs/file", "of that: removed"),
    measure(
        Files,
        "fs_tree_first",
        "µs/file",
        "read a volume's source tree as tar does, first time",
    ),
    measure(Files, "fs_tree_again", "µs/file", "the same again"),
    measure(
        Files,
        "fs_stat_storm",
        "µs/file",
        "stat all of it again, as git status does",
    ),
    measure(Network, "net_to_host", "MB/s", "TCP from a pod to the host").more(),
    measure(
        Network,
        "net_from_host",
        "MB/s",
        "TCP from the host to a pod",
    )
    .more(),
    measure(
        Network,
        "net_requests",
        "per s",
        "requests from a pod to the host, one at a time",
    )
    .more(),
    measure(Network, "net_pod_to_pod", "MB/s", "TCP from pod to pod").more(),
    measure(
        Network,
        "net_pod_requests",
        "per s",
        "requests from pod to pod, one at a time",
    )
    .more(),
    measure(Sizes, "size_shim", "MiB", "the shim's binary").within(Absolute(6.0)),
    measure(Sizes, "size_vmm", "MiB", "husk-vmm; runc; runsc").within(Absolute(4.0)),
    measure(Sizes, "size_initrd", "MiB", "the initrd").within(Absolute(4.0)),
    measure(Sizes, "size_kernel", "MiB", "the guest kernel"),
    measure(Sizes, "size_cli", "MiB", "the husk command"),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn target_of_runc_needs_runc() {
        assert_eq!(OfRunc(0.5).limit(None), None);
        assert_eq!(OfRunc(0.5).limit(Some(3.0)), Some(1.5));
        assert_eq!(Target::None.limit(Some(3.0)), None);
    }

    #[test]
    fn limit_itself_is_met() {
        assert!(Better::Less.meets(1.0, 1.0) && !Better::Less.meets(1.1, 1.0));
        assert!(Better::More.meets(1.0, 1.0) && !Better::More.meets(0.9, 1.0));
    }

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = ALL.iter().map(|measure| measure.name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
