//! The one way to start a thread.
//!
//! Each has a name, binds itself to the rules of its kind before anything else, and has an owner
//! that waits for its end with a deadline.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::seccomp::ThreadKind;

/// Called first on each new thread, with its kind: the place to install its system call filter.
/// It must not return if that fails.
pub type ThreadSetup = Arc<dyn Fn(ThreadKind) + Send + Sync>;

/// Linux keeps 15 bytes of a thread's name.
const NAME_BYTES_MAX: usize = 15;

/// A thread that runs.
pub(crate) struct Thread {
    join: JoinHandle<()>,
    /// Closed when the thread is over.
    ended: mpsc::Receiver<()>,
}

/// The thread did not end in time.
#[derive(Debug, thiserror::Error)]
#[error("thread {name} has not ended within {deadline:?}")]
pub struct StuckThread {
    /// Its name.
    pub name: String,
    /// How long it was given.
    pub deadline: Duration,
}

impl Thread {
    /// Starts a thread that runs `body`.
    pub(crate) fn spawn(
        kind: ThreadKind,
        name: &str,
        setup: &ThreadSetup,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let setup = Arc::clone(setup);
        // Nothing is ever sent: the thread drops the sender, whichever way it ends.
        let (alive, ended) = mpsc::channel::<()>();
        let name: String = name.chars().take(NAME_BYTES_MAX).collect();
        let join = thread::Builder::new().name(name).spawn(move || {
            let _alive = alive;
            setup(kind);
            body();
        })?;
        Ok(Self { join, ended })
    }

    pub(crate) fn name(&self) -> &str {
        self.join.thread().name().unwrap_or_default()
    }

    pub(crate) fn handle(&self) -> &JoinHandle<()> {
        &self.join
    }

    /// Waits for the end of the thread, which its owner must have asked for.
    pub(crate) fn join_within(self, deadline: Duration) -> Result<(), StuckThread> {
        match self.ended.recv_timeout(deadline) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                // A panic was printed when it happened; the thread's work is over in any case.
                let _ = self.join.join();
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => Err(StuckThread {
                name: self.name().to_owned(),
                deadline,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn no_setup() -> ThreadSetup {
        Arc::new(|_| {})
    }

    #[test]
    fn setup_comes_before_the_body() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let (first, second) = (Arc::clone(&order), Arc::clone(&order));
        let setup: ThreadSetup =
            Arc::new(move |kind| first.lock().unwrap().push(format!("{kind:?}")));

        let thread = Thread::spawn(ThreadKind::Vcpu, "test", &setup, move || {
            second.lock().unwrap().push("body".to_owned());
        })
        .unwrap();
        thread.join_within(DEADLINE).unwrap();

        assert_eq!(*order.lock().unwrap(), ["Vcpu", "body"]);
    }

    #[test]
    fn a_thread_that_does_not_end_is_named() {
        let (release, wait) = mpsc::channel::<()>();
        let thread = Thread::spawn(ThreadKind::Device, "sleeper", &no_setup(), move || {
            let _ = wait.recv();
        })
        .unwrap();

        let stuck = thread.join_within(Duration::ZERO).unwrap_err();

        assert_eq!(stuck.name, "sleeper");
        drop(release);
    }

    #[test]
    fn a_thread_that_panics_has_ended() {
        let thread = Thread::spawn(ThreadKind::Device, "faulty", &no_setup(), || {
            panic!("on purpose")
        })
        .unwrap();

        thread.join_within(DEADLINE).unwrap();
    }
}
