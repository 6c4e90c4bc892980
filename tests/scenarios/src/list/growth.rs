//! Memory that a machine takes while it runs, and gives back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cri::messages::LinuxContainerResources;
use husk_cri::{container, pod};
use serde_json::json;

use crate::ctr::Ctr;
use crate::fifo::{Fifos, Place};
use crate::host;
use crate::kubelet::Kubelet;
use crate::shim::{Shim, granted};
use crate::spec::Bundle;

const MIB: u64 = 1 << 20;

/// A kernel gives memory back in passes, some minutes apart if the first have not met with success.
const SETTLING: Duration = Duration::from_secs(240);

/// Between two looks at what nothing tells of.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

/// What a container takes that has been given more than its machine began with.
const TAKE: &str = "dd if=/dev/zero of=/dev/null bs=350M count=1";

/// A container whose limit is raised has what it may have; lowered, the machine is small again. So over
/// and over.
pub(super) fn grown_by_update(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["linux"]["resources"] = json!({ "memory": { "limit": 128 * MIB } });
    bundle.spec["process"]["args"] = json!(["sleep", "10000"]);
    bundle.detach()?;
    let container = Container {
        shim: Shim::of(&ctr.id)?,
        place: Place::make("growth")?,
    };
    let vmms = host::vmms()?;
    let vmm = vmms.first().filter(|_| ctr.is_husk());
    let small = container.total()?;
    let mut idle_bytes = None;
    for round in ["once", "twice"] {
        container.limit(512 * MIB).context(round)?;
        if let Some(vmm) = vmm {
            let grown = |total| total >= small + 300 * MIB;
            container.becomes(grown).context(round)?;
            idle_bytes.get_or_insert(vmm.memory_bytes()?);
        }
        container.say(TAKE).context(round)?;
        container.limit(64 * MIB).context(round)?;
        if let (Some(vmm), Some(idle_bytes)) = (vmm, idle_bytes) {
            let shrunk = |total| total <= small + 16 * MIB;
            container.becomes(shrunk).context(round)?;
            let bytes = vmm.memory_bytes()?;
            // What the machine began with may have been touched by now.
            let most = idle_bytes + small;
            ensure!(bytes <= most, "{round}: {bytes} bytes, of at most {most}");
        }
    }
    // It has come to no harm.
    container.say("true")?;
    ctr.bury();
    Ok(())
}

struct Container {
    shim: Shim,
    place: Place,
}

impl Container {
    /// The output of a script that succeeds.
    fn say(&self, script: &str) -> Result<String> {
        let (fifos, streams) = Fifos::make(&self.place, "say")?;
        let reader = fifos.stdout.reader()?;
        let status = self.shim.run("say", &streams, &["sh", "-c", script])?;
        let said = String::from_utf8(reader.rest()?)?;
        fifos.remove()?;
        ensure!(status == 0, "{script:?} ended with {status}");
        Ok(said)
    }

    fn limit(&self, bytes: u64) -> Result<()> {
        let resources = json!({ "memory": { "limit": bytes } });
        granted(self.shim.update(&resources.to_string()))
    }

    /// The memory of its machine.
    fn total(&self) -> Result<u64> {
        parse_total(&self.say(TOTAL)?)
    }

    /// Waits for the memory of its machine to be as it should: its kernel may still be at it.
    fn becomes(&self, is_right: impl Fn(u64) -> bool) -> Result<()> {
        becomes(|| self.total(), is_right)
    }
}

const TOTAL: &str = "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";

fn parse_total(said: &str) -> Result<u64> {
    let kib: u64 = said
        .trim()
        .parse()
        .with_context(|| format!("it says {said:?}"))?;
    Ok(kib.saturating_mul(1024))
}

fn becomes(total: impl Fn() -> Result<u64>, is_right: impl Fn(u64) -> bool) -> Result<()> {
    let deadline = Instant::now() + SETTLING;
    loop {
        let bytes = total()?;
        if is_right(bytes) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the machine has {bytes} bytes");
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// A pod of which nothing was known grows with its containers, and with what the kubelet changes.
pub(super) fn pod_grows(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let limits = |bytes: u64| {
            let mut limits = LinuxContainerResources::new();
            limits.memory_limit_in_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            limits
        };
        let mut config = container("a", &["sleep", "10000"]);
        let linux = config.linux.mut_or_insert_default();
        linux.resources = Some(limits(450 * MIB)).into();
        let a = kubelet.start(pod, config)?;
        let total = || parse_total(&kubelet.shell(&a, TOTAL)?);
        if ctr.is_husk() {
            becomes(total, |total| total >= 450 * MIB).context("a container that needs more")?;
        }
        kubelet.shell(&a, TAKE)?;
        kubelet.cri.update(&a, limits(600 * MIB))?;
        if ctr.is_husk() {
            becomes(total, |total| total >= 600 * MIB).context("a container that is given more")?;
        }
        kubelet.shell(&a, TAKE)?;
        Ok(())
    })
}
