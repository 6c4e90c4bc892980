//! What containerd says at a start besides the arguments: `BootstrapParams` on standard input.
//!
//! containerd 2.3 and later send them, and take a `BootstrapResult` for an answer. Earlier ones
//! write the runtime's options there, or nothing, and take the plain address: it is what all of
//! them, 1.6 included, understand. Options may look like params by chance, as unknown fields are
//! no error; what tells them apart is that params name the very task that the arguments do.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::args::Arguments;

/// How long containerd may take to write it all.
const READ_DEADLINE: Duration = Duration::from_secs(10);

/// Most that is read; options are no longer either.
const BYTES_MAX: usize = 4 * 1024 * 1024;

/// The version of the Task service that containerd is told to use.
const TASK_VERSION: i32 = 3;

/// Params that are meant for the task of the arguments.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Params {
    /// containerd's ttrpc socket; empty if it says none.
    pub(crate) ttrpc_address: String,
    pub(crate) debug: bool,
}

impl Params {
    /// Reads standard input to its end. `None` for a containerd that sends none.
    pub(crate) fn read(arguments: &Arguments) -> io::Result<Option<Self>> {
        // Somebody tries it by hand.
        if io::stdin().is_terminal() {
            return Ok(None);
        }
        let bytes = read_to_end(rustix::stdio::stdin())?;
        Ok(Self::parse(&bytes, arguments))
    }

    fn parse(bytes: &[u8], arguments: &Arguments) -> Option<Self> {
        let params = BootstrapParams::parse_from_bytes(bytes).ok()?;
        let is_meant =
            params.instance_id == arguments.id && params.namespace == arguments.namespace;
        if !is_meant || params.instance_id.is_empty() {
            return None;
        }
        let address = &params.containerd_ttrpc_address;
        Some(Self {
            ttrpc_address: address
                .strip_prefix("unix://")
                .unwrap_or(address)
                .to_owned(),
            // Levels are numbers: the lower, the more is said. Those without a name count too.
            debug: params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32,
        })
    }
}

/// The answer to params.
pub(crate) fn result(address: &str) -> io::Result<Vec<u8>> {
    let mut result = BootstrapResult::new();
    result.version = TASK_VERSION;
    result.address = address.to_owned();
    result.protocol = "ttrpc".to_owned();
    result.write_to_bytes().map_err(io::Error::other)
}

fn read_to_end(stdin: impl AsFd) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + READ_DEADLINE;
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match rustix::io::read(&stdin, &mut buffer)? {
            0 => return Ok(bytes),
            count => bytes.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
        if bytes.len() > BYTES_MAX {
            return Err(io::Error::other(format!(
                "it is longer than {BYTES_MAX} bytes"
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io::Write;

    use containerd_shim_protos::protobuf::EnumOrUnknown;

    use super::*;

    fn arguments() -> Arguments {
        let line = ["-namespace", "n", "-id", "i", "start"];
        Arguments::parse(line.map(OsString::from)).unwrap()
    }

    fn params(id: &str, namespace: &str) -> BootstrapParams {
        let mut params = BootstrapParams::new();
        params.instance_id = id.to_owned();
        params.namespace = namespace.to_owned();
        params.containerd_ttrpc_address = "unix:///run/c.sock.ttrpc".to_owned();
        params
    }

    #[test]
    fn what_is_not_meant_for_the_task_is_no_params() {
        let other = params("other", "n").write_to_bytes().unwrap();
        let elsewhere = params("i", "other").write_to_bytes().unwrap();
        // Options as earlier versions of containerd send them: a type's URL, then its value.
        let options = b"\x0a\x1fcontainerd.runc.v1.Options and n\x12\x01x";
        for bytes in [b"".as_slice(), b"\xff", b"{}", options, &other, &elsewhere] {
            assert_eq!(Params::parse(bytes, &arguments()), None, "{bytes:?}");
        }
    }

    #[test]
    fn params_of_the_task_are_taken() {
        let mut sent = params("i", "n");
        for (level, debug) in [(0, false), (4, false), (-4, true), (-5, true), (-8, true)] {
            sent.log_level = EnumOrUnknown::from_i32(level);
            let bytes = sent.write_to_bytes().unwrap();
            let wanted = Params {
                ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
                debug,
            };
            assert_eq!(Params::parse(&bytes, &arguments()), Some(wanted), "{level}");
        }
    }

    #[test]
    fn answer_says_where_and_how() {
        let bytes = result("unix:///run/husk/s/1").unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!(result.version, 3);
        assert_eq!(result.address, "unix:///run/husk/s/1");
        assert_eq!(result.protocol, "ttrpc");
    }

    #[test]
    fn input_is_read_to_its_end_and_no_further_than_the_limit() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"params").unwrap();
        drop(writer);
        assert_eq!(read_to_end(reader).unwrap(), b"params");

        let endless = std::fs::File::open("/dev/zero").unwrap();
        assert!(read_to_end(endless).is_err());
    }
}
