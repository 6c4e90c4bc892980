//! The pod's network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::sched::CloneFlags;
use rustix::thread::LinkNameSpaceType;
use tokio::sync::oneshot;

/// A network namespace, held by a descriptor: it is there for as long as this is, whoever else
/// lives in it.
#[derive(Debug, Clone)]
pub(crate) struct Netns {
    file: Arc<File>,
}

impl Netns {
    /// That of somebody else, by its path.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::from_file(File::open(path)?))
    }

    /// A new one, with nothing in it but a loopback interface that is down.
    pub(crate) async fn create() -> io::Result<Self> {
        on_thread("netns", || -> io::Result<Self> {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self::from_file(File::open("/proc/thread-self/ns/net")?))
        })
        .await?
    }

    /// Moves the calling thread into it, for good: what it spawns is born there. Only for a thread
    /// of one's own.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let kind = Some(LinkNameSpaceType::Network);
        Ok(rustix::thread::move_into_link_name_space(
            self.file.as_fd(),
            kind,
        )?)
    }

    /// The descriptor that holds it.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn from_file(file: File) -> Self {
        Self {
            file: Arc::new(file),
        }
    }
}

/// Runs what changes its thread on a thread that ends with it.
///
/// # Errors
/// The thread could not be made, or has panicked.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = oneshot::channel();
    let thread = thread::Builder::new().name(name.to_owned());
    thread.spawn(move || {
        // The receiver waits for as long as this takes.
        let _ = tell.send(work());
    })?;
    told.await
        .map_err(|_| io::Error::other("the thread that was to do it panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_namespace_is_not_opened() {
        assert!(Netns::open(Path::new("/proc/self/ns/no-such")).is_err());
    }

    #[tokio::test]
    async fn file_that_is_no_namespace_is_not_entered() {
        let netns = Netns::open(Path::new("/proc/self/status")).unwrap();
        let entered = on_thread("test", move || netns.enter()).await.unwrap();
        assert!(entered.is_err());
    }

    #[tokio::test]
    async fn panic_on_a_thread_is_an_error() {
        let done = on_thread("test", || -> u32 { panic!("as the test wants it") }).await;
        assert!(done.is_err());
    }
}
