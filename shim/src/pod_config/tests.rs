use containerd_shim_protos::protobuf::CodedOutputStream;

use super::*;

/// Fields of a message, written one after the other.
#[derive(Default)]
struct Written(Vec<u8>);

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
