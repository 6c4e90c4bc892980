//! Settings of a host, and where its files are.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use husk_vmm_control::{DISKS_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN, NET_DEVICES_MAX, VCPUS_MAX};
use serde::Deserialize;

use crate::ChangesTold;

/// Where [`Settings::load`] looks.
pub const SETTINGS_PATH: &str = "/etc/husk/config.toml";

/// The settings file. A missing file or table means the defaults; an unknown name is an error.
///
/// ```toml
/// [vm]
/// vcpus = 2
/// memory_mib = 512
/// kernel = "/usr/local/share/husk/vmlinux"
///
/// [network]
/// spare_interfaces = 2
///
/// [volumes]
/// inotify = "all"
///
/// [log]
/// level = "debug"
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The virtual machine.
    pub vm: VmSettings,
    /// The pods' networks.
    pub network: NetworkSettings,
    /// The pods' volumes.
    pub volumes: VolumeSettings,
    /// What is written to the log.
    pub log: LogSettings,
}

/// Table `[vm]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmSettings {
    /// Virtual CPUs of a pod that says nothing itself.
    pub vcpus: u8,
    /// Memory of a pod that says nothing itself, in MiB.
    pub memory_mib: u32,
    /// Added to a pod's own limit of memory, for the guest's kernel and agent, in MiB.
    pub overhead_mib: u32,
    /// Most memory that a pod may grow to, in MiB; none: as much as the host has.
    pub memory_max_mib: Option<u32>,
    /// Slots for block devices of the host in a pod whose containers are not known as it starts.
    pub spare_disks: u8,
    /// Guest kernel, instead of the installed one.
    pub kernel: Option<PathBuf>,
    /// Initrd with the agent, instead of the installed one.
    pub initrd: Option<PathBuf>,
    /// `husk-vmm`, instead of the installed one.
    pub vmm: Option<PathBuf>,
    /// Added to the guest kernel's command line.
    pub cmdline_extra: String,
}

/// Table `[network]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// Network devices of a pod whose interfaces are made by OCI hooks, once its virtual machine is
    /// there: as many as such a pod can have.
    pub spare_interfaces: u8,
}

/// Table `[volumes]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VolumeSettings {
    /// Of which volumes inotify in the guest hears what the host changes.
    pub inotify: ChangesTold,
}

/// Table `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// A filter as `RUST_LOG` takes it: `info`, or `info,husk_sandbox=debug`.
    pub level: String,
}

/// Where the things are that a sandbox is started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Install {
    /// `libexec/husk/husk-vmm`
    pub vmm: PathBuf,
    /// `share/husk/vmlinux`
    pub kernel: PathBuf,
    /// `share/husk/initrd.img`
    pub initrd: PathBuf,
}

/// Why the settings can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file is there and can't be read.
    #[error("cannot read the settings {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no TOML, or names what there isn't.
    #[error("cannot understand the settings {path:?}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("settings {path:?}: {name} is {value}, and must be {least} to {most}")]
    Range {
        /// The file.
        path: PathBuf,
        /// Which value.
        name: &'static str,
        /// What it is.
        value: u32,
        /// What it may be.
        least: u32,
        /// What it may be.
        most: u32,
    },
}

/// Why the installed files can't be found.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The running program's own path is unknown.
    #[error("cannot find out where this program is installed")]
    OwnPath(#[source] io::Error),
    /// The settings can't be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

impl Default for VmSettings {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 256,
            overhead_mib: 64,
            memory_max_mib: None,
            spare_disks: 4,
            kernel: None,
            initrd: None,
            vmm: None,
            cmdline_extra: String::new(),
        }
    }
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            spare_interfaces: 3,
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
        }
    }
}

impl Settings {
    /// The settings of this host, from [`SETTINGS_PATH`].
    ///
    /// # Errors
    /// [`SettingsError`]; a missing file is none.
    pub fn load() -> Result<Self, SettingsError> {
        Self::load_from(Path::new(SETTINGS_PATH))
    }

