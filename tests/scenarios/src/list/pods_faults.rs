//! Networks of pods that can't be, or go away, through CRI.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_cri::{BROKEN_NETWORK_DIR, container, pod};
use rustix::mount::{UnmountFlags, unmount};

use crate::ctr::Ctr;
use crate::kubelet::Kubelet;
use crate::leftovers::Machine;

/// Where containerd keeps the namespaces of pods.
const NAMESPACES: &str = "/run/netns";

/// How taps are made.
const TUN: &str = "/dev/net/tun";

/// A pod whose network can't be made is refused with the reason, and nothing of it is left; one whose
/// namespace goes while it runs can be stopped and removed.
pub(super) fn network_faults(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let before = Machine::look()?;
    plugin_that_fails(ctr, &kubelet)?;
    before.unchanged().context("after a plugin that fails")?;
    if ctr.is_husk() {
        host_without_taps(&kubelet)?;
        before.unchanged().context("without taps")?;
    }
    namespace_that_goes(&mut kubelet)?;
    before.unchanged().context("after a namespace that goes")
}

/// The second plugin of a chain, after one that has made an interface and taken an address.
fn plugin_that_fails(ctr: &Ctr, kubelet: &Kubelet) -> Result<()> {
    let handler = if ctr.is_husk() {
        "husk-broken"
    } else {
        "runc-broken"
    };
    let refusal = match kubelet.cri.run_pod(handler, pod(&kubelet.name)) {
        Err(error) => format!("{error:#}"),
        Ok(pod) => {
            kubelet.cri.stop_pod(&pod.id)?;
            kubelet.cri.remove_pod(&pod.id)?;
            anyhow::bail!("it runs without a network");
        }
    };
    ensure!(
        refusal.contains("no_such_parameter"),
        "it is refused with {refusal}"
    );
    let taken = Path::new(BROKEN_NETWORK_DIR).join("husk-broken");
    let is_address = |name: &str| name.starts_with("10.");
    for entry in fs::read_dir(taken).into_iter().flatten() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(!is_address(&name), "the address {name} stays taken");
    }
    Ok(())
}

/// A host's device under another name, until this is dropped.
struct Away;

impl Away {
    fn take() -> Result<Self> {
        fs::rename(TUN, format!("{TUN}-away")).context("cannot take the device away")?;
        Ok(Self)
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        // Every pod that comes would tell.
        let _ = fs::rename(format!("{TUN}-away"), TUN);
    }
}

fn host_without_taps(kubelet: &Kubelet) -> Result<()> {
    let away = Away::take()?;
    let refusal = kubelet.refusal(pod(&kubelet.name))?;
    drop(away);
    for word in [TUN, "eth0"] {
        ensure!(refusal.contains(word), "{word} is not named: {refusal}");
    }
    Ok(())
}

fn namespaces() -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten() {
        found.insert(entry?.path());
    }
    Ok(found)
}

/// Of the host.
fn interfaces() -> Result<BTreeSet<PathBuf>> {
    let entries = fs::read_dir("/sys/class/net")?;
    Ok(entries
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?)
}

/// As `ip netns delete` takes one away.
fn namespace_that_goes(kubelet: &mut Kubelet) -> Result<()> {
    let before = namespaces()?;
    let interfaces_before = interfaces()?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let id = kubelet.start(pod, container("a", &["sleep", "10000"]))?;
        let mut new = namespaces()?;
        new.retain(|path| !before.contains(path));
        ensure!(new.len() == 1, "the pod's namespaces are {new:?}");
        for path in &new {
            unmount(path, UnmountFlags::DETACH)?;
            fs::remove_file(path)?;
        }
        let said = kubelet.shell(&id, "ip -o link show eth0 > /dev/null && echo there")?;
        ensure!(said == "there", "it says {said:?}");
        Ok(())
    })?;
    // No plugin has come to it, and the kernel ends what was in the namespace some time after the
    // last process.
    for interface in interfaces()?.difference(&interfaces_before) {
        let name = interface.file_name().context("no name")?;
        // It may have gone meanwhile.
        let _ = Command::new("ip")
            .args(["link", "delete"])
            .arg(name)
            .status();
    }
    Ok(())
}
