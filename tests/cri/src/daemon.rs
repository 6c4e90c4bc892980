//! A containerd with its CRI service switched on, beside the machine's own.
//!
//! It has directories of its own, and two images made from the machine's busybox: [`IMAGE`], and one
//! whose command sleeps for ever, which stands for Kubernetes' pause image. Its runtime handlers are
//! `runc` and `husk` with a bridge network, `runc-broken` and `husk-broken` with a network that fails,
//! `runc-blockfile` and `husk-blockfile`, whose snapshotter keeps each root in a file, and
//! `husk-sandboxer`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The image for containers.
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// The image of pods.
const PAUSE_IMAGE: &str = "husk.test/pause:1";

/// Where the network that fails keeps the addresses it has given.
pub const BROKEN_NETWORK_DIR: &str = "/run/husk-cri-broken-ipam";

/// Where CRI keeps its containers.
const NAMESPACE: &str = "k8s.io";

/// Of a root that is kept in a file, and of each layer below it.
const BLOCKFILE_BYTES: u64 = 16 << 20;

/// For containerd to say that it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// The daemon; dropping it ends it. What runs in its pods lives on.
pub struct Daemon {
    child: Child,
    run: PathBuf,
    root: PathBuf,
}

/// A daemon's directories.
struct Places {
    /// Sockets and state, which do not outlive a boot.
    run: PathBuf,
    /// Images and snapshots.
    root: PathBuf,
}

impl Daemon {
    /// Starts the `containerd` of the `PATH`. `name` keeps its directories apart from others'.
    ///
    /// # Errors
    /// If it does not come up, or the machine has no busybox image to give it.
    pub fn start(name: &str) -> Result<Self> {
        let places = Places {
            run: Path::new("/run").join(format!("containerd-{name}")),
            root: Path::new("/var/tmp").join(format!("containerd-{name}")),
        };
        for directory in [&places.run, &places.root] {
            for networks in ["net.d", "broken.d"] {
                fs::create_dir_all(directory.join(networks))?;
            }
        }
        fs::write(places.run.join("config.toml"), places.config())?;
        for (place, network) in [
            ("net.d/10-husk.conflist", places.network()),
            ("broken.d/10-husk.conflist", broken_network()),
        ] {
            fs::write(places.run.join(place), serde_json::to_vec(&network)?)?;
        }
        places.make_scratch()?;
        let images = places.make_images().context("cannot make the images")?;
        let daemon = Self {
            child: spawn(&places.run)?,
            run: places.run,
            root: places.root,
        };
        for image in images {
            daemon.import(&image)?;
        }
        Ok(daemon)
    }

