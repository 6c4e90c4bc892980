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
mod tests {
    use containerd_shim_protos::protobuf::CodedOutputStream;

    use super::*;

    /// Fields of a message, written one after the other.
    #[derive(Default)]
    pub(super) struct Written(Vec<u8>);

    impl Written {
        fn with(mut self, write: impl FnOnce(&mut CodedOutputStream<'_>)) -> Self {
            let mut output = CodedOutputStream::vec(&mut self.0);
            write(&mut output);
            output.flush().unwrap();
            drop(output);
            self
        }

        fn bytes(self, number: u32, bytes: &[u8]) -> Self {
            self.with(|output| output.write_bytes(number, bytes).unwrap())
        }

        fn message(self, number: u32, Self(bytes): Self) -> Self {
            self.bytes(number, &bytes)
        }

        fn number(self, number: u32, value: i64) -> Self {
            self.with(|output| output.write_int64(number, value).unwrap())
        }
    }

    fn written() -> Written {
        Written::default()
    }

    fn read(message: Written) -> Result<PodConfig, ConfigError> {
        PodConfig::of(Some(&Any {
            type_url: TYPE.to_owned(),
            value: message.0,
            ..Any::default()
        }))
    }

    fn refused(message: Written) -> String {
        read(message).unwrap_err().to_string()
    }

    #[test]
    fn other_messages_are_refused_by_name() {
        for name in ["", "runtime.v1.ContainerConfig", "PodSandboxConfig"] {
            let options = Any {
                type_url: name.to_owned(),
                ..Any::default()
            };
            let refused = PodConfig::of(Some(&options)).unwrap_err().to_string();
            assert!(refused.contains(&format!("{name:?}")), "{refused}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            b"\xff".as_slice(),
            b"\x12\x05ab",
            b"\x12\xff\xff\xff\xff\x0f",
            b"\x0b",
            b"\x0f\x00",
            b"\x08",
        ] {
            let refused = read(Written(bytes.to_vec())).unwrap_err();
            assert_eq!(refused, ConfigError::Malformed(TYPE), "{bytes:?}");
            let refused = read(written().bytes(8, bytes)).unwrap_err();
            assert_eq!(refused, ConfigError::Malformed("linux"), "{bytes:?}");
        }
    }

    #[test]
    fn fields_that_are_not_what_they_must_be_are_named() {
        let linux = |message| written().message(8, message);
        let mode = |message| linux(written().message(2, written().message(1, message)));
        for (message, name) in [
            (written().bytes(2, b"\xff"), "hostname"),
            (written().number(2, 1), "hostname"),
            (written().number(4, 1), "dns_config"),
            (
                written().message(4, written().bytes(1, b"\xc0")),
                "dns_config.servers",
            ),
            (linux(written().number(1, 1)), "linux.cgroup_parent"),
            (linux(written().number(3, 1)), "linux.sysctls"),
            (
                linux(written().message(5, written().bytes(2, b"1"))),
                "linux.resources.cpu_quota",
            ),
            (mode(written().number(1, 9)), "namespace_options.network"),
            (mode(written().number(2, -1)), "namespace_options.pid"),
            (mode(written().bytes(3, b"")), "namespace_options.ipc"),
            (mode(written().number(5, 0)), "namespace_options.userns"),
        ] {
            let refused = refused(message);
            assert!(refused.contains(name), "{refused}, not {name}");
        }
    }

    #[test]
    fn what_is_not_known_is_passed_over() {
        let message = written()
            .number(999, 1)
            .bytes(1000, b"\xff\xff")
            .with(|output| output.write_fixed64(2000, 7).unwrap())
            .bytes(2, b"web");
        assert_eq!(read(message).unwrap().hostname, "web");
        assert_eq!(PodConfig::of(None).unwrap(), PodConfig::default());
    }

    #[test]
    fn pod_is_read_as_the_kubelet_writes_it() {
        let modes = written().number(2, 1).number(3, 2);
        let users = written().message(5, written().number(1, 0));
        let linux = written()
            .bytes(1, b"/kubepods/pod1")
            .message(2, written().message(1, modes).bytes(6, b""))
            .message(
                3,
                written().bytes(1, b"net.core.somaxconn").bytes(2, b"1024"),
            )
            .message(
                5,
                written()
                    .number(1, 100_000)
                    .number(2, -1)
                    .number(4, 1 << 30),
            );
        let dns = written()
            .bytes(1, b"10.0.0.10")
            .bytes(2, b"svc")
            .bytes(2, b"local")
            .bytes(3, b"ndots:5");
        let config = read(written().bytes(2, b"web").message(4, dns).message(8, linux)).unwrap();

        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        assert_eq!(
            config,
            PodConfig {
                hostname: "web".to_owned(),
                dns: Dns {
                    servers: owned(&["10.0.0.10"]),
                    searches: owned(&["svc", "local"]),
                    options: owned(&["ndots:5"]),
                },
                cgroup_parent: "/kubepods/pod1".to_owned(),
                sysctls: [("net.core.somaxconn".to_owned(), "1024".to_owned())].into(),
                resources: Some(Resources {
                    cpu_period: 100_000,
                    cpu_quota: -1,
                    memory_limit: 1 << 30,
                }),
                namespaces: Namespaces {
                    has_hosts_ipc: true,
                    ..Namespaces::default()
                },
            }
        );
        let users = written().message(8, written().message(2, written().message(1, users)));
        assert!(read(users).unwrap().namespaces.has_own_users);
    }
}
