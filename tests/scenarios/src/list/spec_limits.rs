//! What config.json says of resources, kernel parameters and labels.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::fifo::{Fifos, Place};
use crate::host::{self, Appearing};
use crate::shim::{Shim, granted};
use crate::spec::Bundle;

/// For a shim to end that nobody asks for a task, in the testbed.
const UNUSED_SHIM_BOUND: Duration = Duration::from_secs(120);

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
        "blockIO": { "weight": 500 },
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
        // 10 to 1000 become 1 to 10000.
        ("io.weight", "default 4950"),
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

/// What Update sets is in force, keeps what it does not name, and is in the figures.
pub(super) fn limits_updated(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.namespace(json!({ "type": "cgroup" }))?;
    bundle.mount(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["ro", "nosuid", "nodev", "noexec"],
    }))?;
    bundle.spec["linux"]["resources"] = json!({
        "memory": { "limit": 33_554_432 }, "pids": { "limit": 44 },
    });
    bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
    bundle.detach()?;
    let shim = Shim::of(&ctr.id)?;
    let place = Place::make("update")?;
    let files = |wanted: &[(&str, &str)]| -> Result<()> {
        let names: Vec<_> = wanted.iter().map(|(name, _)| *name).collect();
        let script = format!("cd /sys/fs/cgroup && tail -qn 1 {}", names.join(" "));
        let (fifos, streams) = Fifos::make(&place, "look")?;
        let reader = fifos.stdout.reader()?;
        let status = shim.run("look", &streams, &["sh", "-c", &script])?;
        let said = String::from_utf8(reader.rest()?)?;
        fifos.remove()?;
        let expected: Vec<_> = wanted.iter().map(|(_, value)| *value).collect();
        ensure!(
            status == 0 && said.lines().eq(expected.iter().copied()),
            "{names:?} are {said:?}, not {expected:?}"
        );
        Ok(())
    };
    let update = |resources: Value| granted(shim.update(&resources.to_string()));

    files(&[("memory.max", "33554432"), ("pids.max", "44")]).context("before")?;
    update(json!({
        "cpu": { "shares": 2048, "quota": 30_000, "period": 60_000, "cpus": "0", "mems": "0" },
        "memory": { "limit": 50_331_648, "swap": 67_108_864, "reservation": 25_165_824 },
        "pids": { "limit": 55 },
        "unified": { "memory.high": "41943040" },
    }))?;
    let all = [
        ("cpu.weight", "79"),
        ("cpu.max", "30000 60000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("memory.max", "50331648"),
        ("memory.swap.max", "16777216"),
        ("memory.low", "25165824"),
        ("memory.high", "41943040"),
        ("pids.max", "55"),
    ];
    files(&all).context("all at once")?;
    let figures = granted(shim.stats())?;
    let told = (
        figures.memory.usage_limit,
        figures.memory.swap_limit,
        figures.pids.limit,
    );
    ensure!(told == (50_331_648, 16_777_216, 55), "Stats says {told:?}");

    update(json!({ "pids": { "limit": 66 } }))?;
    files(&all[..all.len() - 1]).context("what was not named")?;
    files(&[("pids.max", "66")])?;

    let Err(refused) = shim.update(r#"{ "cpu": { "cpus": "700" } }"#)? else {
        bail!("CPUs that are not there were given");
    };
    ensure!(refused.text.contains("cpuset.cpus"), "{refused:?}");
    files(&all[..all.len() - 1]).context("after a refusal")?;

    update(json!({
        "cpu": { "quota": -1, "period": 60_000 }, "memory": { "limit": -1, "swap": -1 }, "pids": { "limit": -1 },
    }))?;
    files(&[
        ("cpu.max", "max 60000"),
        ("memory.max", "max"),
        ("memory.swap.max", "max"),
        ("pids.max", "max"),
    ])
    .context("without limits")?;
    let figures = granted(shim.stats())?;
    ensure!(
        figures.memory.usage_limit == u64::MAX,
        "Stats says {}",
        figures.memory.usage_limit
    );
    ctr.bury();
    Ok(())
}

