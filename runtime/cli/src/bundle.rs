//! What to run: a root file system with our default spec, or an OCI bundle with its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use husk_sandbox::oci::{Process, Spec};
use serde_json::{Value, json};

use crate::run::Arguments;
use crate::user::{self, User};

/// A container to run.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) directory: PathBuf,
    pub(crate) spec: Spec,
}

impl Bundle {
    /// Reads the directory and applies what the command line says.
    pub(crate) fn read(arguments: &Arguments, has_terminal: bool) -> Result<Self> {
        let directory = fs::canonicalize(&arguments.source)
            .with_context(|| format!("cannot find {:?}", arguments.source))?;
        if !directory.is_dir() {
            bail!("{directory:?} is no directory: expected a root file system or an OCI bundle");
        }
        let config = directory.join("config.json");
        let mut spec = match fs::read(&config) {
            Ok(bytes) => husk_sandbox::parse_spec(&bytes)
                .with_context(|| format!("cannot understand {config:?}"))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                default_spec(&directory, &arguments.id())?
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {config:?}")),
        };
        apply(&mut spec, &directory, arguments, has_terminal)?;
        Ok(Self { directory, spec })
    }
}

/// Applies the command line to a spec.
fn apply(spec: &mut Spec, bundle: &Path, arguments: &Arguments, has_terminal: bool) -> Result<()> {
    let root = spec
        .root_mut()
        .as_mut()
        .context("config.json has no root")?;
    if arguments.read_only {
        root.set_readonly(Some(true));
    }
    let rootfs = bundle.join(root.path());
    let process = spec
        .process_mut()
        .as_mut()
        .context("config.json has no process")?;
    process.set_terminal(Some(has_terminal));
    if !arguments.command.is_empty() {
        process.set_args(Some(arguments.command.clone()));
    }
    if let Some(cwd) = &arguments.cwd {
        process.set_cwd(cwd.clone());
    }
    let user = match &arguments.user {
        Some(wanted) => Some(user::look_up(wanted, &rootfs)?),
        None => None,
    };
    if let Some(user) = &user {
        set_user(process, user);
    }
    let terminal = std::env::var("TERM").ok().filter(|_| has_terminal);
    let home = user.and_then(|user| user.home);
    let mut env = process.env().clone().unwrap_or_default();
    if let Some(term) = terminal {
        set_variable(&mut env, &format!("TERM={term}"));
    }
    if let Some(home) = home {
        set_variable(&mut env, &format!("HOME={home}"));
    }
    for variable in &arguments.env {
        // As docker and podman do: without a value it is the caller's.
        match (variable.contains('='), std::env::var(variable)) {
            (true, _) => set_variable(&mut env, variable),
            (false, Ok(value)) => set_variable(&mut env, &format!("{variable}={value}")),
            (false, Err(_)) => {}
        }
    }
    process.set_env(Some(env));
    Ok(())
}

fn set_user(process: &mut Process, user: &User) {
    let to = process.user_mut();
    to.set_uid(user.uid).set_gid(user.gid);
    to.set_additional_gids(Some(user.additional_gids.clone()));
}

/// Sets `NAME=value`, replacing what there is of that name.
fn set_variable(env: &mut Vec<String>, variable: &str) {
    let name = variable.split('=').next().unwrap_or_default();
    env.retain(|set| set.split('=').next() != Some(name));
    env.push(variable.to_owned());
}

/// The spec for a root file system without one: what a container gets from other tools that make up
/// a spec, with all of their walls inside the guest.
fn default_spec(rootfs: &Path, hostname: &str) -> Result<Spec> {
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": ["/bin/sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": rootfs, "readonly": false },
        "hostname": hostname,
        "mounts": default_mounts(),
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" },
            ],
            "resources": { "devices": default_device_rules() },
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/proc/scsi", "/sys/devices/virtual/powercap",
                "/sys/firmware",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    });
    serde_json::from_value(spec).context("the default spec is malformed")
}

fn default_mounts() -> Value {
    json!([
        { "destination": "/proc", "type": "proc", "source": "proc",
          "options": ["nosuid", "noexec", "nodev"] },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
          "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
          "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
        { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
          "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
        { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
          "options": ["nosuid", "noexec", "nodev"] },
        { "destination": "/sys", "type": "sysfs", "source": "sysfs",
          "options": ["nosuid", "noexec", "nodev", "ro"] },
        { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
          "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        { "destination": "/run", "type": "tmpfs", "source": "tmpfs",
          "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
    ])
}

/// Everything is denied but making nodes, and the devices that every container has.
fn default_device_rules() -> Value {
    let allow = |kind: &str, major: Option<u32>, minor: Option<u32>, access: &str| {
        let mut rule = json!({ "allow": true, "type": kind, "access": access });
        if let Some(major) = major {
            rule["major"] = json!(major);
        }
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rule
    };
    json!([
        { "allow": false, "access": "rwm" },
        allow("c", None, None, "m"),
        allow("b", None, None, "m"),
        // null, zero, full, random, urandom
        allow("c", Some(1), Some(3), "rwm"),
        allow("c", Some(1), Some(5), "rwm"),
        allow("c", Some(1), Some(7), "rwm"),
        allow("c", Some(1), Some(8), "rwm"),
        allow("c", Some(1), Some(9), "rwm"),
        // tty, console, ptmx, the terminals behind it
        allow("c", Some(5), Some(0), "rwm"),
        allow("c", Some(5), Some(1), "rwm"),
        allow("c", Some(5), Some(2), "rwm"),
        allow("c", Some(136), None, "rwm"),
    ])
}

/// What containerd gives by default.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn read(directory: &Path, line: &[&str]) -> Result<Bundle> {
        let directory = directory.to_str().unwrap();
        let arguments = Arguments::parse_for_test(&[&["husk", directory], line].concat());
        Bundle::read(&arguments, false)
    }

    #[test]
    fn what_is_no_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(read(&file, &[]).is_err());
        assert!(read(&directory.path().join("none"), &[]).is_err());
    }

    #[test]
    fn garbled_config_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), "{").unwrap();
        let message = read(directory.path(), &[]).unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
    }

    #[test]
    fn command_line_wins_over_the_spec() {
        let directory = tempfile::tempdir().unwrap();
        let line = [
            "--user", "5:6", "--cwd", "/tmp", "--env", "PATH=/x", "--", "ls", "-l",
        ];
        let options = [&["--read-only"], &line[..]].concat();
        let spec = read_reordered(directory.path(), &options);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["ls", "-l"]);
        assert_eq!(process.cwd(), Path::new("/tmp"));
        assert_eq!(process.user().uid(), 5);
        assert_eq!(process.user().gid(), 6);
        assert_eq!(process.env().as_ref().unwrap(), &["PATH=/x"]);
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    }

    /// Options stand before the directory, the command behind it.
    fn read_reordered(directory: &Path, options: &[&str]) -> Spec {
        let split = options.iter().position(|&option| option == "--").unwrap();
        let (options, command) = options.split_at(split);
        let line = [&["husk"], options, &[directory.to_str().unwrap()], command].concat();
        let arguments = Arguments::parse_for_test(&line);
        Bundle::read(&arguments, false).unwrap().spec
    }
}
