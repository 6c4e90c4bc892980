//! A container's cgroup (version 2): limits, figures, freezing, killing.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use crate::devices;
use crate::oci::{BlockIo, Cpu, Memory, Resources, Throttle};

/// How long a cgroup may take to freeze, thaw or become empty.
const SETTLE_DEADLINE: Duration = Duration::from_secs(10);

/// Longest file of figures.
const FILE_BYTES_MAX: usize = 64 * 1024;

/// Deepest nesting of cgroups that is walked.
const DEPTH_MAX: usize = 32;

/// Why a cgroup can't be worked on.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It can't be made.
    #[error("cannot make the cgroup {path}")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It can't be removed.
    #[error("cannot remove the cgroup {path}")]
    Remove {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A limit is refused by the kernel.
    #[error("cannot set {file} to {value:?}")]
    Write {
        /// Which file.
        file: String,
        /// To what.
        value: String,
        /// Why.
        source: io::Error,
    },
    /// A file can't be read.
    #[error("cannot read {file}")]
    Read {
        /// Which file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// A limit that is none.
    #[error("linux.resources: {0}")]
    Invalid(String),
    /// The device filter can't be set.
    #[error("cannot set the device filter")]
    Devices(#[source] io::Error),
    /// It does not come to the state that was asked for.
    #[error("the cgroup did not become {state} within {SETTLE_DEADLINE:?}")]
    Unsettled {
        /// The state.
        state: &'static str,
    },
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup below a parent, with all the controllers that the parent may give.
    pub fn create(parent: &Path, name: &str) -> Result<Cgroup, CgroupError> {
        let path = parent.join(name);
        let failed = |source| CgroupError::Create {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(parent).map_err(failed)?;
        delegate_controllers(parent);
        match fs::create_dir(&path) {
            Ok(()) => {}
            // Left by a container of that name whose removal failed half-way.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(Cgroup { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets limits; those that are absent stay as they are.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        for (file, value) in settings(resources)? {
            match self.write(&file, &value) {
                // A guest without swap has no limit of it, and needs none.
                Err(CgroupError::Write { source, .. })
                    if file == "memory.swap.max" && source.kind() == ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Confines the use of devices to what the rules allow.
    pub fn confine_devices(&self, resources: &Resources) -> Result<(), CgroupError> {
        let program = devices::compile(&resources.devices)
            .map_err(|error| CgroupError::Invalid(error.to_string()))?;
        devices::attach(&self.path, &program).map_err(CgroupError::Devices)
    }

    /// Kills every process in it and below it.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Stops every process, or lets them go on; returns once that is so.
    pub async fn freeze(&self, is_wanted: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if is_wanted { "1" } else { "0" })?;
        let state = if is_wanted { "frozen" } else { "thawed" };
        self.settle("frozen", u64::from(is_wanted), state).await
    }

    /// Returns once no process is in it or below it.
    pub async fn empty(&self) -> Result<(), CgroupError> {
        self.settle("populated", 0, "empty").await
    }

    async fn settle(
        &self,
        key: &'static str,
        wanted: u64,
        state: &'static str,
    ) -> Result<(), CgroupError> {
        let settled = self.watch("cgroup.events", key, |value| value == wanted);
        match tokio::time::timeout(SETTLE_DEADLINE, settled).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(CgroupError::Unsettled { state }),
        }
    }

    /// Returns once the count of OOM kills is above `seen`.
    pub async fn oom_kills_above(&self, seen: u64) -> Result<u64, CgroupError> {
        self.watch("memory.events", "oom_kill", |kills| kills > seen)
            .await
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let failed = |source| CgroupError::Read {
            file: "memory.events".to_owned(),
            source,
        };
        let open = File::open(self.path.join("memory.events")).map_err(failed)?;
        read_key(&open.into(), "oom_kill").map_err(failed)
    }

    /// Returns a value of a flat-keyed events file once it is as wanted; the kernel tells of
    /// every change.
    async fn watch(
        &self,
        file: &str,
        key: &str,
        is_wanted: impl Fn(u64) -> bool,
    ) -> Result<u64, CgroupError> {
        let failed = |source| CgroupError::Read {
            file: file.to_owned(),
            source,
        };
        let open = File::open(self.path.join(file)).map_err(failed)?;
        let interest = Interest::PRIORITY | Interest::ERROR;
        let events = crate::sys::register(open.into(), interest).map_err(failed)?;
        loop {
            let value = read_key(events.get_ref(), key).map_err(failed)?;
            if is_wanted(value) {
                return Ok(value);
            }
            events.ready(interest).await.map_err(failed)?.clear_ready();
        }
    }

    /// Pids of all processes in it and below it, as the agent sees them.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        self.visit(&self.path, 0, &mut |directory| {
            let text = match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => text,
                // Removed in between, or a threaded one, whose processes its parent lists.
                Err(_) if directory != self.path => return Ok(()),
                Err(source) => {
                    let file = "cgroup.procs".to_owned();
                    return Err(CgroupError::Read { file, source });
                }
            };
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            Ok(())
        })?;
        pids.sort_unstable();
        Ok(pids)
    }

    /// The files that hold figures, by name.
    pub fn figures(&self) -> HashMap<String, String> {
        let is_wanted = |name: &str| {
            FIGURES.contains(&name) || (name.starts_with("hugetlb.") && !name.contains("rsvd"))
        };
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_wanted(name))
            .filter_map(|name| {
                let mut text = fs::read_to_string(self.path.join(&name)).ok()?;
                text.truncate(FILE_BYTES_MAX);
                Some((name, text))
            })
            .collect()
    }

    /// Removes it with all below it. Its processes must have ended.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut directories = Vec::new();
        self.visit(&self.path, 0, &mut |directory| {
            directories.push(directory.to_owned());
            Ok(())
        })?;
        for path in directories.into_iter().rev() {
            match fs::remove_dir(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(source) => return Err(CgroupError::Remove { path, source }),
            }
        }
        Ok(())
    }

    /// Calls `act` for a directory and those below, parents first.
    fn visit(
        &self,
        directory: &Path,
        depth: usize,
        act: &mut impl FnMut(&Path) -> Result<(), CgroupError>,
    ) -> Result<(), CgroupError> {
        act(directory)?;
        if depth == DEPTH_MAX {
            return Ok(());
        }
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.visit(&entry.path(), depth + 1, act)?;
            }
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        fs::write(self.path.join(file), value).map_err(|source| CgroupError::Write {
            file: file.to_owned(),
            value: value.to_owned(),
            source,
        })
    }

    /// Its directory, opened.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?)
    }
}

