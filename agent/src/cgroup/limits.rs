//! What the limits of a spec come down to: values for files of a cgroup (version 2).
//!
//! The specification speaks of cgroup version 1 in places; the translation is that of runc. What
//! version 2 has no file for (kernel memory, swappiness, real-time budgets, weights of single
//! devices, network classes and priorities) is passed over, as it is there.

use super::CgroupError;
use crate::oci::{BlockIo, Cpu, HugepageLimit, Memory, Rdma, Resources, Throttle};

/// A value for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    /// The part of the spec that asks for it.
    pub(super) part: String,
    pub(super) file: String,
    pub(super) value: String,
    /// Whether it is held as well where the kernel has no such file.
    pub(super) is_moot_without_file: bool,
}

impl Setting {
    fn new(part: &str, file: &str, value: &impl ToString) -> Setting {
        Setting {
            part: format!("linux.resources.{part}"),
            file: file.to_owned(),
            value: value.to_string(),
            is_moot_without_file: false,
        }
    }

    fn moot_without_file(self, is_moot_without_file: bool) -> Setting {
        Setting {
            is_moot_without_file,
            ..self
        }
    }
}

/// All settings in the order that they must be written in. `cpu_max` is what `cpu.max` says now: a
/// period that comes alone leaves the quota as it is.
pub(super) fn settings(resources: &Resources, cpu_max: &str) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Vec::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, cpu_max, &mut all);
    }
    if let Some(memory) = &resources.memory {
        memory_settings(memory, &mut all)?;
    }
    if let Some(limit) = resources.pids.as_ref().and_then(|pids| set(pids.limit)) {
        all.push(Setting::new("pids", "pids.max", &text("pids", limit)?));
    }
    if let Some(io) = &resources.block_io {
        io_settings(io, &mut all)?;
    }
    for limit in &resources.hugepage_limits {
        hugepage_settings(limit, &mut all)?;
    }
    for (device, limit) in &resources.rdma {
        all.push(rdma_setting(device, limit)?);
    }
    for (file, value) in &resources.unified {
        if !is_parameter(file) {
            return Err(CgroupError::Invalid(format!(
                "unified: {file:?} is not of the form CONTROLLER.PARAMETER"
            )));
        }
        all.push(Setting::new("unified", file, &value));
    }
    Ok(all)
}

/// In JSON of Go programs 0 is what is not set.
fn set<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

/// A number, or -1 for none.
fn text(part: &str, value: i64) -> Result<String, CgroupError> {
    match value {
        -1 => Ok("max".to_owned()),
        value if value >= 0 => Ok(value.to_string()),
        value => Err(CgroupError::Invalid(format!(
            "{part}: {value} is not a limit"
        ))),
    }
}

/// A file's name as the kernel makes them. The first part can't be empty, so that none of them is
/// `..`.
fn is_parameter(file: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let controller = file
        .split_once('.')
        .map_or("", |(controller, _)| controller);
    !controller.is_empty() && file.bytes().all(is_plain)
}

