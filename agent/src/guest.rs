//! The guest's init: prepares the machine, connects to the host, serves it, ends with it.
//!
//! Nothing here waits: the host answers the first call the sooner, the less is done before.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::StreamExt;
use husk_protocol::{
    AGENT_PORT, LAUNCH_DEADLINE, POWER_OFF, POWER_PORT, SHARED_DIR, SHARED_TAG, STREAM_PORT,
};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::RebootCommand;
use rustix::time::ClockId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::r#async::transport::Listener;

use crate::arrivals::{Arrivals, Port};
use crate::cgroup::delegate_controllers;
use crate::reaper::{Reaper, clock_ns};
use crate::sandbox::{Config, Sandbox};
use crate::service::Service;
use crate::sys;

/// How long the start took, told in the handshake. CLOCK_BOOTTIME in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// When main began.
    pub started_at_ns: u64,
    /// When the host was connected.
    pub ready_at_ns: u64,
}

/// Why the guest can't go on.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Something is started by mistake outside of a guest.
    #[error("this is a guest's init and runs as process 1 only")]
    NotInit,
    /// A file system that every container needs.
    #[error("cannot mount {kind} on {target}")]
    Mount {
        /// Its type.
        kind: &'static str,
        /// Where.
        target: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The initial root can't be covered.
    #[error("cannot make the initial root one that containers can pivot from")]
    Root(#[source] io::Error),
    /// The limits that the kernel starts with.
    #[error("cannot raise the resource limits")]
    Limits(#[source] io::Error),
    /// The port of the streams.
    #[error("cannot listen on port {STREAM_PORT} for the host's streams")]
    Listen(#[source] io::Error),
    /// The host does not answer.
    #[error("cannot connect to port {AGENT_PORT} of the host")]
    Connect(#[source] io::Error),
    /// The runtime or the service.
    #[error("cannot serve the host")]
    Serve(#[source] io::Error),
}

/// Runs the guest; does not return as process 1.
pub fn main() -> ExitCode {
    let started_at_ns = clock_ns(ClockId::Boottime);
    if std::process::id() != 1 {
        eprintln!("husk-agent: {}", GuestError::NotInit);
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("husk-agent: {panic}");
        reset();
    }));
    match run(started_at_ns) {
        Ok(()) => power_off(),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("husk-agent: {error}{}", cause.unwrap_or_default());
            reset()
        }
    }
}

fn run(started_at_ns: u64) -> Result<(), GuestError> {
    prepare()?;
    SHARE.make()?;
    raise_limits().map_err(GuestError::Limits)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuestError::Serve)?;
    let _context = runtime.enter();
    // Before any socket of ours gets a port of the kernel's choice, and long before a container.
    let arrivals = Arrivals::listen(&Port::Vsock).map_err(GuestError::Listen)?;
    let host = connect_host().map_err(GuestError::Connect)?;
    let times = Times {
        started_at_ns,
        ready_at_ns: clock_ns(ClockId::Boottime),
    };
    let reaper = Reaper::start().map_err(GuestError::Serve)?;
    let config = Config {
        program: PathBuf::from("/proc/self/exe"),
        cgroup_parent: Path::new(CGROUPS).join("pod"),
        arrivals,
        launch_deadline: LAUNCH_DEADLINE,
    };
    let sandbox = Arc::new(Sandbox::new(config, reaper));
    let served = serve(host, Service::new(sandbox, times));
    runtime.block_on(served).map_err(GuestError::Serve)
}

/// Makes the machine, as the kernel leaves it, one that containers can run on.
pub fn prepare() -> Result<(), GuestError> {
    cover_root().map_err(GuestError::Root)?;
    for kernel_mount in &MOUNTS {
        kernel_mount.make()?;
    }
    delegate_controllers(Path::new(CGROUPS));
    if let Err(error) = fs::write(WORKING_SET, WORKING_SET_MS) {
        eprintln!("husk-agent: cannot protect the working set: {error}");
    }
    if let Err(error) = raise_loopback() {
        eprintln!("husk-agent: cannot bring the loopback interface up: {error}");
    }
    Ok(())
}

/// What was used within this time is not thrown out of memory: somebody is killed before. Without
/// it, a guest without memory would read its programs' pages again and again.
const WORKING_SET: &str = "/sys/kernel/mm/lru_gen/min_ttl_ms";
const WORKING_SET_MS: &str = "1000";

/// Serves one connection to its end.
pub async fn serve(connection: OwnedFd, service: Service) -> io::Result<()> {
    // tokio's type for a stream socket; nothing that is done with it depends on the family.
    let stream = UnixStream::from(connection);
    stream.set_nonblocking(true)?;
    let (ended, end) = oneshot::channel();
    let stream = Watched {
        stream: tokio::net::UnixStream::from_std(stream)?,
        ended: Some(ended),
    };
    let one = futures::stream::once(async { Ok::<_, io::Error>(stream) });
    let listener = Listener::new(one.chain(futures::stream::pending()));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener)
        .register_service(husk_protocol::service::create_agent(Arc::new(service)));
    server.start().await.map_err(io::Error::other)?;
    // Dropped without a message is an end as well.
    let _ = end.await;
    Ok(())
}

