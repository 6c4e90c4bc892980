//! How big the installed files are.

use std::fs;

use anyhow::{Context, Result};

use super::Bench;
use crate::record::Subject;

/// Measure, whose, where.
const FILES: &[(&str, Subject, &str)] = &[
    (
        "size_shim",
        Subject::Husk,
        "/usr/local/bin/containerd-shim-husk-v2",
    ),
    (
        "size_shim",
        Subject::Runc,
        "/usr/bin/containerd-shim-runc-v2",
    ),
    (
        "size_shim",
        Subject::Gvisor,
        "/usr/bin/containerd-shim-runc-v2",
    ),
    (
        "size_vmm",
        Subject::Husk,
        "/usr/local/libexec/husk/husk-vmm",
    ),
    ("size_vmm", Subject::Runc, "/usr/sbin/runc"),
    ("size_vmm", Subject::Gvisor, "/usr/bin/runsc"),
    (
        "size_initrd",
        Subject::Husk,
        "/usr/local/share/husk/initrd.img",
    ),
    (
        "size_kernel",
        Subject::Husk,
        "/usr/local/share/husk/vmlinux",
    ),
    ("size_cli", Subject::Husk, "/usr/local/bin/husk"),
];

const MIB: f64 = 1024.0 * 1024.0;

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    for (measure, subject, path) in FILES {
        let size = fs::metadata(path)
            .with_context(|| format!("cannot look at {path}"))
            .map(|metadata| to_mib(metadata.len()));
        bench.sample_or_failure(measure, *subject, size)?;
    }
    Ok(())
}

/// Exact for anything that fits a disk.
#[expect(clippy::cast_precision_loss, reason = "sizes stay far below 2^53")]
pub(super) fn to_mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}
