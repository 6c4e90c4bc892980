//! The server on a mount of the host's, so that test suites reach it without a guest.
//!
//! The package `fuser` mounts, agrees on protocol and flags with the kernel, and unmounts. Its
//! interface for file systems stops short of what this server is to be tested for: so from there
//! on, the requests go from `/dev/fuse` to [`Server::handle`] as they are, by the same code that a
//! guest's requests take.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use fuser::{
    Config, Filesystem, InitFlags, KernelConfig, MountOption, Request, Session, SessionACL,
    SessionUnmounter,
};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use crate::memory::{ReplyWriter, RequestReader};
use crate::ops;
use crate::server::Server;
use crate::worker::Worker;

/// Most that the kernel sends or takes at once: file data, and what is in front of it.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024 + 4096;
/// Pages of 4 KiB in a request's data.
const WRITE_BYTES_MAX: u32 = ops::TRANSFER_BYTES_MAX;

/// A mounted server. Dropping it unmounts.
#[derive(Debug)]
pub struct Mounted {
    session: Session<Handshake>,
    threads: Vec<JoinHandle<Result<(), FrontError>>>,
}

/// Why a server can't be mounted, or stays mounted no longer.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// By `fuser`.
    #[error("cannot mount")]
    Mount(#[source] io::Error),
    /// A descriptor or a thread.
    #[error("cannot start a worker thread")]
    Thread(#[source] io::Error),
    /// Giving up those that serving files does not take.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] Errno),
    /// Its preparation.
    #[error("a thread cannot serve")]
    Worker(#[from] crate::worker::WorkerError),
    /// Other than the end of the mount.
    #[error("cannot read a request from the kernel")]
    Read(#[source] Errno),
    /// It has ended by itself.
    #[error("a worker thread panicked")]
    Panicked,
}

/// What `fuser` is given: a file system that can do nothing but shake hands.
#[derive(Debug)]
struct Handshake {
    server: Arc<Server>,
}

impl Filesystem for Handshake {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let agreed = ops::negotiate(&self.server.options, config.capabilities().bits());
        let refused = |_| io::Error::other("the kernel refuses what it has offered");
        config
            .add_capabilities(InitFlags::from_bits_retain(agreed))
            .map_err(refused)?;
        let too_much = |_| io::Error::other("fuser refuses 1 MiB writes");
        config.set_max_write(WRITE_BYTES_MAX).map_err(too_much)?;
        self.server.start_session(agreed);
        Ok(())
    }
}

impl Mounted {
    /// Mounts `server` on `mount_point`, and serves it with as many threads as told. The kernel
    /// checks permissions, and all users may use it, as in a guest.
    ///
    /// # Errors
    /// If it can't be mounted: this takes `CAP_SYS_ADMIN` and `/dev/fuse`.
    pub fn new(
        server: &Arc<Server>,
        mount_point: &Path,
        thread_count: usize,
    ) -> Result<Self, FrontError> {
        let handshake = Handshake {
            server: Arc::clone(server),
        };
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.mount_options = vec![
            MountOption::FSName("husk".to_owned()),
            MountOption::Subtype("husk-virtiofs".to_owned()),
            MountOption::DefaultPermissions,
            MountOption::Suid,
            MountOption::Dev,
        ];
        let session = Session::new(handshake, mount_point, &config).map_err(FrontError::Mount)?;
        let mut threads = Vec::new();
        for number in 0..thread_count {
            let device = session
                .as_fd()
                .try_clone_to_owned()
                .map_err(FrontError::Thread)?;
            let server = Arc::clone(server);
            let thread = thread::Builder::new()
                .name(format!("fs-worker-{number}"))
                .spawn(move || serve(&server, &device))
                .map_err(FrontError::Thread)?;
            threads.push(thread);
        }
        Ok(Self { session, threads })
    }

    /// What unmounts from another thread.
    pub fn unmounter(&mut self) -> SessionUnmounter {
        self.session.unmount_callable()
    }

    /// Serves until the mount is gone: unmounted by anybody.
    ///
    /// # Errors
    /// What a thread ended with.
    pub fn join(self) -> Result<(), FrontError> {
        for thread in self.threads {
            thread.join().map_err(|_| FrontError::Panicked)??;
        }
        Ok(())
    }

    /// Unmounts, and waits for the threads to end.
    ///
    /// # Errors
    /// If it is in use.
    pub fn unmount(mut self) -> Result<(), FrontError> {
        self.session.unmount().map_err(FrontError::Mount)?;
        self.join()
    }
}

/// What a thread is left with, and has in the jail of the VMM as well.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// One thread: requests in, replies out, until there are no more.
fn serve(server: &Server, device: &OwnedFd) -> Result<(), FrontError> {
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(FrontError::Capabilities)?;
    let mut worker = Worker::new(server)?;
    let mut request = vec![0; MESSAGE_BYTES_MAX];
    let mut reply = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let length = match rustix::io::read(device.as_fd(), &mut request[..]) {
            Ok(length) => length,
            // ENOENT: the request was withdrawn before it could be read.
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(FrontError::Read(errno)),
        };
        let bytes = request.get(..length).unwrap_or_default();
        let reader = RequestReader::from_bytes(bytes);
        let used = server.handle(&mut worker, reader, ReplyWriter::from_bytes(&mut reply));
        if let Some(reply) = reply.get(..used).filter(|reply| !reply.is_empty()) {
            // ENOENT: the caller has been killed. Whatever it is, the next read will say it too.
            let _ = rustix::io::write(device, reply);
        }
    }
}
