//! The streams of a process: given to the VMM, drained, closed.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use husk_protocol::STREAM_SOURCE_MIN;
use husk_protocol::messages::Stdio;
use husk_vmm_control::{HOST_PORT_MAX, HOST_PORT_MIN};
use tokio::time::{Instant, timeout_at};

use crate::control::StreamEnd;
use crate::{ContainerError, Sandbox};

/// The host's ends of a process's streams. They are handed to the VMM, which reads and writes them
/// itself, and closed here. An absent one is `/dev/null` in the guest.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// Read until its end, which becomes the end of the process's standard input.
    pub stdin: Option<OwnedFd>,
    /// A writer of the FIFO that `stdin` reads, so that it doesn't end as the last client detaches.
    /// Kept open until [`Sandbox::close_stdin`] or the process's end.
    pub stdin_keeper: Option<OwnedFd>,
    /// Standard output; a terminal's output.
    pub stdout: Option<OwnedFd>,
    /// Standard error; must be absent with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The process has a terminal. Must agree with the spec's `process.terminal`.
    pub terminal: bool,
}

/// The host's ports from which streams come. Each is used once in the life of a virtual machine, so
/// that no connection, however late, can be taken for another.
#[derive(Debug)]
pub(crate) struct SourcePorts(AtomicU32);

const _: () = assert!(STREAM_SOURCE_MIN >= HOST_PORT_MIN);

impl Default for SourcePorts {
    fn default() -> Self {
        Self(AtomicU32::new(STREAM_SOURCE_MIN))
    }
}

impl SourcePorts {
    /// A port that has never been used.
    ///
    /// # Errors
    /// [`ContainerError::StreamsUsedUp`]
    pub(crate) fn next(&self) -> Result<u32, ContainerError> {
        let after = |port| (port <= HOST_PORT_MAX).then(|| port + 1);
        let next = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, after);
        next.map_err(|_| ContainerError::StreamsUsedUp)
    }
}

/// How the process's output ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drained {
    /// Every byte it wrote has been written to the sinks.
    All,
    /// A sink has refused bytes with this error.
    Lost(String),
    /// The deadline passed first: something holds the output open, or nobody reads it.
    NotInTime,
}

impl Sandbox {
    /// Drops [`ProcessIo::stdin_keeper`]: the process's standard input ends once no client has the
    /// FIFO open for writing. Does nothing the second time.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`]
    pub fn close_stdin(&self, container: &str, exec_id: &str) -> Result<(), ContainerError> {
        let keeper = self
            .containers()
            .process(container, exec_id)?
            .stdin_keeper
            .take();
        drop(keeper);
        Ok(())
    }

    /// Waits until every byte that the process has written to its standard output and error is
    /// written to the sinks, but no longer than `deadline`. With the virtual machine gone there is
    /// nothing more to come.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`]
    pub async fn output_drained(
        &self,
        container: &str,
        exec_id: &str,
        deadline: Duration,
    ) -> Result<Drained, ContainerError> {
        let outputs = self
            .containers()
            .process(container, exec_id)?
            .outputs
            .clone();
        let deadline = Instant::now() + deadline;
        let mut drained = Drained::All;
        for mut output in outputs {
            // An error of a change says that the stream is closed.
            let closed = async { while output.changed().await.is_ok() {} };
            if timeout_at(deadline, closed).await.is_err() {
                return Ok(Drained::NotInTime);
            }
            if let Some(error) = output.borrow().failure.clone() {
                drained = Drained::Lost(error);
            }
        }
        Ok(drained)
    }

    /// When the first byte of a process's output was written to its sink, once its streams are
    /// closed, as [`monotonic_us`](crate::monotonic_us) counts.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`]
    pub fn first_output_us(
        &self,
        container: &str,
        exec_id: &str,
    ) -> Result<Option<u64>, ContainerError> {
        let mut containers = self.containers();
        let outputs = &containers.process(container, exec_id)?.outputs;
        let moments = outputs.iter().map(|output| output.borrow().first_us);
        Ok(moments.filter(|moment| *moment > 0).min())
    }

