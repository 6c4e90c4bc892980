//! Containers without a guest: the launch stage, streams and reaping, run on this machine.
//!
//! As process 1 of a bare kernel (an initrd of this program as /init, the agent and a busybox, each
//! at its place) it prepares the machine as the agent does, and tests what only a guest has.
//!
//! Needs root, a cgroup v2 mount (controllers or not) and a statically linked busybox. Where one of
//! them is missing each test says so loudly and ends.

use std::fs;
use std::future::Future;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use husk_agent::arrivals::{Arrivals, Port};
use husk_agent::reaper::Reaper;
use husk_agent::sandbox::{Config, Sandbox, SandboxError};
use husk_protocol::messages::{RootDisk, Stdio};
use husk_protocol::{LAUNCH_DEADLINE, STREAM_PORT, STREAM_SOURCE_MIN};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

#[path = "containers/basics.rs"]
mod basics;
#[path = "containers/disks.rs"]
mod disks;
#[path = "containers/execs.rs"]
mod execs;
#[path = "containers/late.rs"]
mod late;
#[path = "containers/limits.rs"]
mod limits;
#[path = "containers/spec.rs"]
mod spec;

const DEADLINE: Duration = Duration::from_secs(60);

/// For a launch that is to be too late.
const IMPATIENT: Duration = Duration::from_millis(300);

/// One for all tests of this program, as there is one reaper in a process.
struct Fixture {
    runtime: Runtime,
    sandbox: Sandbox,
    /// Gives a launch very little time.
    impatient: Sandbox,
    cgroups: PathBuf,
    directory: PathBuf,
}

fn fixture() -> Option<&'static Fixture> {
    static FIXTURE: OnceLock<Option<Fixture>> = OnceLock::new();
    FIXTURE
        .get_or_init(|| match make_fixture() {
            Ok(fixture) => Some(fixture),
            Err(error) => {
                eprintln!("SKIPPED: containers can't be tested here: {error:#}");
                None
            }
        })
        .as_ref()
}

fn make_fixture() -> Result<Fixture> {
    if is_guest() {
        husk_agent::guest::prepare()?;
    }
    anyhow::ensure!(rustix::process::geteuid().is_root(), "not root");
    let cgroups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(Path::new)
        .into_iter()
        .find(|path| path.join("cgroup.controllers").exists())
        .context("there is no cgroup v2")?;
    let directory = tempfile::tempdir()?.keep();
    make_rootfs(&directory.join("rootfs"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let _context = runtime.enter();
    let cgroups = cgroups.join(format!("husk-test-{}", std::process::id()));
    let config = Config {
        program: env!("CARGO_BIN_EXE_husk-agent").into(),
        cgroup_parent: cgroups.clone(),
        launch_deadline: LAUNCH_DEADLINE,
        arrivals: Arrivals::listen(&Port::Directory(directory.clone()))?,
    };
    let reaper = Reaper::start()?;
    let impatient = Config {
        launch_deadline: IMPATIENT,
        ..config.clone()
    };
    let impatient = Sandbox::new(impatient, Arc::clone(&reaper));
    let sandbox = Sandbox::new(config, reaper);
    drop(_context);
    Ok(Fixture {
        runtime,
        sandbox,
        impatient,
        cgroups,
        directory,
    })
}

/// Whether this is the init of a guest, with every controller at hand.
fn is_guest() -> bool {
    std::process::id() == 1
}

fn make_rootfs(root: &Path) -> Result<()> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("there is no busybox")?;
    for name in ["bin", "proc", "dev", "sys", "tmp", "etc"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in [
        "sh",
        "cat",
        "echo",
        "sleep",
        "id",
        "hostname",
        "stty",
        "ls",
        "touch",
        "head",
        "grep",
        "sha256sum",
        "ps",
        "kill",
        "true",
        "pwd",
        "umask",
        "wc",
        "tr",
        "mount",
        "tty",
        "readlink",
        "uname",
    ] {
        let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(name));
    }
    fs::write(root.join("etc/plain"), "not a program\n")?;
    Ok(())
}

/// A container under test.
struct Container {
    fixture: &'static Fixture,
    id: String,
    /// What its root is on, if that is a disk.
    root: Option<RootDisk>,
}

/// The host's side of a process's streams.
struct Streams {
    request: Stdio,
    directory: PathBuf,
}

impl Fixture {
    fn run<T>(&'static self, test: impl Future<Output = Result<T>>) -> T {
        self.runtime
            .block_on(async { tokio::time::timeout(DEADLINE, test).await })
            .expect("the test is over in time")
            .expect("the test succeeds")
    }

    fn container(&'static self, id: &str) -> Container {
        Container {
            fixture: self,
            id: id.to_owned(),
            root: None,
        }
    }

    fn streams(&self) -> Streams {
        static PORT: AtomicU32 = AtomicU32::new(STREAM_SOURCE_MIN);
        let port = || PORT.fetch_add(1, Ordering::Relaxed);
        Streams {
            request: Stdio {
                stdin: port(),
                stdout: port(),
                stderr: port(),
                ..Stdio::default()
            },
            directory: self.directory.clone(),
        }
    }

    fn spec(&self, args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": self.directory.join("rootfs")},
            "process": process(args),
            "hostname": "tested",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"},
                    {"type": "uts"}, {"type": "cgroup"}, {"type": "network"}],
                "maskedPaths": ["/proc/version", "/proc/acpi", "/proc/no-such-file"],
                "readonlyPaths": ["/proc/sys"]
            }
        })
    }
}

