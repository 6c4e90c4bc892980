//! What the host changes in volumes, told to inotify in the guest.
//!
//! virtio-fs shows the guest what is there when it looks, but tells it nothing: a program that waits
//! for its ConfigMap to change would wait for ever. So the host's inotify watches the volumes, and
//! the agent repeats what it says (see [`EchoChangesRequest`]). Only volumes that the container can't
//! write to, unless the settings say otherwise: of its own changes it would hear twice.
//!
//! A host counts instances of inotify by user; a pod that has such volumes takes one.

mod watches;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::messages::{Change, EchoChangesRequest};
use husk_protocol::service::AgentClient;
use rustix::fs::inotify;
use rustix::io::Errno;
use serde::Deserialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::agent::context;
use crate::error::VmEnd;
use crate::readiness;
use crate::sandbox::in_background;
use watches::Watches;

/// Of which volumes the guest's inotify hears what the host changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangesTold {
    /// Of none.
    None,
    /// Of those that the container can't write to.
    #[default]
    ReadOnly,
    /// Of all. What a container changes in one, it hears of twice.
    All,
}

/// Tells the guest, in a task of its own from the first volume on.
#[derive(Debug)]
pub(crate) struct Teller {
    told: ChangesTold,
    group: u32,
    orders: Option<mpsc::Sender<Order>>,
}

/// What the task is to do.
#[derive(Debug)]
enum Order {
    /// Watch these places of the share.
    Watch(Vec<PathBuf>),
    /// Watch nothing at or below this place any more.
    Leave(PathBuf),
}

/// Orders that wait while the task is at work: more than containers come and go meanwhile.
const ORDERS_MAX: usize = 64;

/// Changes in one request: fewer than the agent takes.
const CHANGES_MAX: usize = 256;

/// For the guest to repeat that many, each with a few requests to the VMM.
const ECHO_DEADLINE: Duration = Duration::from_secs(30);

/// Room for a hundred events or more. The kernel keeps the others.
const EVENTS_BYTES: usize = 16 * 1024;

impl Teller {
    pub(crate) fn new(told: ChangesTold) -> Self {
        Self {
            told,
            group: group(),
            orders: None,
        }
    }

    /// The first of the groups whose requests to the share are to change nothing.
    pub(crate) fn group(&self) -> u32 {
        self.group
    }

    /// Whether a volume's changes are to be told.
    pub(crate) fn tells_of(&self, is_read_only: bool) -> bool {
        match self.told {
            ChangesTold::None => false,
            ChangesTold::ReadOnly => is_read_only,
            ChangesTold::All => true,
        }
    }

    /// Tells of changes at and below these places, paths below `share`, from soon on.
    pub(crate) fn watch(
        &mut self,
        share: &Path,
        places: Vec<PathBuf>,
        client: AgentClient,
        ended: watch::Receiver<Option<VmEnd>>,
    ) {
        if places.is_empty() {
            return;
        }
        let (share, group) = (share.to_owned(), self.group);
        let orders = self.orders.get_or_insert_with(|| {
            let (orders, taken) = mpsc::channel(ORDERS_MAX);
            tokio::spawn(tell(share, group, client, ended, taken));
            orders
        });
        Self::order(orders, Order::Watch(places));
    }

    /// Tells no more of what is at and below a place.
    pub(crate) fn leave(&self, place: PathBuf) {
        if let Some(orders) = &self.orders {
            Self::order(orders, Order::Leave(place));
        }
    }

    fn order(orders: &mpsc::Sender<Order>, order: Order) {
        // A task that has ended has said why.
        if let Err(mpsc::error::TrySendError::Full(order)) = orders.try_send(order) {
            tracing::warn!(?order, "changes of volumes: too much to do");
        }
    }
}

/// A group that nobody has, and that no other pod's guest can guess.
fn group() -> u32 {
    let mut random = [0; 4];
    // Without randomness a guest could guess it, and fool its own watchers.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    // The upper half, less the end: the last number means "none".
    (1 << 31) | (u32::from_ne_bytes(random) & 0x3fff_ffff)
}

async fn tell(
    share: PathBuf,
    group: u32,
    client: AgentClient,
    mut ended: watch::Receiver<Option<VmEnd>>,
    orders: mpsc::Receiver<Order>,
) {
    let telling = async {
        if let Err(error) = tell_until(&share, group, &client, orders).await {
            tracing::warn!(
                error,
                "inotify in the guest does not hear of what the host changes in volumes"
            );
        }
    };
    tokio::select! {
        () = telling => {},
        _ = ended.wait_for(Option::is_some) => {},
    }
}

/// Ends with the reason why it can't go on, or with the sandbox.
async fn tell_until(
    share: &Path,
    group: u32,
    client: &AgentClient,
    mut orders: mpsc::Receiver<Order>,
) -> Result<(), String> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let inotify = inotify::init(flags).map_err(|errno| match errno {
        Errno::MFILE => "the host has no inotify to spare: raise \
                         fs.inotify.max_user_instances"
            .to_owned(),
        errno => format!("cannot make an inotify: {errno}"),
    })?;
    let inotify = Arc::new(inotify);
    let readable = readiness::watch(Arc::clone(&inotify), Interest::READABLE)
        .map_err(|error| format!("cannot watch an inotify: {error}"))?;
    let mut watches = Watches::new(share, inotify);
    loop {
        let changes = tokio::select! {
            order = orders.recv() => match order {
                Some(order) => {
                    let obey = move |watches: &mut Watches| match order {
                        Order::Watch(places) => watches.add(&places),
                        Order::Leave(place) => watches.leave(&place),
                    };
                    watches = beside(watches, obey).await.0;
                    continue;
                }
                None => return Ok(()),
            },
            events = read(&readable) => {
                let events = events.map_err(|error| format!("cannot read an inotify: {error}"))?;
                let (back, changes) = beside(watches, |watches| watches.changes(events)).await;
                watches = back;
                changes
            }
        };
        for some in changes.chunks(CHANGES_MAX) {
            send(client, group, some).await?;
        }
    }
}

/// Works on the watches beside the runtime: the file systems may be slow.
async fn beside<T: Send + 'static>(
    mut watches: Watches,
    work: impl FnOnce(&mut Watches) -> T + Send + 'static,
) -> (Watches, T) {
    in_background(move || {
        let done = work(&mut watches);
        (watches, done)
    })
    .await
}

async fn read(inotify: &AsyncFd<Arc<OwnedFd>>) -> std::io::Result<Vec<watches::Event>> {
    loop {
        let mut ready = inotify.readable().await?;
        if let Ok(events) = ready.try_io(|inotify| read_now(inotify.get_ref())) {
            return events;
        }
    }
}

fn read_now(inotify: &OwnedFd) -> std::io::Result<Vec<watches::Event>> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); EVENTS_BYTES];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut events = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => events.push(watches::Event::of(&event)),
            Err(Errno::INTR) => continue,
            Err(errno) if events.is_empty() => return Err(errno.into()),
            // Another error comes again.
            Err(_) => return Ok(events),
        }
        if reader.is_buffer_empty() {
            return Ok(events);
        }
    }
}

async fn send(client: &AgentClient, group: u32, changes: &[Change]) -> Result<(), String> {
    let request = EchoChangesRequest {
        group,
        changes: changes.to_vec(),
        ..EchoChangesRequest::default()
    };
    match timeout(ECHO_DEADLINE, client.echo_changes(context(), &request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer of the guest's within {ECHO_DEADLINE:?}")),
    }
}
