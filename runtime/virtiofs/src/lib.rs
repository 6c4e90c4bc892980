//! FUSE server over a directory tree: bytes in, bytes out.
//!
//! A [`Server`] answers requests of the FUSE protocol, as the Linux kernel sends them over
//! virtio-fs or `/dev/fuse`, from a directory of the host, the *share*. It knows neither transport:
//! its user hands it a request and a place for the reply ([`RequestReader`], [`ReplyWriter`]),
//! on as many threads at once as it likes, each with its own [`Worker`].
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use husk_virtiofs::{CachePolicy, Options, ReplyWriter, RequestReader, Server, Worker};
//! use rustix::fs::{CWD, Mode, OFlags, openat};
//!
//! let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
//! let root = openat(CWD, "/srv/share", directory, Mode::empty())?;
//! let descriptors = openat(CWD, "/proc/self/fd", directory, Mode::empty())?;
//! let server = Server::new(root, Options::single(descriptors, CachePolicy::SHARED))?;
//!
//! // On each thread:
//! let mut worker = Worker::new(&server)?;
//! let (request, mut reply) = (vec![0; 64], vec![0; 256]);
//! let request = RequestReader::from_bytes(&request);
//! let used = server.handle(&mut worker, request, ReplyWriter::from_bytes(&mut reply));
//! # let _ = used;
//! # Ok(())
//! # }
//! ```
//!
//! # What is decided by whom
//!
//! The guest kernel checks permissions (virtio-fs always mounts with `default_permissions`), keeps
//! locks, resolves paths, and runs device nodes, FIFOs and sockets. The server does what it is
//! asked with the power of its process: it is the jail around the process that keeps a guest whose
//! kernel is hostile inside the share, together with three rules here:
//!
//! * A name is one component: no `/`, no `.`, no `..`. It is looked up with `openat2` beneath its
//!   directory, and symbolic links are never followed. There is no request that walks up.
//! * Only regular files and directories are ever opened, all else is held by `O_PATH`.
//! * Mounts below the share are entered; each is shown as a mount of its own.
//!
//! *Identity.* What a request creates belongs to its caller from the first moment: the thread takes
//! on the caller's uid and gid as file system identity, and its umask, and keeps its capabilities.
//! Set-group-id directories, default ACLs and quotas therefore work as on the host. Set-user-id and
//! set-group-id bits and file capabilities are cleared by the host kernel, for which the thread
//! drops `CAP_FSETID` when the guest kernel says that the caller does not have it.
//!
//! *Locks* (`flock`, POSIX and OFD) are the guest kernel's own: POSIX_LOCKS and FLOCK_LOCKS are not
//! negotiated. All processes of the pod see them, none outside does. No request ever waits for
//! another, so interrupts have nothing to interrupt and are ignored.
//!
//! # What a thread must be able to do
//!
//! [`Worker::new`] calls `unshare(CLONE_FS)` and `fchdir`, and `prctl(PR_SET_SECUREBITS)` if the
//! thread has `CAP_SETPCAP`: make workers before the seccomp filter is on.
//! [`Server::handle`] calls `openat2`, `openat`, `close`, `statx`, `fstat`, `fstatfs`, `pread*`,
//! `preadv`, `pwritev2`, `getdents64`, `lseek`, `readlinkat`, `mkdirat`, `mknodat`, `symlinkat`,
//! `linkat`, `unlinkat`, `renameat2`, `ftruncate`, `fallocate`, `copy_file_range`, `fsync`,
//! `fdatasync`, `syncfs`, `utimensat`, `fchmodat`, `fchownat`, `getxattr`, `setxattr`, `listxattr`,
//! `removexattr`, `umask`, `setfsuid`, `setfsgid`, `capget`, `capset`, `clock_gettime`, and
//! `ioctl(FS_IOC_GETFLAGS)`.

mod abi;
mod contents;
mod counters;
#[cfg(feature = "fuser")]
pub mod front;
mod handles;
mod inodes;
mod memory;
mod ops;
mod options;
mod request;
mod server;
mod sys;
mod worker;

pub use counters::Counters;
pub use memory::{ReplyWriter, RequestReader};
pub use options::{CachePolicy, Options};
pub use server::{Server, ServerError};
pub use worker::{Worker, WorkerError};