/// Gives the controllers of a cgroup to those below it, each on its own: one that can't be given
/// must not keep the others back.
pub fn delegate_controllers(parent: &Path) {
    let available = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(
            parent.join("cgroup.subtree_control"),
            format!("+{controller}"),
        ) {
            eprintln!("husk-agent: cannot enable the cgroup controller {controller}: {error}");
        }
    }
}

fn read_key(file: &OwnedFd, key: &str) -> io::Result<u64> {
    let mut buffer = [0; 4096];
    let length = rustix::io::pread(file, &mut buffer[..], 0)?;
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("it says nothing of {key}")))
}

/// What [`Cgroup::figures`] reads.
const FIGURES: [&str; 20] = [
    "cpu.stat",
    "cpu.max",
    "cpu.weight",
    "cpu.pressure",
    "io.stat",
    "io.pressure",
    "memory.current",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.peak",
    "memory.stat",
    "memory.events",
    "memory.pressure",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "pids.current",
    "pids.max",
];

type Settings = Vec<(String, String)>;

/// The files and values that resources come down to.
fn settings(resources: &Resources) -> Result<Settings, CgroupError> {
    let mut all = Settings::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, &mut all);
    }
    if let Some(memory) = &resources.memory {
        memory_settings(memory, &mut all)?;
    }
    if let Some(pids) = &resources.pids {
        let limit = u64::try_from(pids.limit).ok().filter(|&limit| limit > 0);
        push(
            &mut all,
            "pids.max",
            limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string()),
        );
    }
    if let Some(io) = &resources.block_io {
        io_settings(io, &mut all);
    }
    for limit in &resources.hugepage_limits {
        push(
            &mut all,
            &format!("hugetlb.{}.max", limit.page_size),
            limit.limit.to_string(),
        );
    }
    for (file, value) in &resources.unified {
        if file.contains('/') || file.starts_with('.') {
            return Err(CgroupError::Invalid(format!(
                "unified: {file:?} is not a file of a cgroup"
            )));
        }
        push(&mut all, file, value.clone());
    }
    Ok(all)
}

fn push(all: &mut Settings, file: &str, value: String) {
    all.push((file.to_owned(), value));
}

