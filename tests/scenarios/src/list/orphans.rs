//! Processes whose parents end before them: somebody else collects them.

use anyhow::{Context, Result, ensure};
use husk_cri::messages::NamespaceMode;
use husk_cri::{container, pod};

use crate::ctr::Ctr;
use crate::guest::Guest;
use crate::kubelet::Kubelet;
use crate::shim::Shim;
use crate::spec::Bundle;

/// Leaves six orphans that end by themselves or by a signal, and waits until the last of them is gone:
/// they have the pipe that is read here.
const LEAVE_ORPHANS: &str =
    "said=$(for n in 1 2 3; do (sh -c 'sleep 0.1; kill -9 $$' &); (sleep 0.1 &); done)";

/// Prints how many zombies there are once there are as many, or after a while. That one is collected
/// nobody tells.
const COUNT_ZOMBIES: &str = "count() { grep -l ') Z ' /proc/[0-9]*/stat 2>/dev/null | wc -l; }
    n=0; while [ $(count) != $wanted ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done; count";

/// Orphans belong to their container's first process, as those of its execs do. One that collects
/// them has none left; of one that does not, none is left when it ends.
pub(super) fn orphans(ctr: &Ctr) -> Result<()> {
    // It collects whatever ends.
    let init = "sleep 1000 & while :; do wait; done";
    ctr.detach(&["--privileged"], &["sh", "-c", init])?;
    let look = |exec: &str| ctr.is_husk().then(|| Guest::look(ctr, exec)).transpose();
    let before = look("g1")?;
    for number in 0..3 {
        let said = exec(ctr, &format!("e{number}"), &script(0))?;
        ensure!(said == "0", "{said} zombies are left");
    }

    let shim = Shim::of(&ctr.id)?;
    let mut bundle = Bundle::new(ctr)?;
    bundle.script(&format!(
        "mkfifo /tmp/said; ({{ {}\n}} > /tmp/said &); exec cat /tmp/said",
        script(6)
    ));
    let ended = bundle.run_beside(&shim, |_| Ok(()))?;
    ensure!(ended.text() == "6", "of six orphans {ended:?} are zombies");
    if let (Some(before), Some(after)) = (before, look("g2")?) {
        ensure!(
            after.zombies == 0 && after.processes <= before.processes,
            "before, the guest had {before:?}, now {after:?}"
        );
    }
    ctr.bury();
    Ok(())
}

/// In a PID namespace that a pod's containers share, the first process is the agent's own. With runc it
/// is what the pod's image has, which here collects nothing.
pub(super) fn pods_orphans(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let mut config = pod(&kubelet.name);
    let linux = config.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
    kubelet.with_pod(config, |kubelet, pod| {
        let mut config = container("a", &["sleep", "1000"]);
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default().pid = NamespaceMode::POD.into();
        let id = kubelet.start(pod, config)?;
        for _ in 0..3 {
            let said = kubelet.shell(&id, &script(0))?;
            ensure!(said == "0", "{said} zombies are left");
        }
        Ok(())
    })
}

fn script(wanted: usize) -> String {
    format!("wanted={wanted}\n{LEAVE_ORPHANS}\n{COUNT_ZOMBIES}")
}

fn exec(ctr: &Ctr, exec: &str, script: &str) -> Result<String> {
    let arguments = [
        "task",
        "exec",
        "--exec-id",
        exec,
        &ctr.id,
        "sh",
        "-c",
        script,
    ];
    let ended = ctr.ctr(&arguments)?;
    ended.success().with_context(|| format!("exec {exec}"))
}