fn cpu_settings(cpu: &Cpu, cpu_max: &str, all: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle {
        all.push(Setting::new("cpu.idle", "cpu.idle", &idle));
    }
    if let Some(shares) = cpu.shares.and_then(set) {
        let weight = weight_of_shares(shares);
        all.push(Setting::new("cpu.shares", "cpu.weight", &weight));
    }
    let (quota, period) = (cpu.quota.and_then(set), cpu.period.and_then(set));
    let sets_bandwidth = quota.is_some() || period.is_some();
    if sets_bandwidth {
        if cpu.burst.is_some() {
            // A burst is never longer than the quota: out of the way before that changes.
            all.push(Setting::new("cpu.burst", "cpu.max.burst", &0));
        }
        let quota = match quota {
            Some(quota) => u64::try_from(quota).map_or("max".into(), |quota| quota.to_string()),
            None => cpu_max
                .split(' ')
                .next()
                .and_then(|now| set(now.trim()))
                .unwrap_or("max")
                .into(),
        };
        let value = match period {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        all.push(Setting::new("cpu.quota", "cpu.max", &value));
    }
    if let Some(burst) = cpu.burst {
        all.push(Setting::new("cpu.burst", "cpu.max.burst", &burst));
    }
    if !cpu.cpus.is_empty() {
        all.push(Setting::new("cpu.cpus", "cpuset.cpus", &cpu.cpus));
    }
    if !cpu.mems.is_empty() {
        all.push(Setting::new("cpu.mems", "cpuset.mems", &cpu.mems));
    }
}

/// Shares of cgroup v1 (2 to 262144) on the scale of v2 (1 to 10000), the way that runc 1.1 maps
/// the one onto the other.
fn weight_of_shares(shares: u64) -> u64 {
    const SHARES_MIN: u64 = 2;
    const SHARES_MAX: u64 = 262_144;
    1 + (shares.clamp(SHARES_MIN, SHARES_MAX) - SHARES_MIN) * 9_999 / (SHARES_MAX - SHARES_MIN)
}

fn memory_settings(memory: &Memory, all: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let limit = memory.limit.and_then(set);
    let swap = match (memory.swap.and_then(set), limit) {
        (Some(-1), _) => Some(-1),
        // The specification's swap is memory and swap together.
        (Some(swap), Some(limit)) if limit >= 0 && swap >= limit => Some(swap - limit),
        (Some(swap), _) => {
            return Err(CgroupError::Invalid(format!(
                "memory: swap {swap} holds memory and swap together, so it needs a limit not \
                 above it"
            )));
        }
        // No limit of memory means none of both.
        (None, Some(-1)) => Some(-1),
        (None, _) => None,
    };
    if let Some(swap) = swap {
        let value = text("memory.swap", swap)?;
        // A kernel without swap has no limit of it, and needs none.
        all.push(Setting::new("memory.swap", "memory.swap.max", &value).moot_without_file(true));
    }
    if let Some(limit) = limit {
        let value = text("memory.limit", limit)?;
        all.push(Setting::new("memory.limit", "memory.max", &value));
    }
    if let Some(reservation) = memory.reservation.and_then(set) {
        let value = text("memory.reservation", reservation)?;
        all.push(Setting::new("memory.reservation", "memory.low", &value));
    }
    Ok(())
}

fn io_settings(io: &BlockIo, all: &mut Vec<Setting>) -> Result<(), CgroupError> {
    if let Some(weight) = io.weight.and_then(set) {
        const WEIGHTS: std::ops::RangeInclusive<u16> = 10..=1000;
        if !WEIGHTS.contains(&weight) {
            return Err(CgroupError::Invalid(format!(
                "blockIO.weight: {weight} is not within 10 to 1000"
            )));
        }
        // 10 to 1000 onto 1 to 10000.
        let weight = 1 + (u64::from(weight) - 10) * 9_999 / 990;
        all.push(Setting::new("blockIO.weight", "io.weight", &weight));
    }
    let mut throttle = |list: &[Throttle], part: &str, key: &str| {
        for limit in list {
            let value = format!("{}:{} {key}={}", limit.major, limit.minor, limit.rate);
            all.push(Setting::new(part, "io.max", &value));
        }
    };
    let part = "blockIO.throttleReadBpsDevice";
    throttle(&io.throttle_read_bps_device, part, "rbps");
    let part = "blockIO.throttleWriteBpsDevice";
    throttle(&io.throttle_write_bps_device, part, "wbps");
    let part = "blockIO.throttleReadIOPSDevice";
    throttle(&io.throttle_read_iops_device, part, "riops");
    let part = "blockIO.throttleWriteIOPSDevice";
    throttle(&io.throttle_write_iops_device, part, "wiops");
    Ok(())
}

fn hugepage_settings(limit: &HugepageLimit, all: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let size = &limit.page_size;
    // The kernel's names for them: 64KB, 2MB, 1GB.
    let number = ["KB", "MB", "GB"]
        .iter()
        .find_map(|unit| size.strip_suffix(unit));
    if !number.is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    }) {
        return Err(CgroupError::Invalid(format!(
            "hugepageLimits: {size:?} is not the size of a page, such as 2MB"
        )));
    }
    // None of a size that there is none of is what is asked for.
    let is_moot = limit.limit == 0;
    let file = format!("hugetlb.{size}.max");
    all.push(Setting::new("hugepageLimits", &file, &limit.limit).moot_without_file(is_moot));
    // Reserved pages are counted apart; a kernel before 5.7 does not.
    let file = format!("hugetlb.{size}.rsvd.max");
    all.push(Setting::new("hugepageLimits", &file, &limit.limit).moot_without_file(true));
    Ok(())
}