    /// Ports for the streams that are there.
    pub(super) fn allot_sources(&self, io: &ProcessIo) -> Result<Stdio, ContainerError> {
        let mut sources = Stdio::new();
        if io.stdin.is_some() || (io.terminal && io.stdout.is_some()) {
            sources.stdin = self.sources.next()?;
        }
        if !io.terminal && io.stdout.is_some() {
            sources.stdout = self.sources.next()?;
        }
        if !io.terminal && io.stderr.is_some() {
            sources.stderr = self.sources.next()?;
        }
        Ok(sources)
    }

    /// Gives the streams to the VMM, which connects each from its port. The agent expects them, since
    /// it has answered the request that names these.
    pub(super) async fn connect_streams(
        &self,
        container: &str,
        exec_id: &str,
        sources: &Stdio,
        io: ProcessIo,
    ) -> Result<(), ContainerError> {
        let mut outputs = Vec::new();
        if io.terminal {
            if sources.stdin != 0 {
                let both = (io.stdin.as_ref(), io.stdout.as_ref());
                outputs.push(self.connect(sources.stdin, both.0, both.1).await?);
            }
        } else {
            if sources.stdin != 0 {
                self.connect(sources.stdin, io.stdin.as_ref(), None).await?;
            }
            for (host_port, sink) in [(sources.stdout, &io.stdout), (sources.stderr, &io.stderr)] {
                if host_port != 0 {
                    outputs.push(self.connect(host_port, None, sink.as_ref()).await?);
                }
            }
        }
        let mut containers = self.containers();
        let process = containers.process(container, exec_id)?;
        process.outputs = outputs;
        process.stdin_keeper = io.stdin_keeper;
        Ok(())
    }

    async fn connect(
        &self,
        host_port: u32,
        source: Option<&OwnedFd>,
        sink: Option<&OwnedFd>,
    ) -> Result<StreamEnd, ContainerError> {
        let connected = self.vmm.connect(host_port, source, sink).await;
        connected.map_err(|text| match self.vmm.end() {
            Some(end) => ContainerError::VmGone(end),
            None => ContainerError::Vmm {
                call: "connect a stream",
                text,
            },
        })
    }
}

pub(super) fn check_io(io: &ProcessIo, has_terminal: bool) -> Result<(), ContainerError> {
    let text = if io.terminal != has_terminal {
        "the request and the spec disagree on whether there is a terminal"
    } else if io.terminal && io.stderr.is_some() {
        "a process with a terminal has no standard error of its own"
    } else {
        return Ok(());
    };
    Err(ContainerError::Invalid {
        text: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_streams_are_used_once() {
        let sources = SourcePorts::default();
        assert_eq!(sources.next().unwrap(), STREAM_SOURCE_MIN);
        assert_eq!(sources.next().unwrap(), STREAM_SOURCE_MIN + 1);

        let last = SourcePorts(AtomicU32::new(HOST_PORT_MAX));
        assert_eq!(last.next().unwrap(), HOST_PORT_MAX);
        for _ in 0..2 {
            assert!(matches!(last.next(), Err(ContainerError::StreamsUsedUp)));
        }
    }

    #[test]
    fn terminal_must_be_agreed_on() {
        let io = ProcessIo {
            terminal: true,
            ..ProcessIo::default()
        };
        assert!(check_io(&io, false).is_err());
        assert!(check_io(&ProcessIo::default(), true).is_err());
        assert!(check_io(&io, true).is_ok());
    }

    #[test]
    fn terminal_has_no_standard_error() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let io = ProcessIo {
            terminal: true,
            stderr: Some(writer.into()),
            ..ProcessIo::default()
        };
        assert!(check_io(&io, true).is_err());
    }
}