    /// Kills it and starts it again on what it has left.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(&self.run)?;
        Ok(())
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("containerd.sock")
    }

    /// An archive of [`IMAGE`].
    pub fn image(&self) -> PathBuf {
        busybox(&self.root)
    }

    /// The files of its snapshotter `blockfile`, each with a number as its name.
    pub fn blockfiles(&self) -> PathBuf {
        blockfile(&self.root).join("snapshots")
    }

    /// What it has said so far, it and its shims.
    pub fn log(&self) -> PathBuf {
        self.run.join("containerd.log")
    }

    /// Waits for its end, which somebody else brings about.
    ///
    /// # Errors
    /// Those of waiting.
    pub fn wait(&mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }

    fn import(&self, image: &Path) -> Result<()> {
        let socket = self.socket();
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(&socket);
        ctr.args(["--namespace", NAMESPACE, "image", "import"]);
        run(ctr.arg(image))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may be gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs containerd until it says, as systemd would hear it, that it is ready.
fn spawn(directory: &Path) -> Result<Child> {
    let notify = directory.join("ready");
    let _ = fs::remove_file(&notify);
    let ready = UnixDatagram::bind(&notify)?;
    ready.set_read_timeout(Some(READY_DEADLINE))?;
    let log = directory.join("containerd.log");
    let output = File::options().create(true).append(true).open(&log)?;
    let mut child = Command::new("containerd")
        .arg("--config")
        .arg(directory.join("config.toml"))
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("cannot run containerd")?;
    let mut message = [0; 4096];
    loop {
        let Ok(length) = ready.recv(&mut message) else {
            child.kill()?;
            child.wait()?;
            let log = fs::read_to_string(log).unwrap_or_default();
            bail!("containerd is not ready within {READY_DEADLINE:?}:\n{log}");
        };
        let message = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
        if message.contains("READY=1") {
            return Ok(child);
        }
    }
}

fn busybox(root: &Path) -> PathBuf {
    root.join("busybox.tar")
}

fn blockfile(root: &Path) -> PathBuf {
    root.join("blockfile")
}

impl Places {
    fn scratch(&self) -> PathBuf {
        self.root.join("scratch.ext4")
    }

    /// What the lowest layers of the snapshotter `blockfile` begin as.
    fn make_scratch(&self) -> Result<()> {
        let path = self.scratch();
        File::create(&path)?.set_len(BLOCKFILE_BYTES)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path))
    }

    /// Version 2 of the configuration, which containerd 1.x and 2.x read. The former pass over what a
    /// handler's `sandboxer` is.
    fn config(&self) -> String {
        let (run, root) = (self.run.display(), self.root.display());
        let (scratch, blockfile) = (self.scratch(), blockfile(&self.root));
        let (scratch, blockfile) = (scratch.display(), blockfile.display());
        format!(
            r#"version = 2
root = "{root}"
state = "{run}/state"
[grpc]
address = "{run}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
stream_server_address = "127.0.0.1"
stream_server_port = "0"
enable_unprivileged_ports = true
enable_unprivileged_icmp = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{run}/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]
runtime_type = "io.containerd.husk.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-blockfile]
runtime_type = "io.containerd.runc.v2"
snapshotter = "blockfile"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk-blockfile]
runtime_type = "io.containerd.husk.v2"
snapshotter = "blockfile"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-broken]
runtime_type = "io.containerd.runc.v2"
cni_conf_dir = "{run}/broken.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk-broken]
runtime_type = "io.containerd.husk.v2"
cni_conf_dir = "{run}/broken.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk-sandboxer]
runtime_type = "io.containerd.husk.v2"
sandboxer = "shim"
[plugins."io.containerd.snapshotter.v1.blockfile"]
root_path = "{blockfile}"
scratch_file = "{scratch}"
fs_type = "ext4"
mount_options = ["loop"]
"#
        )
    }

    /// A bridge with addresses of both families.
    fn network(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "husk-cri",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "husk-cri0",
                    "isGateway": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": self.run.join("ipam"),
                        "ranges": [
                            [{ "subnet": "10.88.0.0/16" }],
                            [{ "subnet": "fd88::/64" }],
                        ],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        })
    }

    /// Archives of the images.
    fn make_images(&self) -> Result<[PathBuf; 2]> {
        let busybox = busybox(&self.root);
        run(Command::new("ctr")
            .args([OsStr::new("image"), OsStr::new("export")])
            .args([busybox.as_os_str(), OsStr::new(IMAGE)]))?;
        let layout = self.root.join("layout");
        fs::create_dir_all(&layout)?;
        let tar = |option: &str, archive: &Path| {
            let mut tar = Command::new("tar");
            tar.arg("-C").arg(&layout).arg(option).arg(archive);
            tar
        };
        run(&mut tar("-xf", &busybox))?;

        // The form of `docker save`, which is not named by hashes.
        let blob = |described: &Value| -> Result<String> {
            let digest = described["digest"].as_str().context("no digest")?;
            Ok(format!("blobs/{}", digest.replace(':', "/")))
        };
        let read = |path: &str| -> Result<Value> {
            let text = fs::read(layout.join(path)).with_context(|| format!("no {path}"))?;
            Ok(serde_json::from_slice(&text)?)
        };
        let manifest = read(&blob(&read("index.json")?["manifests"][0])?)?;
        let mut config = read(&blob(&manifest["config"])?)?;
        config["config"]["Cmd"] = json!(["sleep", "1000000000"]);
        fs::write(layout.join("pause.json"), serde_json::to_vec(&config)?)?;
        let layers = manifest["layers"].as_array().context("no layers")?;
        let layers: Vec<String> = layers.iter().map(blob).collect::<Result<_>>()?;
        let saved = json!([{
            "Config": "pause.json", "RepoTags": [PAUSE_IMAGE], "Layers": layers,
        }]);
        fs::write(layout.join("manifest.json"), serde_json::to_vec(&saved)?)?;
        let pause = self.root.join("pause.tar");
        run(tar("-cf", &pause)
            .args(["manifest.json", "pause.json"])
            .args(&layers))?;
        Ok([busybox, pause])
    }
}

/// On the same bridge, and with a plugin that sets a kernel parameter which is not there.
fn broken_network() -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "husk-broken",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "husk-cri0",
                "ipam": {
                    "type": "host-local",
                    "dataDir": BROKEN_NETWORK_DIR,
                    "ranges": [[{ "subnet": "10.89.0.0/16" }]],
                },
            },
            { "type": "tuning", "sysctl": { "net.husk.no_such_parameter": "1" } },
        ],
    })
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
