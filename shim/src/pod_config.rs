//! CRI's `runtime.v1.PodSandboxConfig`: what containerd's Sandbox API says of a pod.
//!
//! Read field by field, by the numbers of the interface (cri-api, runtime/v1/api.proto): a pod needs a
//! dozen of the hundreds of fields that the generated messages would bring along. A field that is not
//! known is passed over; one that is, and is not what it must be, is told by its name.

use std::collections::BTreeMap;

use containerd_shim_protos::protobuf::CodedInputStream;
use containerd_shim_protos::protobuf::rt::WireType;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

/// A pod as the kubelet asks for it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PodConfig {
    /// Empty: the host's.
    pub(crate) hostname: String,
    pub(crate) dns: Dns,
    /// Empty: none. A path below the root of cgroups, or a slice of systemd's.
    pub(crate) cgroup_parent: String,
    pub(crate) sysctls: BTreeMap<String, String>,
    /// What the limits of all containers add up to; none: nobody says.
    pub(crate) resources: Option<Resources>,
    pub(crate) namespaces: Namespaces,
}

/// What `/etc/resolv.conf` is made of.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Dns {
    pub(crate) servers: Vec<String>,
    pub(crate) searches: Vec<String>,
    pub(crate) options: Vec<String>,
}

/// Limits; 0: none.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Microseconds.
    pub(crate) cpu_period: i64,
    /// Microseconds in each period.
    pub(crate) cpu_quota: i64,
    /// Bytes.
    pub(crate) memory_limit: i64,
}

/// Whose namespaces the pod is to have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    pub(crate) has_hosts_network: bool,
    pub(crate) has_hosts_pids: bool,
    pub(crate) has_hosts_ipc: bool,
    /// Whether its users are others on the host.
    pub(crate) has_own_users: bool,
}

/// Why a pod's configuration was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("options: {0:?} is not {TYPE}")]
    Type(String),
    #[error("options: {0}: it is not a message of protocol buffers")]
    Malformed(&'static str),
    #[error("options: {name}: it is not {expected}")]
    Field {
        name: &'static str,
        expected: &'static str,
    },
}

/// The message's name.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