/// What no guest can give is refused, so that nobody relies on it, and before there is a guest; what
/// every container gets and a virtual machine makes up for is passed over.
pub(super) fn spec_refusals(ctr: &Ctr) -> Result<()> {
    let pods = Path::new("/run/husk").join("default");
    fs::create_dir_all(&pods)?;
    // A pod's directory is there before its VMM is.
    let appearing = Appearing::watch(&pods)?;
    let mut wrong = Vec::new();
    for (pointer, value, words) in refusals() {
        let mut bundle = Bundle::new(ctr)?;
        let member = bundle.spec.pointer_mut(pointer).context(pointer)?;
        match (member, value) {
            (Value::Array(list), value) => list.push(value),
            (Value::Object(object), Value::Object(more)) => object.extend(more),
            _ => bail!("{pointer} can't be added to"),
        }
        if let Err(error) = bundle.script("true").refused(words) {
            wrong.push(format!("{words:?}: {error:#}"));
        }
    }
    for kind in ["pid", "ipc", "uts", "mount", "network"] {
        let mut bundle = Bundle::new(ctr)?;
        let all = bundle.spec["linux"]["namespaces"].as_array_mut();
        all.context("the spec has no namespaces")?
            .retain(|namespace| namespace["type"] != kind);
        if let Err(error) = bundle.refused(&["linux.namespaces", kind, "host"]) {
            wrong.push(format!("{kind}: {error:#}"));
        }
    }
    if let Err(error) = mapped_ids(ctr) {
        wrong.push(format!("mapped ids: {error:#}"));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n        "));
    let made = appearing.names()?;
    ensure!(made.is_empty(), "machines were made for nothing: {made:?}");

    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["process"]["apparmorProfile"] = "docker-default".into();
    bundle.spec["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0:c1,c2".into();
    bundle.spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0:c1,c2".into();
    bundle.check(&[("defaults are passed over", "echo runs", "runs")])?;
    ensure!(!appearing.names()?.is_empty(), "nothing is seen to be made");
    Ok(())
}

/// containerd 2.1 asks the shim whether it can map ids, refuses by itself, and leaves the shim alone,
/// which ends then.
fn mapped_ids(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.mount(json!({ "destination": "/a", "type": "bind", "source": "/etc", "options": ["rbind", "idmap"] }))?;
    let refusal = bundle.script("true").refusal()?;
    let is_husks = refusal.contains("mount at \"/a\"") && refusal.contains("mapped ids");
    ensure!(
        is_husks || refusal.contains("idmap mounts not supported"),
        "{refusal}"
    );
    let deadline = Instant::now() + UNUSED_SHIM_BOUND;
    for shim in host::shims(&ctr.id)? {
        ensure!(shim.ends_before(deadline)?, "an unused shim stays");
    }
    Ok(())
}

/// Where in the spec, what is added there, and what the refusal says.
fn refusals() -> Vec<(&'static str, Value, &'static [&'static str])> {
    let bind = |options: &[&str]| json!({ "destination": "/a", "type": "bind", "source": "/etc", "options": options });
    vec![
        (
            "/process",
            json!({ "apparmorProfile": "my-profile" }),
            &["apparmorProfile", "my-profile"],
        ),
        (
            "/process",
            json!({ "selinuxLabel": "system_u:system_r:my_t:s0" }),
            &["selinuxLabel", "my_t"],
        ),
        (
            "/linux",
            json!({ "mountLabel": "system_u:object_r:my_t:s0" }),
            &["mountLabel", "my_t"],
        ),
        (
            "/linux",
            json!({ "intelRdt": { "closID": "x" } }),
            &["intelRdt", "cache"],
        ),
        (
            "/linux",
            json!({ "sysctl": { "vm.swappiness": "1" } }),
            &["sysctl", "vm.swappiness"],
        ),
        (
            "/linux",
            json!({ "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                { "names": ["read"], "action": "SCMP_ACT_NOTIFY" } ] } }),
            &["seccomp", "notify"],
        ),
        (
            "/linux",
            json!({ "devices": [{ "type": "b", "path": "/dev/disk", "major": 8, "minor": 0 }] }),
            &["devices", "/dev/disk", "block device"],
        ),
        (
            "/linux/namespaces",
            json!({ "type": "user", "path": "/proc/1/ns/user" }),
            &["namespaces", "user"],
        ),
        ("/mounts", bind(&["rbind", "rshared"]), &["/a", "the host"]),
        ("/mounts", bind(&["rbind", "remount"]), &["/a", "remount"]),
        (
            "/mounts",
            json!({ "destination": "/a", "type": "xfs", "source": "/dev/vda" }),
            &["/a", "file system"],
        ),
        (
            "/mounts",
            json!({ "destination": "/a", "type": "ext4", "source": "/etc/passwd" }),
            &["/a", "block device"],
        ),
    ]
}
