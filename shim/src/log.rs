//! Log lines, to the FIFO that containerd reads.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use rustix::fs::OFlags;

/// The FIFO's name in the bundle, which is the working directory of a server.
const LOG_FIFO: &str = "log";

/// Sends log lines to containerd. While nobody reads, lines are kept until the FIFO is full and
/// dropped then: logging never blocks the shim and never ends it.
pub(crate) fn init(debug: bool) {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(LOG_FIFO);
    let level = if debug {
        tracing::Level::DEBUG
    } else {
        tracing::Level::INFO
    };
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false);
    match fifo {
        Ok(fifo) => lines.with_writer(Arc::<File>::new(fifo)).init(),
        // A server started by hand has no FIFO.
        Err(_) => lines.with_writer(std::io::stderr).init(),
    }
}