fn rdma_setting(device: &str, limit: &Rdma) -> Result<Setting, CgroupError> {
    if device.is_empty() || device.contains(char::is_whitespace) {
        return Err(CgroupError::Invalid(format!(
            "rdma: {device:?} is not the name of a device"
        )));
    }
    let mut value = device.to_owned();
    for (key, limit) in [
        ("hca_handle", limit.hca_handles),
        ("hca_object", limit.hca_objects),
    ] {
        if let Some(limit) = limit {
            value.push_str(&format!(" {key}={limit}"));
        }
    }
    Ok(Setting::new("rdma", "rdma.max", &value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<Setting>, CgroupError> {
        settings(&serde_json::from_str(text).unwrap(), "50000 100000\n")
    }

    /// As `file=value`, in their order.
    fn written(text: &str) -> Vec<String> {
        let all = of(text).unwrap();
        all.iter()
            .map(|one| format!("{}={}", one.file, one.value))
            .collect()
    }

    fn refusal(text: &str) -> String {
        of(text).unwrap_err().to_string()
    }

    #[test]
    fn negative_limit_is_refused() {
        for text in [
            r#"{"memory":{"limit":-2}}"#,
            r#"{"memory":{"reservation":-2}}"#,
            r#"{"memory":{"limit":5,"swap":-2}}"#,
            r#"{"pids":{"limit":-2}}"#,
        ] {
            assert!(refusal(text).contains("-2"), "{text}");
        }
    }

    #[test]
    fn swap_below_the_limit_is_refused() {
        for text in [
            r#"{"memory":{"limit":100,"swap":50}}"#,
            r#"{"memory":{"swap":50}}"#,
            r#"{"memory":{"limit":-1,"swap":50}}"#,
        ] {
            assert!(refusal(text).contains("swap 50"), "{text}");
        }
    }

    #[test]
    fn unified_file_can_not_leave_the_cgroup() {
        for file in [
            "../memory.max",
            "..",
            ".",
            "",
            "memory",
            ".max",
            "a/b.max",
            "a\\u0000.b",
        ] {
            let text = format!(r#"{{"unified":{{"{file}":"1"}}}}"#);
            assert!(refusal(&text).contains("CONTROLLER.PARAMETER"), "{file}");
        }
    }

    #[test]
    fn page_size_that_is_none_is_refused() {
        for size in ["", "2", "MB", "2mb", "../../x.MB", "2 MB", "-2MB"] {
            let text = format!(r#"{{"hugepageLimits":[{{"pageSize":"{size}","limit":1}}]}}"#);
            assert!(refusal(&text).contains("size of a page"), "{size}");
        }
    }

    #[test]
    fn weight_out_of_range_is_refused() {
        for weight in [1, 9, 1001] {
            let text = format!(r#"{{"blockIO":{{"weight":{weight}}}}}"#);
            assert!(refusal(&text).contains("10 to 1000"), "{weight}");
        }
    }

    #[test]
    fn rdma_device_with_a_space_is_refused() {
        assert!(refusal(r#"{"rdma":{"a b":{"hcaHandles":1}}}"#).contains("a b"));
    }

    #[test]
    fn swap_is_what_comes_on_top_of_memory() {
        let all = written(r#"{"memory":{"limit":100,"swap":150,"reservation":50}}"#);
        assert_eq!(
            all,
            ["memory.swap.max=50", "memory.max=100", "memory.low=50"]
        );
        let all = written(r#"{"memory":{"limit":100,"swap":100}}"#);
        assert_eq!(all, ["memory.swap.max=0", "memory.max=100"]);
    }

    #[test]
    fn no_limit_is_max() {
        let text = r#"{"cpu":{"quota":-1,"period":100000},"pids":{"limit":-1}}"#;
        assert_eq!(written(text), ["cpu.max=max 100000", "pids.max=max"]);
        // Without a limit of memory there is none of swap either.
        let all = written(r#"{"memory":{"limit":-1}}"#);
        assert_eq!(all, ["memory.swap.max=max", "memory.max=max"]);
    }

    #[test]
    fn zero_is_not_set() {
        let text = r#"{"cpu":{"shares":0,"quota":0,"period":0,"cpus":"","mems":""},
            "memory":{"limit":0,"swap":0,"reservation":0},"pids":{"limit":0},
            "blockIO":{"weight":0}}"#;
        assert_eq!(written(text), [""; 0]);
    }

    #[test]
    fn quota_and_period_leave_each_other_alone() {
        assert_eq!(written(r#"{"cpu":{"quota":20000}}"#), ["cpu.max=20000"]);
        assert_eq!(
            written(r#"{"cpu":{"period":1000}}"#),
            ["cpu.max=50000 1000"]
        );
        let new = settings(
            &serde_json::from_str(r#"{"cpu":{"period":7}}"#).unwrap(),
            "",
        )
        .unwrap();
        assert_eq!(new[0].value, "max 7");
    }

    #[test]
    fn burst_is_never_above_the_quota() {
        let all = written(r#"{"cpu":{"quota":20000,"period":100000,"burst":10000}}"#);
        let expected = [
            "cpu.max.burst=0",
            "cpu.max=20000 100000",
            "cpu.max.burst=10000",
        ];
        assert_eq!(all, expected);
        assert_eq!(written(r#"{"cpu":{"burst":5}}"#), ["cpu.max.burst=5"]);
    }

    #[test]
    fn shares_map_onto_the_ends_of_the_weights() {
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn every_part_has_its_file() {
        let text = r#"{"cpu":{"idle":1,"cpus":"0-1","mems":"0"},
            "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":7}],
                "throttleWriteIOPSDevice":[{"major":8,"minor":1,"rate":9}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":4194304}],
            "rdma":{"mlx5_1":{"hcaHandles":3,"hcaObjects":10}},
            "network":{"classID":1048577,"priorities":[{"name":"eth0","priority":500}]},
            "unified":{"memory.high":"max"}}"#;
        let expected = [
            "cpu.idle=1",
            "cpuset.cpus=0-1",
            "cpuset.mems=0",
            "io.weight=4950",
            "io.max=8:0 rbps=7",
            "io.max=8:1 wiops=9",
            "hugetlb.2MB.max=4194304",
            "hugetlb.2MB.rsvd.max=4194304",
            "rdma.max=mlx5_1 hca_handle=3 hca_object=10",
            "memory.high=max",
        ];
        assert_eq!(written(text), expected);
    }
}
