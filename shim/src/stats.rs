//! Figures of the guest's cgroup v2, and of the pod's network on the host, as containerd's
//! `io.containerd.cgroups.v2.Metrics`.
//!
//! The files come from the guest and so may say anything: what is no figure counts as 0, as does
//! what the guest's kernel does not tell.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData,
    PSIStats, PidsStat, RdmaEntry, RdmaStat,
};
use containerd_shim_protos::protobuf::MessageField;
use husk_sandbox::NetworkCounters;

/// Most devices or page sizes that are told of.
const ENTRIES_MAX: usize = 256;

/// What containerd is told of a container. All of a pod's containers have its network.
pub(crate) fn metrics(files: &HashMap<String, String>, network: &[NetworkCounters]) -> Metrics {
    let files = Files(files);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: files.number("pids.current"),
            limit: files.number("pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(&files)),
        memory: MessageField::some(memory(&files)),
        memory_events: MessageField::some(memory_events(&files)),
        io: MessageField::some(IOStat {
            usage: io_entries(files.text("io.stat")),
            psi: files.pressure("io.pressure"),
            ..IOStat::default()
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma_entries(files.text("rdma.current")),
            limit: rdma_entries(files.text("rdma.max")),
            ..RdmaStat::default()
        }),
        hugetlb: huge_pages(&files),
        network: networks(network),
        ..Metrics::default()
    }
}

/// What has passed through a pod's interfaces.
pub(crate) fn networks(counters: &[NetworkCounters]) -> Vec<NetworkStat> {
    counters.iter().map(interface).collect()
}

/// Adds what is told of one container to what is told of its pod: processes, time and memory.
pub(crate) fn add(sum: &mut Metrics, one: &Metrics) {
    let pids = sum.pids.mut_or_insert_default();
    pids.current = pids.current.saturating_add(one.pids.current);
    let cpu = sum.cpu.mut_or_insert_default();
    for (sum, one) in [
        (&mut cpu.usage_usec, one.cpu.usage_usec),
        (&mut cpu.user_usec, one.cpu.user_usec),
        (&mut cpu.system_usec, one.cpu.system_usec),
    ] {
        *sum = sum.saturating_add(one);
    }
    let memory = sum.memory.mut_or_insert_default();
    for (sum, one) in [
        (&mut memory.usage, one.memory.usage),
        (&mut memory.anon, one.memory.anon),
        (&mut memory.file, one.memory.file),
        (&mut memory.inactive_file, one.memory.inactive_file),
    ] {
        *sum = sum.saturating_add(one);
    }
}

fn cpu(files: &Files<'_>) -> CPUStat {
    let stat = files.table("cpu.stat");
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: files.pressure("cpu.pressure"),
        ..CPUStat::default()
    }
}

fn memory(files: &Files<'_>) -> MemoryStat {
    let stat = files.table("memory.stat");
    MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        // Linux 5.9 tells of files and anonymous memory apart.
        workingset_refault: stat.sum("workingset_refault"),
        workingset_activate: stat.sum("workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        max_usage: files.number("memory.peak"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: files.pressure("memory.pressure"),
        ..MemoryStat::default()
    }
}

fn memory_events(files: &Files<'_>) -> MemoryEvents {
    let events = files.table("memory.events");
    MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// Lines of `MAJOR:MINOR key=value...`.
fn io_entries(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..IOEntry::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = number(value);
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).take(ENTRIES_MAX).collect()
}

/// Lines of `DEVICE hca_handle=N hca_object=N`.
fn rdma_entries(text: &str) -> Vec<RdmaEntry> {
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let mut entry = RdmaEntry {
            device: words.next()?.to_owned(),
            ..RdmaEntry::default()
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = u32::try_from(number(value)).unwrap_or(u32::MAX);
            match key {
                "hca_handle" => entry.hca_handles = value,
                "hca_object" => entry.hca_objects = value,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).take(ENTRIES_MAX).collect()
}

/// One entry for each `hugetlb.SIZE.current`.
fn huge_pages(files: &Files<'_>) -> Vec<HugeTlbStat> {
    let size = |name: &String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        Some(size.to_owned())
    };
    let mut sizes: Vec<String> = files.0.keys().filter_map(size).take(ENTRIES_MAX).collect();
    sizes.sort_unstable();
    let entry = |size: String| HugeTlbStat {
        current: files.number(&format!("hugetlb.{size}.current")),
        max: files.number(&format!("hugetlb.{size}.max")),
        failcnt: files.table(&format!("hugetlb.{size}.events")).get("max"),
        pagesize: size,
        ..HugeTlbStat::default()
    };
    sizes.into_iter().map(entry).collect()
}

fn interface(counters: &NetworkCounters) -> NetworkStat {
    let NetworkCounters { received, sent, .. } = counters;
    NetworkStat {
        name: counters.name.clone(),
        rx_bytes: received.bytes,
        rx_packets: received.packets,
        rx_errors: received.errors,
        rx_dropped: received.dropped,
        tx_bytes: sent.bytes,
        tx_packets: sent.packets,
        tx_errors: sent.errors,
        tx_dropped: sent.dropped,
        ..NetworkStat::default()
    }
}

struct Files<'a>(&'a HashMap<String, String>);