/// A connection that tells of its end, which ttrpc keeps to itself.
struct Watched {
    stream: tokio::net::UnixStream,
    ended: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.remaining();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let is_over = match &polled {
            Poll::Pending => false,
            Poll::Ready(Ok(())) => before > 0 && buffer.remaining() == before,
            Poll::Ready(Err(_)) => true,
        };
        if is_over {
            // Its drop is what the other side waits for.
            self.ended = None;
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Covers the initial root by a mount of the same tree.
///
/// pivot_root refuses the initial root itself, as nothing lies below it. With the cover, containers
/// pivot as on any other machine, and what they could climb to above their root is the place where
/// the cover was: nothing.
fn cover_root() -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let cover = rustix::mount::open_tree(rustix::fs::CWD, "/", flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&cover, "", rustix::fs::CWD, "/", flags)?;
    rustix::process::fchdir(&cover)?;
    Ok(rustix::process::chroot(".")?)
}

/// One mount of the guest's own.
struct KernelMount {
    kind: &'static str,
    source: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

/// In order. All the guest's own places; containers have theirs.
const MOUNTS: [KernelMount; 9] = [
    KernelMount::new("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
    KernelMount::new("proc", "/proc", PLAIN, None),
    KernelMount::new("sysfs", "/sys", PLAIN, None),
    KernelMount::new("cgroup2", CGROUPS, PLAIN, Some("nsdelegate")),
    KernelMount::new("tmpfs", "/run", NO_DEVICES, Some("mode=0755")),
    KernelMount::new("tmpfs", "/tmp", NO_DEVICES, Some("mode=1777")),
    KernelMount::new(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        Some("mode=0620,gid=5,ptmxmode=0666"),
    ),
    KernelMount::new("mqueue", "/dev/mqueue", PLAIN, None),
    KernelMount::new("tmpfs", "/dev/shm", NO_DEVICES, Some("mode=1777")),
];

/// What the host shares with the pod.
const SHARE: KernelMount = KernelMount {
    source: SHARED_TAG,
    ..KernelMount::new("virtiofs", SHARED_DIR, MsFlags::empty(), None)
};

const CGROUPS: &str = "/sys/fs/cgroup";
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const PLAIN: MsFlags = NO_DEVICES.union(MsFlags::MS_NOEXEC);

impl KernelMount {
    const fn new(
        kind: &'static str,
        target: &'static str,
        flags: MsFlags,
        data: Option<&'static str>,
    ) -> KernelMount {
        KernelMount {
            kind,
            source: kind,
            target,
            flags,
            data,
        }
    }

    fn make(&self) -> Result<(), GuestError> {
        let made = || -> io::Result<()> {
            fs::create_dir_all(self.target)?;
            let (source, kind) = (Some(self.source), Some(self.kind));
            Ok(mount(source, self.target, kind, self.flags, self.data)?)
        };
        made().map_err(|source| GuestError::Mount {
            kind: self.kind,
            target: self.target,
            source,
        })
    }
}

/// The kernel starts process 1 with limits that fit a machine of the nineties, and containers whose
/// spec names none inherit them. These are what container managers start their containers with.
fn raise_limits() -> io::Result<()> {
    let files = Rlimit {
        current: Some(FILES_MAX),
        maximum: Some(FILES_MAX),
    };
    setrlimit(Resource::Nofile, files)?;
    let processes = Rlimit {
        current: None,
        maximum: None,
    };
    Ok(setrlimit(Resource::Nproc, processes)?)
}

/// fs.nr_open as the kernel sets it, the most there may be.
const FILES_MAX: u64 = 1_048_576;

fn raise_loopback() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    sys::raise_loopback(socket.as_fd())
}

fn connect_host() -> io::Result<OwnedFd> {
    let host = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let address = VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT);
    connect(host.as_raw_fd(), &address)?;
    Ok(host)
}

/// Writes everything back and ends the guest cleanly.
pub fn power_off() -> ! {
    rustix::fs::sync();
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/port")
        .and_then(|port| port.write_at(&[POWER_OFF], u64::from(POWER_PORT)));
    if let Err(error) = written {
        eprintln!("husk-agent: cannot write to the power port: {error}");
    }
    end(RebootCommand::PowerOff)
}

/// Ends the guest in a way that the host can tell from a clean end.
fn reset() -> ! {
    end(RebootCommand::Restart)
}

fn end(command: RebootCommand) -> ! {
    let error = rustix::system::reboot(command);
    eprintln!("husk-agent: cannot end the guest: {error:?}");
    // The end of process 1 panics the kernel, which ends the guest by its command line.
    std::process::exit(1)
}
