//! What containerd runs this program for, besides the server: `start`, `delete`, `-info`.
//!
//! `start` finds the pod's server or makes one, and prints its address and nothing else: on
//! containerd's side whatever is printed, to either output, is the answer. The server inherits
//! its listening socket as standard input, so that it can be dialled before it has even started.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, bail};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use husk_sandbox::{STATE_DIR_ROOT, monotonic_us};
use serde_json::Value;

use crate::args::Arguments;
use crate::convert::timestamp;
use crate::params::{self, Params};

/// Below [`STATE_DIR_ROOT`]: the servers' sockets, named by hash, since namespaces and ids together
/// may be longer than a socket's path can be.
const SOCKETS_DIR: &str = "s";

/// In the bundle: where containerd looks for the address after its own restart.
const ADDRESS_FILE: &str = "address";

/// The environment variable that names containerd's ttrpc socket.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// What of the OCI runtime specification there is (runtime-spec, features.md). containerd looks here for
/// `rro`, before it promises mounts that are read-only to their depth, and for mapped ids.
const FEATURES: &str = include_str!("features.json");

/// The name under which containerd knows a value of that kind.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What a process that was killed by the machine's end is said to have ended with.
const STATUS_KILLED: u32 = 137;

/// Prints the address of the server of the task's pod, which is started if need be.
pub(crate) fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let began_us = monotonic_us();
    let pod = pod_of(Path::new("."), &arguments.id)?;
    let params =
        Params::read(arguments).context("cannot read containerd's parameters from stdin")?;
    let socket = socket_path(&arguments.namespace, &pod);
    let address = format!("unix://{}", socket.display());
    if pod == arguments.id {
        if let Some(listener) = listen(&socket)? {
            let served = spawn_server(arguments, params.as_ref(), listener, began_us);
            if served.is_err() {
                // The error is about the server; a socket that stays is made anew next time.
                let _ = fs::remove_file(&socket);
            }
            served?;
        }
    } else {
        UnixStream::connect(&socket)
            .with_context(|| format!("the shim of pod {pod:?} does not answer at {socket:?}"))?;
    }
    write_address(&address).with_context(|| format!("cannot write {ADDRESS_FILE:?}"))?;
    let answer = match params {
        Some(_) => params::result(&address).context("cannot encode the answer")?,
        None => address.into_bytes(),
    };
    io::stdout()
        .write_all(&answer)
        .context("cannot print the address")
}

/// Removes what a server that is gone has left, and prints how its task ended. Can be repeated.
pub(crate) fn delete(arguments: &Arguments) -> anyhow::Result<()> {
    let bundle = if arguments.bundle.as_os_str().is_empty() {
        Path::new(".")
    } else {
        arguments.bundle.as_path()
    };
    // A bundle that has lost its config is a pod of its own: nothing else bears its name.
    let pod = pod_of(bundle, &arguments.id).unwrap_or_else(|_| arguments.id.clone());
    let root = Path::new(STATE_DIR_ROOT);
    if pod != arguments.id {
        husk_sandbox::cleanup_container(root, &arguments.namespace, &pod, &arguments.id)?;
    } else {
        husk_sandbox::cleanup(root, &arguments.namespace, &pod)?;
        let socket = socket_path(&arguments.namespace, &pod);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {socket:?}"));
            }
            _ => {}
        }
    }
    let mut response = DeleteResponse::new();
    response.set_exit_status(STATUS_KILLED);
    response.set_exited_at(timestamp(SystemTime::now()));
    print(&response)
}

/// Prints what this runtime is.
pub(crate) fn info() -> anyhow::Result<()> {
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").to_owned();
    let mut info = RuntimeInfo::new();
    info.name = "io.containerd.husk.v2".to_owned();
    info.version = Some(version).into();
    info.features = Some(Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: FEATURES.into(),
        ..Any::default()
    })
    .into();
    print(&info)
}

fn print(message: &impl Message) -> anyhow::Result<()> {
    let bytes = message
        .write_to_bytes()
        .context("cannot encode the answer")?;
    io::stdout()
        .write_all(&bytes)
        .context("cannot print the answer")
}

/// The pod of a task: the sandbox that CRI's annotations name, else the task itself.
fn pod_of(bundle: &Path, id: &str) -> anyhow::Result<String> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        // A pod of the Sandbox API has no spec.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(id.to_owned()),
        read => read.with_context(|| format!("cannot read {path:?}"))?,
    };
    let config: Value =
        serde_json::from_slice(&text).with_context(|| format!("{path:?} is not JSON"))?;
    let annotation = |name: &str| config["annotations"][name].as_str();
    for (kind, sandbox) in [
        (
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri.sandbox-id",
        ),
        (
            "io.kubernetes.cri-o.ContainerType",
            "io.kubernetes.cri-o.SandboxID",
        ),
    ] {
        if annotation(kind) == Some("container")
            && let Some(sandbox) = annotation(sandbox)
        {
            return Ok(sandbox.to_owned());
        }
    }
    Ok(id.to_owned())
}

