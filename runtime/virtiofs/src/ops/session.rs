//! INIT, FORGET and BATCH_FORGET.

use rustix::io::Errno;

use super::TRANSFER_BYTES_MAX;
use crate::abi::{self, BatchForgetIn, ForgetIn, ForgetOne, InitExtIn, InitIn, InitOut, init};
use crate::memory::RequestReader;
use crate::options::Options;
use crate::server::{Call, Server};

/// Requests in the background (read-ahead, write-back) that the guest kernel may have under way.
const BACKGROUND_MAX: u16 = 128;
/// From how many on it regards the server as congested.
const CONGESTION_THRESHOLD: u16 = 96;
/// Pages of one request.
const PAGES_MAX: u16 = 256;

const _: () = assert!(PAGES_MAX as u32 * 4096 == TRANSFER_BYTES_MAX);

/// What is wanted of a kernel that offers it. Left out on purpose:
///
/// * POSIX_LOCKS, FLOCK_LOCKS: the guest kernel keeps the locks, see the crate's documentation.
/// * EXPORT_SUPPORT: needs lookups of `..`.
/// * NO_OPEN_SUPPORT, NO_OPENDIR_SUPPORT: an open file must stay readable after it was deleted,
///   or after its permissions were taken away; only an open descriptor does that.
/// * HANDLE_KILLPRIV: the second version has the kernel's own semantics.
/// * EXPLICIT_INVAL_DATA: AUTO_INVAL_DATA sees that others changed a file.
/// * CREATE_SUPP_GROUP: the guest kernel clears set-group-id itself where the caller isn't in the
///   group (`vfs_prepare_mode`), so the caller's groups change nothing here.
/// * SUBMOUNTS: the guest would check no ACLs on them; see `Mount::ino_offset`.
/// * SECURITY_CTX: the host's labels are the host's business.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::HAS_IOCTL_DIR
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// What is agreed on with a kernel that offers `offered`.
pub(crate) fn negotiate(options: &Options, offered: u64) -> u64 {
    let writeback = if options.writeback {
        init::WRITEBACK_CACHE
    } else {
        0
    };
    offered & (WANTED | writeback)
}

impl Server {
    pub(crate) fn init(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: InitIn = call.arguments.take()?;
        if request.major > abi::MAJOR {
            // Protocol: name our version, and wait for another INIT.
            return call.reply_with(&InitOut {
                major: abi::MAJOR,
                minor: abi::MINOR,
                ..InitOut::default()
            });
        }
        if request.major < abi::MAJOR || request.minor < abi::MINOR_MIN {
            return Err(Errno::PROTO);
        }
        let mut offered = u64::from(request.flags);
        if offered & init::INIT_EXT != 0 {
            let more: InitExtIn = call.arguments.take()?;
            offered |= u64::from(more.flags2) << 32;
        }
        let agreed = negotiate(&self.options, offered);
        self.start_session(agreed);
        let [lower, upper] = halves(agreed);
        call.reply_with(&InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR,
            max_readahead: request.max_readahead,
            flags: lower,
            max_background: BACKGROUND_MAX,
            congestion_threshold: CONGESTION_THRESHOLD,
            max_write: TRANSFER_BYTES_MAX,
            time_gran: 1,
            max_pages: PAGES_MAX,
            flags2: upper,
            ..InitOut::default()
        })
    }

    pub(crate) fn forget(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: ForgetIn = call.arguments.take()?;
        self.inodes.forget(call.header.nodeid, request.nlookup);
        Ok(())
    }

    /// The one request that may be as long as a WRITE, so it is read piece by piece.
    pub(crate) fn batch_forget(&self, request: &mut RequestReader<'_>) -> Result<(), Errno> {
        let head: BatchForgetIn = request.read_struct().ok_or(Errno::INVAL)?;
        for _ in 0..head.count {
            let one: ForgetOne = request.read_struct().ok_or(Errno::INVAL)?;
            self.inodes.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }
}

/// The lower and the upper 32 bits.
fn halves(flags: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = flags.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
