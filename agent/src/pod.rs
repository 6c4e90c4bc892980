//! What the containers of a pod share beside the guest's own namespaces: volumes in memory, kernel
//! parameters, and a PID namespace if they want one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_protocol::POD_VOLUMES_DIR;
use husk_protocol::messages::{MemoryVolume, PreparePodRequest};
use nix::mount::{MsFlags, mount};
use tokio::sync::OnceCell;

use crate::launch::{Deadline, LaunchError, launch};
use crate::oci::Process;
use crate::plan::{Place, Plan};
use crate::reaper::Reaper;
use crate::stdio::{StdioError, Streams};

/// Most volumes of one request.
const VOLUMES_MAX: usize = 1024;

/// What the OOM killer thinks of process 1 of all containers: what Kubernetes gives the like.
const PAUSE_OOM_SCORE_ADJ: i32 = -998;

/// Why the pod can't have what its containers are to share.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// More than anybody needs.
    #[error("a request can't name more than {VOLUMES_MAX} volumes")]
    TooManyVolumes,
    /// A volume.
    #[error("cannot make the volume {path}")]
    Volume {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that is none.
    #[error("{0:?} is not the name of a kernel parameter")]
    InvalidSysctl(String),
    /// A kernel parameter.
    #[error("cannot set the kernel parameter {name} to {value:?}")]
    Sysctl {
        /// Its name.
        name: String,
        /// What it was to be.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// The first process of a PID namespace has no streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The first process of a PID namespace.
    #[error("cannot make a PID namespace to share")]
    Pause(#[from] LaunchError),
}

/// What is shared.
#[derive(Debug, Default)]
pub struct Pod {
    /// The pid of process 1 of the shared PID namespace.
    pause: OnceCell<i32>,
}

impl Pod {
    /// Makes what is asked for and not there. Returns the pid of process 1 of the shared PID namespace
    /// if that is asked for.
    ///
    /// # Errors
    /// [`PodError`]; what was made before stays.
    pub async fn prepare(
        &self,
        request: &PreparePodRequest,
        program: &Path,
        reaper: &Arc<Reaper>,
        deadline: Deadline,
    ) -> Result<Option<i32>, PodError> {
        if request.volumes.len() > VOLUMES_MAX {
            return Err(PodError::TooManyVolumes);
        }
        for volume in &request.volumes {
            let path = Path::new(POD_VOLUMES_DIR).join(volume.id.to_string());
            make_volume(&path, volume).map_err(|source| PodError::Volume { path, source })?;
        }
        for (name, value) in &request.sysctls {
            let path = sysctl_path(name)?;
            fs::write(path, value).map_err(|source| PodError::Sysctl {
                name: name.clone(),
                value: value.clone(),
                source,
            })?;
        }
        if !request.shares_pids {
            return Ok(None);
        }
        let pause = || launch_pause(program, reaper, deadline);
        Ok(Some(*self.pause.get_or_try_init(pause).await?))
    }
}

/// Mounts a volume, if it is not there yet.
fn make_volume(path: &Path, volume: &MemoryVolume) -> io::Result<()> {
    fs::create_dir_all(POD_VOLUMES_DIR)?;
    match fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    }
    let MemoryVolume { mode, uid, gid, .. } = volume;
    let options = format!(
        "mode={:o},uid={uid},gid={gid},size={}",
        mode & PERMISSIONS,
        volume.size_bytes
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounted = mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    );
    if mounted.is_err() {
        // Or the next one would be taken for made.
        let _ = fs::remove_dir(path);
    }
    Ok(mounted?)
}

/// The part of a mode that says who may do what.
const PERMISSIONS: u32 = 0o7777;

/// `net.ipv4.ip_forward` or, for names with dots in their parts, `net/ipv4/conf/eth0.1/forwarding`.
fn sysctl_path(name: &str) -> Result<PathBuf, PodError> {
    let separator = name.find(['.', '/']).and_then(|at| name.get(at..=at));
    let parts: Vec<&str> = match separator {
        Some("/") => name.split('/').collect(),
        _ => name.split('.').collect(),
    };
    if parts.len() < 2
        || parts.iter().any(|part| matches!(*part, "" | "." | ".."))
        || parts
            .iter()
            .any(|part| part.contains('/') || part.contains('\0'))
    {
        return Err(PodError::InvalidSysctl(name.to_owned()));
    }
    Ok(parts
        .iter()
        .fold(PathBuf::from("/proc/sys"), |path, part| path.join(part)))
}

/// Starts process 1 of a new PID namespace.
async fn launch_pause(
    program: &Path,
    reaper: &Arc<Reaper>,
    deadline: Deadline,
) -> Result<i32, PodError> {
    let plan = Plan {
        process: Process {
            oom_score_adj: Some(PAUSE_OOM_SCORE_ADJ),
            ..Process::default()
        },
        seccomp: None,
        personality: None,
        cgroup: None,
        place: Place::Pause,
        root_disk: None,
        start_hooks: None,
    };
    // Without ports they are all /dev/null.
    let streams = Streams::none()?;
    let launched = launch(program, reaper, &plan, streams, deadline).await?;
    let pid = launched.pid;
    launched.start(deadline).await?;
    Ok(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "",
            "x",
            "..",
            "net.",
            "net/../../etc/passwd",
            "net..x",
            "a.b/c",
            "a/./b",
        ] {
            assert!(sysctl_path(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn names_are_found_in_both_forms() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.1/mtu",
                "/proc/sys/net/ipv4/conf/eth0.1/mtu",
            ),
        ] {
            assert_eq!(sysctl_path(name).unwrap(), Path::new(path));
        }
    }
}