pub(crate) fn socket_path(namespace: &str, pod: &str) -> PathBuf {
    let name = fnv1a_128(&[namespace.as_bytes(), b"/", pod.as_bytes()].concat());
    Path::new(STATE_DIR_ROOT)
        .join(SOCKETS_DIR)
        .join(format!("{name:032x}"))
}

/// FNV-1a, 128 bits. Names sockets; nothing is trusted because of it.
fn fnv1a_128(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
    })
}

/// A listener at `socket`; `None` if a server listens there already.
fn listen(socket: &Path) -> anyhow::Result<Option<UnixListener>> {
    let directory = socket.parent().context("the socket has no directory")?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot make {directory:?}"))?;
    let bind = || UnixListener::bind(socket);
    match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Ok(None);
            }
            // Left by a server that was killed.
            fs::remove_file(socket).with_context(|| format!("cannot remove {socket:?}"))?;
            bind()
        }
        other => other,
    }
    .map(Some)
    .with_context(|| format!("cannot listen at {socket:?}"))
}

/// Runs this program as the pod's server, in a process group of its own.
fn spawn_server(
    arguments: &Arguments,
    params: Option<&Params>,
    listener: UnixListener,
    began_us: u64,
) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(&program);
    command
        .args(["-namespace", &arguments.namespace, "-id", &arguments.id])
        .args(["-address", &arguments.address])
        .args(["-began-us", &began_us.to_string()])
        .arg("-serve")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    if arguments.debug || params.is_some_and(|params| params.debug) {
        command.arg("-debug");
    }
    if let Some(params) = params.filter(|params| !params.ttrpc_address.is_empty()) {
        command.env(TTRPC_ADDRESS, &params.ttrpc_address);
    }
    let server = command
        .spawn()
        .with_context(|| format!("cannot run {program:?}"))?;
    if server.id() == 0 {
        bail!("the server has no pid");
    }
    Ok(())
}

/// The file appears whole or not at all.
fn write_address(address: &str) -> io::Result<()> {
    let partial = format!(".{ADDRESS_FILE}");
    fs::write(&partial, address)?;
    fs::rename(&partial, ADDRESS_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_is_its_own_pod_unless_annotations_name_another() {
        let bundle = tempfile::tempdir().unwrap();
        let config = bundle.path().join("config.json");
        assert_eq!(pod_of(bundle.path(), "c1").unwrap(), "c1");
        for (text, pod) in [
            ("{}", "c1"),
            (
                r#"{"annotations": {"io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "c1"}}"#,
                "c1",
            ),
            (
                r#"{"annotations": {"io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "p1"}}"#,
                "p1",
            ),
            (
                r#"{"annotations": {"io.kubernetes.cri-o.ContainerType": "container",
                "io.kubernetes.cri-o.SandboxID": "p2"}}"#,
                "p2",
            ),
            (r#"{"annotations": [1, 2]}"#, "c1"),
        ] {
            fs::write(&config, text).unwrap();
            assert_eq!(pod_of(bundle.path(), "c1").unwrap(), pod, "{text}");
        }
        fs::write(&config, "{").unwrap();
        assert!(pod_of(bundle.path(), "c1").is_err());
    }

    #[test]
    fn features_are_the_specifications() {
        let features: oci_spec::runtime::Features = serde_json::from_str(FEATURES).unwrap();
        let options = features.mount_options().as_ref().unwrap();
        assert!(options.is_sorted(), "{options:?}");
        assert!(options.iter().any(|option| option == "rro"));
        let linux = features.linux().as_ref().unwrap();
        let extensions = linux.mount_extensions().as_ref().unwrap();
        let idmap = extensions.idmap().as_ref().unwrap();
        assert_eq!(idmap.enabled(), &Some(false));
    }

    #[test]
    fn socket_names_are_short_and_differ() {
        let long = "x".repeat(76);
        let path = socket_path(&long, &long);
        assert!(path.as_os_str().len() < 108, "{path:?}");
        assert_ne!(socket_path("a", "bc"), socket_path("ab", "c"));
        // The published value of the empty string and of "a".
        assert_eq!(fnv1a_128(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a_128(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn stale_socket_is_replaced_and_a_live_one_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s").join("socket");
        let first = listen(&socket).unwrap().unwrap();
        assert!(listen(&socket).unwrap().is_none());
        drop(first);
        assert!(listen(&socket).unwrap().is_some());
    }
}
