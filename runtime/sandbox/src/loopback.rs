//! The pod's loopback address, for those who look for it on the host.
//!
//! CRI forwards a port of a pod by dialling 127.0.0.1, or else ::1, in the pod's network namespace. The
//! containers' listeners are in the guest, so a listener here takes all of these connections, and
//! passes each on to the same port there. It can't know whether there is anybody before it has
//! accepted: a connection that nobody wants is then reset.

use std::io;
use std::net::TcpListener as StdListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use husk_netlink::loopback;
use husk_protocol::messages;
use rustix::net::sockopt::set_socket_linger;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::agent::context;
use crate::error::describe;
use crate::netns::on_thread;
use crate::{ContainerError, Sandbox};

/// Most connections that are passed on at once. Others wait to be accepted.
const CONNECTIONS_MAX: usize = 256;

/// For the guest to dial, twice.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// Takes the connections to a pod's loopback address. Dropping it leaves them to whoever listens on
/// the host.
#[derive(Debug)]
pub struct Loopback {
    listeners: Vec<TcpListener>,
    _link: OwnedFd,
}

impl Sandbox {
    /// Takes over what is dialled at the loopback address of the pod's network namespace.
    ///
    /// # Errors
    /// Those of the host's kernel, which may have no such programs as are needed.
    pub async fn catch_loopback(&self) -> io::Result<Loopback> {
        let netns = self.netns.clone();
        let caught = on_thread("loopback", move || {
            netns.enter()?;
            loopback::catch(netns.as_fd())
        });
        let caught = caught.await??;
        let listen = |listener: StdListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let listeners = caught.listeners.into_iter().map(listen);
        Ok(Loopback {
            listeners: listeners.collect::<Result<_, _>>()?,
            _link: caught.link,
        })
    }

    /// Passes connections on to the guest until the virtual machine ends.
    pub async fn forward_loopback(self: Arc<Self>, loopback: Loopback) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut accepting = JoinSet::new();
        for listener in loopback.listeners {
            accepting.spawn(Arc::clone(&self).accept_all(listener, Arc::clone(&permits)));
        }
        // Who accepts ends with the set.
        self.ended().await;
    }

    async fn accept_all(self: Arc<Self>, listener: TcpListener, permits: Arc<Semaphore>) {
        loop {
            // Never closed, so always granted in the end.
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "ports of the pod are not forwarded any more");
                    return;
                }
            };
            let sandbox = Arc::clone(&self);
            tokio::spawn(async move {
                sandbox.pass_on(stream).await;
                drop(permit);
            });
        }
    }

    /// Passes one connection on, to its end.
    async fn pass_on(&self, stream: TcpStream) {
        let taken = stream
            .local_addr()
            .and_then(|dialled| Ok((dialled.port(), OwnedFd::from(stream.into_std()?))));
        let (port, socket) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(%error, "a connection was gone at once");
                return;
            }
        };
        if let Err(error) = self.connect_port(port, &socket).await {
            tracing::debug!(port, error = describe(&error), "a port is not forwarded");
            // A reset, and not an end, so that the dialler hears of an error.
            let _ = set_socket_linger(&socket, Some(Duration::ZERO));
        }
    }

    async fn connect_port(&self, port: u16, socket: &OwnedFd) -> Result<(), ContainerError> {
        let mut request = messages::ForwardPortRequest::new();
        request.tcp_port = port.into();
        let stream = self.sources.next()?;
        request.stream = stream;
        let dial = self.agent.call(
            &self.vmm,
            "forward port",
            Some(DIAL_DEADLINE),
            |client| async move { client.forward_port(context(), &request).await },
        );
        dial.await?;
        let connected = self.vmm.connect_socket(stream, socket).await;
        let mut end = connected.map_err(|text| ContainerError::Vmm {
            call: "connect a forwarded port",
            text,
        })?;
        while end.changed().await.is_ok() {}
        Ok(())
    }
}
