//! Events, in order, to containerd.
//!
//! They pass through one queue and are forwarded one after the other to containerd's ttrpc socket
//! (containerd.services.events.ttrpc.v1). While containerd is away they wait; its socket coming
//! back is what wakes the publisher.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageDyn;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::{shim::event::Envelope, shim::events::ForwardRequest, topics};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use ttrpc::context;

use crate::convert::timestamp;

/// How long containerd may take to accept one event before the connection is given up for a
/// new one.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// How long events wait for a containerd that is away when this process wants to end.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);

/// How long a socket that refuses connections is left alone, if nothing happens beside it: containerd
/// may be there and have too much to do.
const RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Most events that wait for containerd; the oldest are dropped beyond it.
const QUEUE_MAX: usize = 4096;

/// One event of a task, as the Go shim publishes it.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Oom(TaskOOM),
    Paused(TaskPaused),
    Resumed(TaskResumed),
    Delete(TaskDelete),
}

impl Event {
    fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Self::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Self::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
            Self::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
        }
    }

    fn message(&self) -> &dyn MessageDyn {
        match self {
            Self::Create(message) => message,
            Self::Start(message) => message,
            Self::ExecAdded(message) => message,
            Self::ExecStarted(message) => message,
            Self::Oom(message) => message,
            Self::Exit(message) => message,
            Self::Paused(message) => message,
            Self::Resumed(message) => message,
            Self::Delete(message) => message,
        }
    }

    fn envelope(&self, namespace: &str) -> Option<Envelope> {
        let message = self.message();
        let mut envelope = Envelope::new();
        envelope.set_namespace(namespace.to_owned());
        envelope.set_topic(self.topic().to_owned());
        envelope.set_timestamp(timestamp(SystemTime::now()));
        envelope.set_event(Any {
            type_url: message.descriptor_dyn().full_name().to_owned(),
            value: message.write_to_bytes_dyn().ok()?,
            ..Any::default()
        });
        Some(envelope)
    }
}

/// What is put in the queue.
#[derive(Debug)]
pub(crate) enum Item {
    Event(Box<Event>),
    /// Answered once everything before it has been taken.
    Flush(oneshot::Sender<()>),
}

/// The end of the queue that events are put in.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    /// A queue and the receiver of its events.
    pub(crate) fn channel() -> (Self, mpsc::UnboundedReceiver<Item>) {
        let (queue, items) = mpsc::unbounded_channel();
        (Self { queue }, items)
    }

    /// A queue whose events go to the ttrpc socket at `address` (a path), in the background.
    pub(crate) fn to_containerd(address: PathBuf, namespace: String) -> Self {
        let (publisher, items) = Self::channel();
        tokio::spawn(async move { forward_all(items, &address, &namespace).await });
        publisher
    }

    /// Appends one event. Never waits.
    pub(crate) fn publish(&self, event: Event) {
        // The receiver lives as long as any publisher; without it nobody is left to tell.
        let _ = self.queue.send(Item::Event(Box::new(event)));
    }

    /// Waits until containerd has taken everything published so far, with a bound.
    pub(crate) async fn flushed(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_err() {
            return;
        }
        if tokio::time::timeout(FLUSH_DEADLINE, flushed).await.is_err() {
            tracing::warn!("containerd did not take the last events within {FLUSH_DEADLINE:?}");
        }
    }
}

async fn forward_all(mut items: mpsc::UnboundedReceiver<Item>, address: &Path, namespace: &str) {
    let mut client = None;
    let mut waiting = VecDeque::new();
    while let Some(item) = items.recv().await {
        waiting.push_back(item);
        while let Some(item) = waiting.pop_front() {
            let event = match item {
                Item::Event(event) => event,
                Item::Flush(done) => {
                    let _ = done.send(());
                    continue;
                }
            };
            let Some(envelope) = event.envelope(namespace) else {
                continue;
            };
            if forward(&mut client, address, envelope).await {
                continue;
            }
            client = None;
            waiting.push_front(Item::Event(event));
            let appeared = socket_appears(address);
            tokio::pin!(appeared);
            let appeared = loop {
                tokio::select! {
                    appeared = &mut appeared => break appeared,
                    // Whoever publishes lives as long as this process.
                    Some(more) = items.recv() => waiting.push_back(more),
                }
                while waiting.len() > QUEUE_MAX {
                    tracing::error!(event = ?waiting.pop_front(), "dropped: too many events wait");
                }
            };
            if let Err(error) = appeared {
                tracing::error!(%error, ?address, "events are lost: cannot watch for containerd");
                waiting.clear();
            }
        }
    }
}

