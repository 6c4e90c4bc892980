//! A container's cgroup (version 2): limits, figures, freezing, killing.

mod limits;
mod thrashing;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use self::limits::Setting;
use self::thrashing::Watch;
use crate::devices;
use crate::oci::{Memory, Resources};

/// How long a cgroup may take to freeze, thaw or become empty.
pub(crate) const SETTLE_DEADLINE: Duration = Duration::from_secs(10);

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
    /// The kernel does not do what a file is for.
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
    #[error("linux.resources.{0}")]
    Invalid(String),
    /// A limit that the kernel refuses.
    #[error("{part}: cannot set {file} to {value:?}{hint}")]
    Limit {
        /// The part of the spec that asks for it.
        part: String,
        /// Which file.
        file: String,
        /// To what.
        value: String,
        /// What the guest has instead, where that is known.
        hint: String,
        /// Why.
        source: io::Error,
    },
    /// A limit that is asked to be refused where it is below what is in use.
    #[error("linux.resources.memory: the limit {limit} is below the {usage} bytes in use")]
    BelowUsage {
        /// The limit.
        limit: i64,
        /// What is in use.
        usage: u64,
    },
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
    watch: Arc<Watch>,
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
        let cgroup = Cgroup {
            path,
            watch: Arc::default(),
        };
        // What a container makes below can be looked through, and removed.
        cgroup.write("cgroup.max.depth", &DEPTH_MAX.to_string())?;
        Ok(cgroup)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets limits; those that are absent stay as they are. When one of them is refused, those before
    /// it are taken back.
    ///
    /// The kernel makes room for a lower limit of memory before it returns. Must be called within
    /// a runtime, as a cgroup with such a limit is watched.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        self.watch.changing_limit(|| self.set_all(resources))?;
        self.watch.begin(&self.path);
        Ok(())
    }

    fn set_all(&self, resources: &Resources) -> Result<(), CgroupError> {
        if let Some(memory) = &resources.memory {
            self.check_usage(memory)?;
        }
        let cpu_max = fs::read_to_string(self.path.join("cpu.max")).unwrap_or_default();
        let mut former = Vec::new();
        for setting in limits::settings(resources, &cpu_max)? {
            let before = fs::read(self.path.join(&setting.file)).unwrap_or_default();
            match self.write(&setting.file, &setting.value) {
                Ok(()) => former.push((setting.file, before)),
                Err(CgroupError::Write { source, .. })
                    if setting.is_moot_without_file && source.kind() == ErrorKind::NotFound => {}
                Err(CgroupError::Write { source, .. }) => {
                    for (file, before) in former.into_iter().rev() {
                        // Better than half of a request is what can be had of none of it. Files
                        // with a line for each device take no two lines at once.
                        let _ = self.overwrite(&file, &before);
                    }
                    return Err(self.refused(setting, source));
                }
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    /// checkBeforeUpdate: rather an error than a kill.
    fn check_usage(&self, memory: &Memory) -> Result<(), CgroupError> {
        let Some(limit) = memory.limit.filter(|&limit| limit > 0) else {
            return Ok(());
        };
        let usage = fs::read_to_string(self.path.join("memory.current")).unwrap_or_default();
        let usage = usage.trim_end().parse().unwrap_or(0);
        if memory.check_before_update && limit.unsigned_abs() < usage {
            return Err(CgroupError::BelowUsage { limit, usage });
        }
        Ok(())
    }

    /// Says what the guest has instead of what was asked for.
    fn refused(&self, setting: Setting, source: io::Error) -> CgroupError {
        let controller = setting.file.split('.').next().unwrap_or_default();
        let hint = match controller {
            "cpuset" => {
                let parent = self.path.parent().unwrap_or(&self.path);
                let all = parent.join(format!("{}.effective", setting.file));
                let all = fs::read_to_string(all).unwrap_or_default();
                format!("; the guest has {}", all.trim_end())
            }
            "io" => "; the guest has no such block device".to_owned(),
            "rdma" => "; the guest has no such device".to_owned(),
            "hugetlb" if source.kind() == ErrorKind::NotFound => {
                "; the guest has no pages of that size".to_owned()
            }
            _ => String::new(),
        };
        CgroupError::Limit {
            part: setting.part,
            file: setting.file,
            value: setting.value,
            hint,
            source,
        }
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

    /// Stops every process, or lets them go on; returns once that is so. If not all of them can be
    /// stopped, all go on.
    pub async fn freeze(&self, is_wanted: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if is_wanted { "1" } else { "0" })?;
        let state = if is_wanted { "frozen" } else { "thawed" };
        let settled = self.settle("frozen", u64::from(is_wanted), state).await;
        if settled.is_err() && is_wanted {
            self.write("cgroup.freeze", "0")?;
        }
        settled
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
        self.overwrite(file, value.as_bytes())
            .map_err(|source| CgroupError::Write {
                file: file.to_owned(),
                value: value.to_owned(),
                source,
            })
    }

    /// Without making the file: the kernel's answer to that is a permission denied.
    fn overwrite(&self, file: &str, value: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(self.path.join(file))?;
        file.write_all(value)
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
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
const FIGURES: [&str; 22] = [
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
    "rdma.current",
    "rdma.max",
];

/// Attaches a device program to a cgroup's directory.
pub(crate) fn attach_to(path: &Path, program: impl AsFd) -> io::Result<()> {
    let cgroup = open(path)?;
    crate::sys::attach_device_program(cgroup.as_fd(), program.as_fd())
}
