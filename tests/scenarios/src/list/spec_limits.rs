//! What config.json says of resources, kernel parameters and labels.

use anyhow::Result;
use serde_json::json;

use crate::ctr::Ctr;
use crate::spec::Bundle;

/// Every limit is where the kernel looks for it.
pub(super) fn spec_limits(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.namespace(json!({ "type": "cgroup" }))?;
    bundle.mount(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["ro", "nosuid", "nodev", "noexec"],
    }))?;
    bundle.mount(json!({
        "destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"],
    }))?;
    bundle.spec["linux"]["resources"] = json!({
        "devices": [
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "w" },
        ],
        "cpu": { "shares": 512, "quota": 20_000, "period": 50_000, "cpus": "0", "mems": "0" },
        "memory": { "limit": 67_108_864, "swap": 100_663_296, "reservation": 16_777_216,
                    "checkBeforeUpdate": true },
        "pids": { "limit": 77 },
        "hugepageLimits": [{ "pageSize": "2MB", "limit": 4_194_304 }],
        "network": { "classID": 1_048_577, "priorities": [{ "name": "lo", "priority": 500 }] },
        "unified": { "memory.high": "50331648", "pids.max": "78" },
    });
    let value = |file: &'static str| format!("cat /sys/fs/cgroup/{file}");
    let files = [
        ("cpu.weight", "20"),
        ("cpu.max", "20000 50000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "16777216"),
        // As unified is written last.
        ("pids.max", "78"),
        ("memory.high", "50331648"),
        ("hugetlb.2MB.max", "4194304"),
    ]
    .map(|(file, expected)| (file, value(file), expected));
    let mut checks: Vec<_> = files
        .iter()
        .map(|(file, command, expected)| (*file, command.as_str(), *expected))
        .collect();
    checks.push((
        "device that a rule allows, with the access it allows",
        "mknod /t/kmsg c 1 11 && : >/t/kmsg && echo written; cat /t/kmsg 2>&1 | grep -o 'Oper.*'",
        "written\nOperation not permitted",
    ));
    checks.push((
        "device that no rule allows can be made but not opened",
        "mknod /t/mem c 1 1 && head -c 1 /t/mem 2>&1 | grep -o 'Oper.*'",
        "Operation not permitted",
    ));
    checks.push((
        "devices of every container",
        "echo x >/dev/null && head -c 1 /dev/zero | wc -c && head -c 1 /dev/urandom | wc -c",
        "1\n1",
    ));
    bundle.check(&checks)
}

/// A limit that can't be is refused by the name of its part.
pub(super) fn spec_limits_refused(ctr: &Ctr) -> Result<()> {
    let refused = |resources, words: &[&str]| -> Result<()> {
        let mut bundle = Bundle::new(ctr)?;
        bundle.spec["linux"]["resources"] = resources;
        bundle.script("true").refused(words)
    };
    refused(json!({ "cpu": { "cpus": "700" } }), &["cpuset.cpus", "700"])?;
    refused(
        json!({ "unified": { "a/b.max": "1" } }),
        &["unified", "a/b.max"],
    )
}

/// The kernel's parameters of a container's own namespaces, and no others.
pub(super) fn spec_sysctl(ctr: &Ctr) -> Result<()> {
    for key in ["kernel.panic", "vm/max_map_count"] {
        let mut bundle = Bundle::new(ctr)?;
        bundle.spec["linux"]["sysctl"] = json!({ key: "1" });
        bundle.script("true").refused(&[
            "sysctl",
            key.split_terminator(['.', '/']).next_back().unwrap_or(key),
        ])?;
    }
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["linux"]["sysctl"] = json!({
        "net.ipv4.ip_forward": "1",
        "net/ipv4/conf/lo/log_martians": "1",
        "kernel.shmmax": "123456789",
        "fs.mqueue.msg_max": "20",
        "kernel.domainname": "husk.example",
    });
    bundle.check(&[
        ("forwarding", "cat /proc/sys/net/ipv4/ip_forward", "1"),
        (
            "martians",
            "cat /proc/sys/net/ipv4/conf/lo/log_martians",
            "1",
        ),
        ("shared memory", "cat /proc/sys/kernel/shmmax", "123456789"),
        ("queues", "cat /proc/sys/fs/mqueue/msg_max", "20"),
        ("domain", "cat /proc/sys/kernel/domainname", "husk.example"),
        (
            "the rest is read-only",
            "echo 1 2>/dev/null >/proc/sys/kernel/panic && echo written || echo refused",
            "refused",
        ),
    ])
}

/// What no guest can give is refused, so that nobody relies on it; what every container gets and a
/// virtual machine makes up for is passed over.
pub(super) fn spec_refusals(ctr: &Ctr) -> Result<()> {
    for (part, member, value) in [
        ("process", "apparmorProfile", "my-profile"),
        ("process", "selinuxLabel", "system_u:system_r:my_t:s0"),
        ("linux", "mountLabel", "system_u:object_r:my_t:s0"),
    ] {
        let mut bundle = Bundle::new(ctr)?;
        bundle.spec[part][member] = value.into();
        bundle.script("true").refused(&[member, value])?;
    }
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["process"]["apparmorProfile"] = "docker-default".into();
    bundle.spec["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0:c1,c2".into();
    bundle.spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0:c1,c2".into();
    bundle.check(&[("defaults are passed over", "echo runs", "runs")])
}