/// Forwards one event; `false` if containerd could not be reached.
async fn forward(client: &mut Option<EventsClient>, address: &Path, envelope: Envelope) -> bool {
    let mut request = ForwardRequest::new();
    request.set_envelope(envelope);
    let attempt = async {
        let client = match client {
            Some(client) => client,
            None => {
                let connection = Client::connect(&format!("unix://{}", address.display())).await?;
                client.insert(EventsClient::new(connection))
            }
        };
        client
            .forward(context::with_duration(FORWARD_DEADLINE), &request)
            .await
    };
    match tokio::time::timeout(FORWARD_DEADLINE, attempt).await {
        Ok(Ok(_)) => true,
        // containerd has seen it and does not want it; another try would not change that.
        Ok(Err(ttrpc::Error::RpcStatus(status))) => {
            tracing::warn!(message = status.message(), "containerd refused an event");
            true
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "containerd did not take an event");
            false
        }
        Err(_) => false,
    }
}

/// Returns when something at `address` was made anew, or accepts connections already.
async fn socket_appears(address: &Path) -> io::Result<()> {
    let directory = address.parent().unwrap_or(Path::new("/"));
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(
        &watch,
        directory,
        inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO,
    )?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe; an OwnedFd cannot change behind it"
    )]
    let watch = AsyncFd::new(watch)?;
    let mut buffer = [0; 4096];
    loop {
        // Only after the watch is set: no moment is left in which the socket could slip by.
        if tokio::net::UnixStream::connect(address).await.is_ok() {
            return Ok(());
        }
        let readable = tokio::time::timeout(RECONNECT_DELAY, watch.readable());
        let Ok(ready) = readable.await else {
            continue;
        };
        let mut ready = ready?;
        while rustix::io::read(watch.get_ref(), &mut buffer).is_ok_and(|count| count > 0) {}
        ready.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::r#async::transport::Listener;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// For an event to arrive that is due.
    const DEADLINE: Duration = Duration::from_secs(20);

    /// containerd's side: passes the pids of exit events on.
    struct Containerd {
        pids: mpsc::UnboundedSender<u32>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let exit = TaskExit::parse_from_bytes(&request.envelope().event().value).unwrap();
            self.pids.send(exit.pid()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(address: &Path, pids: &mpsc::UnboundedSender<u32>) -> Server {
        let listener = UnixListener::bind(address).unwrap();
        let containerd = Containerd { pids: pids.clone() };
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).unwrap())
            .register_service(create_events(Arc::new(containerd)));
        server.start().await.unwrap();
        server
    }

    async fn expect(told: &mut mpsc::UnboundedReceiver<u32>, pids: std::ops::Range<u32>) {
        for pid in pids {
            let next = tokio::time::timeout(DEADLINE, told.recv()).await;
            assert_eq!(next.unwrap(), Some(pid));
        }
    }

    /// Between bind(2), which the publisher sees, and listen(2) it must not lose patience for ever.
    #[tokio::test]
    async fn events_reach_a_socket_that_listens_late() {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("ttrpc");
        let (pids, mut told) = mpsc::unbounded_channel();
        let publisher = Publisher::to_containerd(address.clone(), "n".to_owned());
        let early = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&early, &SocketAddrUnix::new(&address).unwrap()).unwrap();
        let mut exit = TaskExit::new();
        exit.set_pid(7);
        publisher.publish(Event::Exit(exit));
        // It tries, is refused, and waits.
        for _ in 0..16 {
            tokio::task::yield_now().await;
        }

        listen(&early, 16).unwrap();
        let mut server = Server::new()
            .add_listener(Listener::try_from(UnixListener::from(early)).unwrap())
            .register_service(create_events(Arc::new(Containerd { pids })));
        server.start().await.unwrap();

        expect(&mut told, 7..8).await;
    }

    #[tokio::test]
    async fn events_wait_for_a_containerd_that_is_away_and_keep_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("ttrpc");
        let (pids, mut told) = mpsc::unbounded_channel();
        let publisher = Publisher::to_containerd(address.clone(), "n".to_owned());
        let publish = |range: std::ops::Range<u32>| {
            for pid in range {
                let mut exit = TaskExit::new();
                exit.set_pid(pid);
                publisher.publish(Event::Exit(exit));
            }
        };
        // Before containerd is there.
        publish(0..3);
        let mut server = serve(&address, &pids).await;
        expect(&mut told, 0..3).await;

        // While it restarts: the socket stays behind, as with one that was killed.
        server.shutdown().await.unwrap();
        drop(server);
        publish(3..6);
        tokio::task::yield_now().await;
        std::fs::remove_file(&address).unwrap();
        let _server = serve(&address, &pids).await;
        publish(6..9);
        expect(&mut told, 3..9).await;
        publisher.flushed().await;
        assert!(told.try_recv().is_err());
    }
}