impl<'a> Files<'a> {
    fn text(&self, name: &str) -> &'a str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> u64 {
        number(self.text(name).trim_ascii())
    }

    fn table(&self, name: &str) -> Table<'a> {
        let lines = self.text(name).lines();
        let pairs = lines.filter_map(|line| line.split_once(' '));
        Table(pairs.map(|(key, value)| (key, number(value))).collect())
    }

    /// Lines of `some|full avg10=... avg60=... avg300=... total=...`; absent without PSI.
    fn pressure(&self, name: &str) -> MessageField<PSIStats> {
        let line = |kind: &str| {
            let mut lines = self.text(name).lines();
            let words = lines.find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
            let mut data = PSIData::default();
            for (key, value) in words
                .split_ascii_whitespace()
                .filter_map(|word| word.split_once('='))
            {
                match key {
                    "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                    "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                    "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                    "total" => data.total = number(value),
                    _ => {}
                }
            }
            Some(data)
        };
        let (some, full) = (line("some"), line("full"));
        let is_told = some.is_some() || full.is_some();
        MessageField::from_option(is_told.then(|| PSIStats {
            some: MessageField::from_option(some),
            full: MessageField::from_option(full),
            ..PSIStats::default()
        }))
    }
}

/// A file of `key value` lines.
struct Table<'a>(HashMap<&'a str, u64>);

impl Table<'_> {
    fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }

    /// `key`, or what it has been split into.
    fn sum(&self, key: &str) -> u64 {
        [key.to_owned(), format!("{key}_anon"), format!("{key}_file")]
            .iter()
            .fold(0, |sum, key| self.get(key).saturating_add(sum))
    }
}

/// A figure; no limit is the highest, as containerd's own reading of cgroups has it.
fn number(text: &str) -> u64 {
    match text {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use husk_sandbox::Passed;

    use super::*;

    fn files(files: &[(&str, &str)]) -> HashMap<String, String> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        files.iter().map(owned).collect()
    }

    fn passed([bytes, packets, errors, dropped]: [u64; 4]) -> Passed {
        Passed {
            bytes,
            packets,
            errors,
            dropped,
        }
    }

    #[test]
    fn figures_arrive_where_containerd_looks_for_them() {
        let network = [NetworkCounters {
            link: 2,
            name: "eth0".to_owned(),
            received: passed([1, 2, 3, 4]),
            sent: passed([5, 6, 7, 8]),
        }];
        let files = files(&[
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 12\nuser_usec 5\nnr_throttled 2\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "16777216\n"),
            (
                "memory.stat",
                "anon 100\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
            ),
            ("memory.events", "oom 2\noom_kill 1\n"),
            ("io.stat", "254:16 rbytes=10 wbytes=20 rios=1 wios=2\n7:0\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=max hca_object=3\n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 4\n"),
        ]);

        let metrics = metrics(&files, &network);

        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (12, 5));
        assert_eq!(metrics.cpu.nr_throttled, 2);
        assert!((metrics.cpu.psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!(metrics.cpu.psi.some.total, 77);
        assert!(metrics.cpu.psi.full.is_none());
        assert_eq!(metrics.memory.usage, 4096);
        assert_eq!(metrics.memory.usage_limit, 16_777_216);
        assert_eq!(metrics.memory.anon, 100);
        assert_eq!(metrics.memory.workingset_refault, 3);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.io.usage.len(), 2);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].minor),
            (254, 16)
        );
        assert_eq!(metrics.io.usage[0].wbytes, 20);
        assert_eq!(metrics.rdma.current[0].device, "mlx4_0");
        assert_eq!(metrics.rdma.current[0].hca_objects, 2000);
        assert_eq!(metrics.rdma.limit[0].hca_handles, u32::MAX);
        assert_eq!(metrics.hugetlb[0].pagesize, "2MB");
        assert_eq!(metrics.hugetlb[0].max, u64::MAX);
        assert_eq!(metrics.hugetlb[0].failcnt, 4);
        let eth0 = &metrics.network[0];
        assert_eq!(eth0.name, "eth0");
        let received = [
            eth0.rx_bytes,
            eth0.rx_packets,
            eth0.rx_errors,
            eth0.rx_dropped,
        ];
        let sent = [
            eth0.tx_bytes,
            eth0.tx_packets,
            eth0.tx_errors,
            eth0.tx_dropped,
        ];
        assert_eq!((received, sent), ([1, 2, 3, 4], [5, 6, 7, 8]));
    }

    #[test]
    fn nonsense_counts_as_nothing() {
        let lines = "x:y rbytes=1\n".repeat(3) + &"1:1 rbytes=-1\n".repeat(ENTRIES_MAX + 1);
        let files = files(&[
            ("pids.current", "many"),
            ("cpu.stat", "usage_usec\nuser_usec -4\n\n \n"),
            ("cpu.pressure", "some\nfull avg10=x total"),
            ("memory.events", "99999999999999999999999 1"),
            ("io.stat", &lines),
        ]);

        let metrics = metrics(&files, &[]);

        assert_eq!(metrics.pids.current, 0);
        assert_eq!(metrics.cpu.user_usec, 0);
        assert_eq!(metrics.cpu.psi.full.total, 0);
        assert_eq!(metrics.io.usage.len(), ENTRIES_MAX);
        assert_eq!(metrics.io.usage[0].rbytes, 0);
        assert!(metrics.hugetlb.is_empty());
    }
}