fn cpu_settings(cpu: &Cpu, all: &mut Settings) {
    if let Some(idle) = cpu.idle {
        push(all, "cpu.idle", idle.to_string());
    }
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        push(all, "cpu.weight", weight_of_shares(shares).to_string());
    }
    if cpu.quota.is_some() || cpu.period.is_some() {
        let quota = cpu
            .quota
            .and_then(|quota| u64::try_from(quota).ok())
            .filter(|&quota| quota > 0);
        let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        let value = match cpu.period.filter(|&period| period != 0) {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        push(all, "cpu.max", value);
    }
    if let Some(burst) = cpu.burst {
        push(all, "cpu.max.burst", burst.to_string());
    }
    if !cpu.cpus.is_empty() {
        push(all, "cpuset.cpus", cpu.cpus.clone());
    }
    if !cpu.mems.is_empty() {
        push(all, "cpuset.mems", cpu.mems.clone());
    }
}

/// Shares of cgroup v1 (2 to 262144) on the scale of v2 (1 to 10000), the way that other runtimes
/// map the one onto the other.
fn weight_of_shares(shares: u64) -> u64 {
    const SHARES_MIN: u64 = 2;
    const SHARES_MAX: u64 = 262_144;
    1 + (shares.clamp(SHARES_MIN, SHARES_MAX) - SHARES_MIN) * 9_999 / (SHARES_MAX - SHARES_MIN)
}

fn memory_settings(memory: &Memory, all: &mut Settings) -> Result<(), CgroupError> {
    let text = |value: i64| match value {
        -1 => Ok("max".to_owned()),
        value if value >= 0 => Ok(value.to_string()),
        value => Err(CgroupError::Invalid(format!(
            "memory: {value} is not a limit"
        ))),
    };
    // What runc takes 0 for: not set.
    let set = |value: Option<i64>| value.filter(|&value| value != 0);
    if let Some(swap) = set(memory.swap) {
        let swap_alone = match (swap, set(memory.limit)) {
            (-1, _) => -1,
            (swap, Some(limit)) if limit >= 0 && swap >= limit => swap - limit,
            _ => {
                return Err(CgroupError::Invalid(format!(
                    "memory: swap {swap} holds memory and swap together, so it needs a limit not \
                     above it"
                )));
            }
        };
        push(all, "memory.swap.max", text(swap_alone)?);
    }
    if let Some(reservation) = set(memory.reservation) {
        push(all, "memory.low", text(reservation)?);
    }
    if let Some(limit) = set(memory.limit) {
        push(all, "memory.max", text(limit)?);
    }
    Ok(())
}

fn io_settings(io: &BlockIo, all: &mut Settings) {
    if let Some(weight) = io.weight.filter(|&weight| weight != 0) {
        // 10 to 1000 onto 1 to 10000.
        let weight = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990;
        push(all, "io.weight", weight.to_string());
    }
    let mut throttle = |list: &[Throttle], key: &str| {
        for limit in list {
            let value = format!("{}:{} {key}={}", limit.major, limit.minor, limit.rate);
            push(all, "io.max", value);
        }
    };
    throttle(&io.throttle_read_bps_device, "rbps");
    throttle(&io.throttle_write_bps_device, "wbps");
    throttle(&io.throttle_read_iops_device, "riops");
    throttle(&io.throttle_write_iops_device, "wiops");
}

/// Attaches a device program to a cgroup's directory.
pub(crate) fn attach_to(path: &Path, program: impl AsFd) -> io::Result<()> {
    let cgroup = Cgroup {
        path: path.to_owned(),
    }
    .open()?;
    crate::sys::attach_device_program(cgroup.as_fd(), program.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Settings, CgroupError> {
        settings(&serde_json::from_str(text).unwrap())
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn negative_limit_is_refused() {
        assert!(of(r#"{"memory":{"limit":-2}}"#).is_err());
    }

    #[test]
    fn swap_below_the_limit_is_refused() {
        assert!(of(r#"{"memory":{"limit":100,"swap":50}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":50}}"#).is_err());
    }

    #[test]
    fn unified_file_can_not_leave_the_cgroup() {
        assert!(of(r#"{"unified":{"../memory.max":"1"}}"#).is_err());
    }

    #[test]
    fn swap_is_what_comes_on_top_of_memory() {
        let all = of(r#"{"memory":{"limit":100,"swap":150}}"#).unwrap();
        assert_eq!(
            all,
            [pair("memory.swap.max", "50"), pair("memory.max", "100")]
        );
    }

    #[test]
    fn no_limit_is_max() {
        let text = r#"{"cpu":{"quota":-1,"period":100000},"pids":{"limit":-1}}"#;
        assert_eq!(
            of(text).unwrap(),
            [pair("cpu.max", "max 100000"), pair("pids.max", "max")]
        );
    }

    #[test]
    fn shares_map_onto_the_ends_of_the_weights() {
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }
}
