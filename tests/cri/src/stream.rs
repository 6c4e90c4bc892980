//! Streams: WebSockets (RFC 6455) with Kubernetes' channels, as `kubectl` speaks them.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What a command left that was run over a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Streamed {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit status.
    pub status: i32,
}

/// A connection with channels: messages whose first byte says what the rest is.
pub struct WebSocket {
    stream: BufReader<TcpStream>,
}

/// Standard input, output, error; how it ended; the terminal's size.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Of a forwarded port.
const PORT_DATA: u8 = 0;
const PORT_ERROR: u8 = 1;

impl WebSocket {
    /// Connects to an address that [`crate::Cri`] was told.
    ///
    /// # Errors
    /// If the server does not agree.
    pub fn connect(url: &str, protocol: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("not an http address")?;
        let (host, path) = rest.split_once('/').context("an address without a path")?;
        let stream = TcpStream::connect(host).with_context(|| format!("cannot dial {host}"))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let mut stream = BufReader::new(stream);
        // The key is for caches between the two, of which there are none.
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: aHVzay1jcmktdGVzdHMuLg==\r\n\
             Origin: http://{host}\r\nSec-WebSocket-Protocol: {protocol}\r\n\r\n"
        );
        stream.get_mut().write_all(request.as_bytes())?;
        let head = read_head(&mut stream)?;
        ensure!(
            head.starts_with("HTTP/1.1 101"),
            "the server does not speak WebSocket: {head:?}"
        );
        Ok(Self { stream })
    }

    /// Writes to the standard input.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.send_channel(STDIN, data)
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.send_channel(RESIZE, size.as_bytes())
    }

    /// Reads standard output until these words have come.
    ///
    /// # Errors
    /// If the stream ends without them.
    pub fn until(&mut self, words: &str) -> Result<String> {
        let mut seen = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&seen);
            if text.contains(words) {
                return Ok(text.into_owned());
            }
            match self.receive()? {
                Some((STDOUT | STDERR, data)) => seen.extend(data),
                Some(_) => {}
                None => bail!("it ended after {text:?}, without {words:?}"),
            }
        }
    }

    /// Reads what comes through a forwarded port up to its end. The kubelet says first which port it
    /// is, in each direction.
    ///
    /// # Errors
    /// What the server says of the port; those of the connection.
    pub fn finish_port(mut self) -> Result<Vec<u8>> {
        let (mut data, mut complaint) = (Vec::new(), Vec::new());
        let mut is_named = [false; 2];
        while let Some((channel, bytes)) = self.receive()? {
            match channel {
                PORT_DATA | PORT_ERROR if !is_named[usize::from(channel)] => {
                    ensure!(bytes.len() == size_of::<u16>(), "no port: {bytes:?}");
                    is_named[usize::from(channel)] = true;
                }
                PORT_DATA => data.extend(bytes),
                PORT_ERROR => complaint.extend(bytes),
                _ => bail!("a message of channel {channel}"),
            }
        }
        match complaint.is_empty() {
            true => Ok(data),
            false => bail!("{}", String::from_utf8_lossy(&complaint)),
        }
    }

    /// Reads everything up to the end of the command.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn finish(mut self) -> Result<Streamed> {
        let mut streamed = Streamed::default();
        while let Some((channel, data)) = self.receive()? {
            match channel {
                STDOUT => streamed.stdout.extend(data),
                STDERR => streamed.stderr.extend(data),
                ERROR => streamed.status = exit_status(&data)?,
                _ => {}
            }
        }
        Ok(streamed)
    }

    /// Sends a message of one channel. For a forwarded port channel 0 is the port's data.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn send_channel(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        let length = data.len() + 1;
        let mut frame = vec![FINAL | BINARY];
        match u16::try_from(length) {
            Ok(short) if length < LENGTH_IS_U16.into() => {
                frame.push(MASKED | u8::try_from(short)?);
            }
            Ok(short) => {
                frame.push(MASKED | LENGTH_IS_U16);
                frame.extend(short.to_be_bytes());
            }
            Err(_) => {
                frame.push(MASKED | LENGTH_IS_U64);
                frame.extend(u64::try_from(length)?.to_be_bytes());
            }
        }
        // A client has to mask; a mask of zeros changes nothing.
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(data);
        Ok(self.stream.get_mut().write_all(&frame)?)
    }

    /// The next message with its channel; none at the end.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        let mut message = Vec::new();
        loop {
            let [first, second] = match self.bytes() {
                Ok(head) => head,
                // A server may just go.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let length = match second & !MASKED {
                LENGTH_IS_U16 => u16::from_be_bytes(self.bytes()?).into(),
                LENGTH_IS_U64 => u64::from_be_bytes(self.bytes()?),
                short => short.into(),
            };
            ensure!(second & MASKED == 0, "a server must not mask");
            ensure!(length <= FRAME_BYTES_MAX, "a frame of {length} bytes");
            let mut data = Vec::new();
            self.stream.by_ref().take(length).read_to_end(&mut data)?;
            ensure!(u64::try_from(data.len())? == length, "half a frame");
            match first & OPCODE {
                CLOSE => return Ok(None),
                CONTINUATION | TEXT | BINARY => message.extend(data),
                _ => continue,
            }
            if first & FINAL == 0 {
                continue;
            }
            // Each channel is opened by an empty message.
            if let Some((channel, data)) = message.split_first() {
                return Ok(Some((*channel, data.to_vec())));
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn read_head(stream: &mut impl Read) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
        ensure!(head.len() < HEAD_BYTES_MAX, "the answer has no end");
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// The exit status in Kubernetes' `Status`.
fn exit_status(status: &[u8]) -> Result<i32> {
    let status: Value = serde_json::from_slice(status)
        .with_context(|| format!("no status: {}", String::from_utf8_lossy(status)))?;
    if status["status"] == "Success" {
        return Ok(0);
    }
    let causes = status["details"]["causes"].as_array();
    let code = causes
        .into_iter()
        .flatten()
        .find(|cause| cause["reason"] == "ExitCode")
        .and_then(|cause| cause["message"].as_str());
    match code {
        Some(code) => Ok(code.parse()?),
        None => bail!("it failed: {}", status["message"]),
    }
}

/// RFC 6455, 5.2.
const FINAL: u8 = 0x80;
const OPCODE: u8 = 0x0f;
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const MASKED: u8 = 0x80;
const LENGTH_IS_U16: u8 = 126;
const LENGTH_IS_U64: u8 = 127;

const FRAME_BYTES_MAX: u64 = 16 * 1024 * 1024;

const HEAD_BYTES_MAX: usize = 16 * 1024;

/// For anything to come. The testbed is some twenty times slower than metal.
const DEADLINE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_is_found_and_a_failure_is_told() {
        assert_eq!(exit_status(br#"{"status":"Success"}"#).unwrap(), 0);
        let failed = br#"{"status":"Failure","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
        assert_eq!(exit_status(failed).unwrap(), 3);
        assert!(exit_status(br#"{"status":"Failure","message":"no"}"#).is_err());
        assert!(exit_status(b"no").is_err());
    }
}