    /// The settings in a file.
    ///
    /// # Errors
    /// See [`Self::load`].
    pub fn load_from(path: &Path) -> Result<Self, SettingsError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(SettingsError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, SettingsError> {
        let settings: Self = toml::from_str(text).map_err(|source| SettingsError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let in_range = |name, value: u32, least: u32, most: u32| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            let path = path.to_owned();
            Err(SettingsError::Range {
                path,
                name,
                value,
                least,
                most,
            })
        };
        in_range("vm.vcpus", settings.vm.vcpus.into(), 1, VCPUS_MAX.into())?;
        let memory_mib = settings.vm.memory_mib;
        in_range("vm.memory_mib", memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)?;
        in_range(
            "vm.overhead_mib",
            settings.vm.overhead_mib,
            0,
            MEMORY_MIB_MAX,
        )?;
        if let Some(memory_max_mib) = settings.vm.memory_max_mib {
            in_range("vm.memory_max_mib", memory_max_mib, 0, MEMORY_MIB_MAX)?;
        }
        let most = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let spare = settings.vm.spare_disks.into();
        in_range("vm.spare_disks", spare, 0, most(DISKS_MAX))?;
        let spare = settings.network.spare_interfaces.into();
        in_range("network.spare_interfaces", spare, 0, most(NET_DEVICES_MAX))?;
        Ok(settings)
    }
}

impl Install {
    /// The files that belong to the running program, unless the host's settings name others. Whether
    /// they are there is found out when they are opened.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn locate() -> Result<Self, InstallError> {
        let settings = Settings::load()?;
        Self::locate_with(&settings)
    }

    /// Like [`Self::locate`], with settings already read.
    ///
    /// # Errors
    /// [`InstallError::OwnPath`].
    pub fn locate_with(settings: &Settings) -> Result<Self, InstallError> {
        let program = env::current_exe().map_err(InstallError::OwnPath)?;
        Ok(Self::beside(&program, &settings.vm))
    }

    /// `PREFIX/bin/program` has the rest in `PREFIX/libexec` and `PREFIX/share`.
    fn beside(program: &Path, settings: &VmSettings) -> Self {
        let prefix = program
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/usr/local"));
        let or_installed = |set: &Option<PathBuf>, installed: &str| {
            set.clone().unwrap_or_else(|| prefix.join(installed))
        };
        Self {
            vmm: or_installed(&settings.vmm, "libexec/husk/husk-vmm"),
            kernel: or_installed(&settings.kernel, "share/husk/vmlinux"),
            initrd: or_installed(&settings.initrd, "share/husk/initrd.img"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn unknown_names_are_refused() {
        for text in [
            "[vn]\n",
            "[vm]\nvcpu = 2\n",
            "colour = 1\n",
            "[log]\nfile = \"x\"\n",
            "[volumes]\ninotify = \"some\"\n",
        ] {
            assert!(
                matches!(parse(text), Err(SettingsError::Parse { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (text, name) in [
            ("[vm]\nvcpus = 0\n", "vm.vcpus"),
            ("[vm]\nvcpus = 65\n", "vm.vcpus"),
            ("[vm]\nmemory_mib = 1\n", "vm.memory_mib"),
            ("[vm]\noverhead_mib = 99999999\n", "vm.overhead_mib"),
            ("[vm]\nmemory_max_mib = 99999999\n", "vm.memory_max_mib"),
            ("[vm]\nspare_disks = 17\n", "vm.spare_disks"),
            (
                "[network]\nspare_interfaces = 9\n",
                "network.spare_interfaces",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn empty_file_means_defaults() {
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn missing_file_means_defaults() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings::load_from(&directory.path().join("none.toml")).unwrap();
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn settings_override_what_is_installed() {
        let settings = parse("[vm]\nkernel = \"/boot/other\"\n").unwrap();
        let install = Install::beside(Path::new("/opt/husk/bin/husk"), &settings.vm);
        assert_eq!(install.kernel, Path::new("/boot/other"));
        assert_eq!(install.vmm, Path::new("/opt/husk/libexec/husk/husk-vmm"));
        assert_eq!(install.initrd, Path::new("/opt/husk/share/husk/initrd.img"));
    }
}