impl PodConfig {
    /// Reads the options of a `CreateSandboxRequest`; none are a pod with nothing that is not needed.
    pub(crate) fn of(options: Option<&Any>) -> Result<Self, ConfigError> {
        let Some(options) = options else {
            return Ok(Self::default());
        };
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        if name != TYPE {
            return Err(ConfigError::Type(options.type_url.clone()));
        }
        let mut config = Self::default();
        fields(TYPE, &options.value, |number, value| {
            match number {
                2 => config.hostname = value.text("hostname")?,
                4 => config.dns = dns(&value.message("dns_config")?)?,
                8 => config.read_linux(&value.message("linux")?)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(config)
    }

    fn read_linux(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        fields("linux", bytes, |number, value| {
            match number {
                1 => self.cgroup_parent = value.text("linux.cgroup_parent")?,
                2 => self.read_security(&value.message("linux.security_context")?)?,
                3 => {
                    let (name, value) = entry("linux.sysctls", value)?;
                    self.sysctls.insert(name, value);
                }
                5 => self.resources = Some(resources(&value.message("linux.resources")?)?),
                _ => {}
            }
            Ok(())
        })
    }

    fn read_security(&mut self, bytes: &[u8]) -> Result<(), ConfigError> {
        const OPTIONS: &str = "linux.security_context.namespace_options";
        fields("linux.security_context", bytes, |number, value| {
            if number == 1 {
                self.namespaces = namespaces(OPTIONS, &value.message(OPTIONS)?)?;
            }
            Ok(())
        })
    }
}

fn dns(bytes: &[u8]) -> Result<Dns, ConfigError> {
    let mut dns = Dns::default();
    fields("dns_config", bytes, |number, value| {
        match number {
            1 => dns.servers.push(value.text("dns_config.servers")?),
            2 => dns.searches.push(value.text("dns_config.searches")?),
            3 => dns.options.push(value.text("dns_config.options")?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(dns)
}

fn resources(bytes: &[u8]) -> Result<Resources, ConfigError> {
    let mut resources = Resources::default();
    fields("linux.resources", bytes, |number, value| {
        match number {
            1 => resources.cpu_period = value.number("linux.resources.cpu_period")?,
            2 => resources.cpu_quota = value.number("linux.resources.cpu_quota")?,
            4 => {
                resources.memory_limit = value.number("linux.resources.memory_limit_in_bytes")?;
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(resources)
}

fn namespaces(name: &'static str, bytes: &[u8]) -> Result<Namespaces, ConfigError> {
    let mut namespaces = Namespaces::default();
    fields(name, bytes, |number, value| {
        match number {
            1 => namespaces.has_hosts_network = value.is_node("namespace_options.network")?,
            2 => namespaces.has_hosts_pids = value.is_node("namespace_options.pid")?,
            3 => namespaces.has_hosts_ipc = value.is_node("namespace_options.ipc")?,
            5 => {
                let mut is_hosts = false;
                let message = value.message("namespace_options.userns_options")?;
                fields(
                    "namespace_options.userns_options",
                    &message,
                    |number, value| {
                        if number == 1 {
                            is_hosts = value.is_node("namespace_options.userns_options.mode")?;
                        }
                        Ok(())
                    },
                )?;
                namespaces.has_own_users = !is_hosts;
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(namespaces)
}

/// One pair of a map.
fn entry(name: &'static str, value: &Value) -> Result<(String, String), ConfigError> {
    let mut pair = (String::new(), String::new());
    fields(name, &value.message(name)?, |number, value| {
        match number {
            1 => pair.0 = value.text(name)?,
            2 => pair.1 = value.text(name)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(pair)
}

/// What a field holds, as far as that can be told without knowing it.
#[derive(Debug)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
    /// Of a kind that no field here is.
    Other,
}

impl Value {
    fn text(&self, name: &'static str) -> Result<String, ConfigError> {
        let text = match self {
            Self::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        };
        text.map(str::to_owned).ok_or(ConfigError::Field {
            name,
            expected: "text",
        })
    }

    fn message(&self, name: &'static str) -> Result<Vec<u8>, ConfigError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            _ => Err(ConfigError::Field {
                name,
                expected: "a message",
            }),
        }
    }

    fn number(&self, name: &'static str) -> Result<i64, ConfigError> {
        match self {
            Self::Number(number) => Ok(number.cast_signed()),
            _ => Err(ConfigError::Field {
                name,
                expected: "a number",
            }),
        }
    }

    /// Whether a `NamespaceMode` is the host's.
    fn is_node(&self, name: &'static str) -> Result<bool, ConfigError> {
        const NODE: u64 = 2;
        const MODE_MAX: u64 = 3;
        match self {
            Self::Number(mode) if *mode <= MODE_MAX => Ok(*mode == NODE),
            _ => Err(ConfigError::Field {
                name,
                expected: "a NamespaceMode",
            }),
        }
    }
}

/// Hands out the fields of a message: number and value.
fn fields(
    name: &'static str,
    bytes: &[u8],
    mut take: impl FnMut(u32, &Value) -> Result<(), ConfigError>,
) -> Result<(), ConfigError> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let malformed = |_| ConfigError::Malformed(name);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(malformed)? {
        let kind = WireType::new(tag & KIND_MASK).ok_or(ConfigError::Malformed(name))?;
        let value = match kind {
            WireType::Varint => Value::Number(input.read_uint64().map_err(malformed)?),
            WireType::LengthDelimited => Value::Bytes(input.read_bytes().map_err(malformed)?),
            WireType::Fixed32 | WireType::Fixed64 => {
                input.skip_field(kind).map_err(malformed)?;
                Value::Other
            }
            // This version of protocol buffers has no groups.
            WireType::StartGroup | WireType::EndGroup => return Err(ConfigError::Malformed(name)),
        };
        take(tag >> NUMBER_SHIFT, &value)?;
    }
    Ok(())
}

/// A tag is a field's number and, in its lowest bits, how the value is written.
const KIND_MASK: u32 = 7;
const NUMBER_SHIFT: u32 = 3;

#[cfg(test)]
mod tests;
