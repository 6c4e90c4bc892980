//! Mounts a directory on another by way of the virtio-fs server, until it is unmounted or this
//! process gets SIGTERM or SIGINT: `virtiofs-mount [--private] [--writeback] SHARE MOUNTPOINT`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use husk_virtiofs::front::Mounted;
use husk_virtiofs::{CachePolicy, Options, Server};
use nix::sys::signal::{SigSet, Signal};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// As many as a small guest has.
const THREADS: usize = 2;

fn main() -> anyhow::Result<()> {
    let mut policy = CachePolicy::SHARED;
    let mut writeback = false;
    let mut paths = Vec::new();
    for argument in std::env::args_os().skip(1) {
        match argument.to_str() {
            Some("--private") => policy = CachePolicy::PRIVATE,
            Some("--writeback") => writeback = true,
            _ => paths.push(PathBuf::from(argument)),
        }
    }
    let [share, mount_point] = paths.as_slice() else {
        bail!("usage: virtiofs-mount [--private] [--writeback] SHARE MOUNTPOINT");
    };
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block().context("cannot block signals")?;

    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, share, directory, Mode::empty())
        .with_context(|| format!("cannot open {share:?}"))?;
    let descriptors = openat(CWD, "/proc/self/fd", directory, Mode::empty())
        .context("cannot open /proc/self/fd")?;
    let options = Options {
        writeback,
        ..Options::single(descriptors, policy)
    };
    let server = Arc::new(Server::new(root, options)?);
    let mut mounted = Mounted::new(&server, mount_point, THREADS)?;

    let mut unmounter = mounted.unmounter();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            let _ = unmounter.unmount();
        }
    });
    mounted.join()?;
    println!("{:?}", server.counters());
    Ok(())
}
