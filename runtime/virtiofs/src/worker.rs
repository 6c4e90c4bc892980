//! What a thread that serves requests has for itself.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process;
use rustix::thread::{self, CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::abi::InHeader;
use crate::server::Server;
use crate::sys::identity;

/// Longest request without file data: a SETXATTR with the longest name and value.
pub(crate) const ARGUMENTS_BYTES_MAX: usize = 68 * 1024;
/// Longest reply that is put together first: a directory's entries.
pub(crate) const OUTPUT_BYTES_MAX: usize = 128 * 1024;
/// Directory entries read from the host in one go.
pub(crate) const ENTRIES_BYTES: usize = 32 * 1024;

/// The state of one thread that calls [`Server::handle`]: buffers, and the thread's identity. It
/// belongs to the thread that made it.
#[derive(Debug)]
pub struct Worker {
    pub(crate) input: Vec<u8>,
    pub(crate) output: Vec<u8>,
    pub(crate) entries: Vec<MaybeUninit<u8>>,
    capabilities: CapabilitySets,
    /// The kernel leaves the capabilities alone when the thread changes its identity.
    keeps_capabilities: bool,
    /// The identity is that of the thread.
    not_send: PhantomData<*const ()>,
}

/// Why a thread can't serve.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// `unshare(CLONE_FS)`.
    #[error("cannot give the thread a umask and directory of its own")]
    Unshare(#[source] Errno),
    /// `fchdir`.
    #[error("cannot change to the directory of the process's descriptors")]
    Directory(#[source] Errno),
    /// `capget`.
    #[error("cannot read the thread's capabilities")]
    Capabilities(#[source] Errno),
    /// `setfsuid` and `setfsgid` do nothing.
    #[error("the thread may not take on other identities (CAP_SETUID, CAP_SETGID)")]
    Identity,
}

impl Worker {
    /// Prepares the calling thread, for good: it gets a umask of its own, which is 0, and its
    /// current directory is then the one of the process's descriptors. Do it before the seccomp
    /// filter of the thread is set.
    ///
    /// # Errors
    /// What the thread lacks.
    pub fn new(server: &Server) -> Result<Self, WorkerError> {
        identity::unshare_directory().map_err(WorkerError::Unshare)?;
        // Extended attributes can be reached by path only: the path is a descriptor's number.
        process::fchdir(&server.options.proc_self_fd).map_err(WorkerError::Directory)?;
        process::umask(Mode::empty());
        let keeps_capabilities = keep_capabilities();
        let capabilities = thread::capabilities(None).map_err(WorkerError::Capabilities)?;
        if !identity::can_change() {
            return Err(WorkerError::Identity);
        }
        Ok(Self {
            input: vec![0; ARGUMENTS_BYTES_MAX],
            output: Vec::with_capacity(OUTPUT_BYTES_MAX),
            entries: vec![MaybeUninit::uninit(); ENTRIES_BYTES],
            capabilities,
            keeps_capabilities,
            not_send: PhantomData,
        })
    }

    /// Does `work`, which creates a file, as the sender of the request.
    pub(crate) fn as_caller<T>(
        &self,
        header: &InHeader,
        umask: u32,
        work: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        // To the kernel, these mean "leave it".
        if header.uid == u32::MAX || header.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let umask = Mode::from_raw_mode(umask & 0o777);
        if !umask.is_empty() {
            process::umask(umask);
        }
        let is_root = header.uid == 0 && header.gid == 0;
        let mut result = Ok(());
        if !is_root {
            identity::set(header.uid, header.gid);
            if !self.keeps_capabilities {
                result = thread::set_capabilities(None, self.capabilities);
            }
        }
        let result = result.and_then(|()| work());
        if !is_root {
            identity::set(0, 0);
        }
        if !umask.is_empty() {
            process::umask(Mode::empty());
        }
        result
    }

    /// Does `work` without `CAP_FSETID` and in the group of the request's sender, so that the kernel
    /// clears set-user-id and set-group-id as it does for anybody.
    pub(crate) fn without_fsetid<T>(
        &self,
        header: &InHeader,
        work: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut without = self.capabilities;
        without.effective.remove(CapabilitySet::FSETID);
        identity::set(0, header.gid);
        let result = thread::set_capabilities(None, without).and_then(|()| work());
        identity::set(0, 0);
        thread::set_capabilities(None, self.capabilities)?;
        result
    }
}

/// Asks the kernel to leave the capabilities alone when the identity changes. Saves a system call
/// for each file created.
fn keep_capabilities() -> bool {
    let wanted = CapabilitiesSecureBits::NO_SETUID_FIXUP;
    let Ok(now) = thread::capabilities_secure_bits() else {
        return false;
    };
    now.contains(wanted) || thread::set_capabilities_secure_bits(now | wanted).is_ok()
}
