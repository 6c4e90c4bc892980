//! What a memory limit does, and what a container sees of its machine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ctr::{Ctr, Ended};
use crate::events::Events;

/// For a container that takes all memory it gets. Some 40 s were seen on a busy machine.
const KILL_DEADLINE: Duration = Duration::from_secs(240);

/// Who takes more memory than there may be is killed, and containerd hears of it.
pub(super) fn out_of_memory(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    let began = Instant::now();
    let ended = ctr.run(&["--memory-limit", "33554432"], &["tail", "/dev/zero"])?;
    killed(&ended, began)?;
    events.until(&["/tasks/oom", &ctr.id])?;
    Ok(())
}

/// A program that is big beside its limit reads its own pages again and again instead of coming to
/// an end. With runc they are mostly somebody else's, and not counted.
pub(super) fn thrashing(ctr: &Ctr) -> Result<()> {
    let events = Events::listen()?;
    let began = Instant::now();
    let mount = "type=bind,src=/testdata/debian,dst=/mnt,options=rbind:ro";
    let program = "kept=[]\nwhile True: kept.append(bytearray(65536))";
    let ended = ctr.run(
        &["--memory-limit", "33554432", "--mount", mount],
        &["chroot", "/mnt", "python3", "-c", program],
    )?;
    killed(&ended, began)?;
    events.until(&["/tasks/oom", &ctr.id])?;
    Ok(())
}

fn killed(ended: &Ended, began: Instant) -> Result<()> {
    ensure!(
        ended.status == 137,
        "ended with {}, not 137: {}",
        ended.status,
        ended.stderr
    );
    let took = began.elapsed();
    ensure!(took < KILL_DEADLINE, "it took {took:?}");
    Ok(())
}

/// CPUs, memory and room, as the README has them.
pub(super) fn what_a_container_sees(ctr: &Ctr) -> Result<()> {
    const LIMIT: u64 = 64 << 20;
    let limit = LIMIT.to_string();
    let script = "nproc; grep -c ^processor /proc/cpuinfo; \
                  sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; \
                  df -kP / | tail -n 1 | { read a size b; echo ${size%% *}; }";
    let said = ctr
        .run(
            &["--memory-limit", &limit, "--cpus", "0.5"],
            &["sh", "-c", script],
        )?
        .success()?;
    let numbers: Result<Vec<u64>, _> = said.lines().map(str::parse).collect();
    let numbers = numbers.with_context(|| format!("it says {said:?}"))?;
    let [cpus, processors, memory_kib, root_kib] = numbers[..] else {
        anyhow::bail!("it says {said:?}");
    };
    ensure!(
        cpus >= 1 && cpus == processors,
        "nproc says {cpus}, /proc/cpuinfo has {processors}"
    );
    // A limit is the cgroup's affair with both: what they show is the machine, the pod's own with
    // Husk.
    ensure!(memory_kib * 1024 > LIMIT, "{memory_kib} KiB in all");
    if ctr.is_husk() {
        ensure!(memory_kib <= 1 << 20, "{memory_kib} KiB are not the pod's");
    }
    // What the limit lets it have is there, more than a machine has by default.
    let limit = (320 << 20).to_string();
    let copy = ["dd", "if=/dev/zero", "of=/dev/null", "bs=290M", "count=1"];
    ctr.run(&["--memory-limit", &limit], &copy)?.success()?;
    let host = rustix::fs::statvfs("/var/lib/containerd")?;
    let host_kib = host.f_blocks * host.f_frsize / 1024;
    ensure!(
        root_kib == host_kib,
        "df says {root_kib} KiB for /, the host has {host_kib} there"
    );
    Ok(())
}