fn process(args: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_DAC_OVERRIDE",
    ];
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": true,
        "capabilities": {"bounding": capabilities, "effective": capabilities,
            "permitted": capabilities},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024}]
    })
}

impl Streams {
    /// Connects as the host does: the peer's port says which stream it is.
    fn connect(&self, source: u32) -> Result<UnixStream> {
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let place = |port: u32| self.directory.join(port.to_string());
        bind(socket.as_raw_fd(), &UnixAddr::new(&place(source))?)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&place(STREAM_PORT))?)?;
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(UnixStream::from_std(stream)?)
    }

    /// Sends the input, reads both outputs to their ends.
    async fn exchange(&self, input: &[u8]) -> Result<(Vec<u8>, Vec<u8>)> {
        let mut stdin = self.connect(self.request.stdin)?;
        let mut stdout = self.connect(self.request.stdout)?;
        let mut stderr = self.connect(self.request.stderr)?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        tokio::try_join!(
            async {
                // A process need not read what it is given.
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
                Ok(())
            },
            stdout.read_to_end(&mut out),
            stderr.read_to_end(&mut err),
        )?;
        Ok((out, err))
    }
}

impl Container {
    async fn create(&self, spec: &Value, stdio: &Stdio) -> Result<i32, SandboxError> {
        let spec = spec.to_string();
        self.fixture
            .sandbox
            .create(
                &self.id,
                spec.as_bytes(),
                "/bundle",
                self.root.as_ref(),
                stdio,
            )
            .await
    }

    async fn start(&self) -> Result<()> {
        self.fixture.sandbox.start(&self.id, "").await?;
        Ok(())
    }

    async fn wait(&self) -> Result<u32> {
        Ok(self.fixture.sandbox.wait(&self.id, "").await?.status)
    }

    async fn delete(&self) -> Result<()> {
        Ok(self.fixture.sandbox.delete(&self.id).await?)
    }

    /// Runs to the end: status, output, errors.
    async fn run(&self, spec: &Value, input: &[u8]) -> Result<(u32, String, String)> {
        let streams = self.fixture.streams();
        self.create(spec, &streams.request).await?;
        self.start().await?;
        let (out, err) = streams.exchange(input).await?;
        let status = self.wait().await?;
        self.delete().await?;
        Ok((status, String::from_utf8(out)?, String::from_utf8(err)?))
    }

    /// Starts a container that lives until it is killed.
    async fn sleep(&self) -> Result<()> {
        self.create(&self.fixture.spec(&["sleep", "1000"]), &Stdio::default())
            .await?;
        self.start().await
    }

    async fn end(&self) -> Result<u32> {
        self.fixture.sandbox.signal(&self.id, "", 9, true)?;
        let status = self.wait().await?;
        self.delete().await?;
        Ok(status)
    }

    async fn exec(&self, exec_id: &str, process: &Value, input: &[u8]) -> Result<(u32, String)> {
        let streams = self.fixture.streams();
        let sandbox = &self.fixture.sandbox;
        let text = process.to_string();
        sandbox.add_process(&self.id, exec_id, text.as_bytes(), &streams.request)?;
        sandbox.start(&self.id, exec_id).await?;
        let (out, _) = streams.exchange(input).await?;
        let exit = sandbox.wait(&self.id, exec_id).await?;
        sandbox.delete_process(&self.id, exec_id)?;
        Ok((exit.status, String::from_utf8(out)?))
    }
}
