//! The records of tasks: what is known of each process, and who is told of its end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::pod::Exit;
use crate::state::{Refused, State, Step};
use crate::stdio::{Held, Paths};

/// One process: a task's init, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) paths: Paths,
    inner: Mutex<Inner>,
    /// The state, for whoever must wait for a change of it.
    state: watch::Sender<State>,
    exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    held: Held,
}

impl Process {
    pub(crate) fn new(paths: Paths, held: Held) -> Arc<Self> {
        Arc::new(Self {
            paths,
            inner: Mutex::new(Inner {
                state: State::Created,
                held,
            }),
            state: watch::Sender::new(State::Created),
            exit: watch::Sender::new(None),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing below panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        self.inner().state
    }

    /// Makes one step of the process's life.
    pub(crate) fn step(&self, step: Step) -> Result<State, Refused> {
        let mut inner = self.inner();
        inner.state = inner.state.after(step)?;
        self.state.send_replace(inner.state);
        Ok(inner.state)
    }

    pub(crate) fn close_stdin(&self) {
        self.inner().held.close_stdin();
    }

    /// Takes away what only kept the streams alive.
    pub(crate) fn release_stdio(&self) -> Held {
        std::mem::take(&mut self.inner().held)
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Records the exit: the only place that does.
    pub(crate) fn record_exit(&self, exit: Exit) {
        // A process that could not be started is stopped already.
        let _ = self.step(Step::Exit);
        self.exit.send_replace(Some(exit));
    }

    /// Answers once the exit is recorded.
    pub(crate) async fn exited(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            // The sender lives in self.
            let _ = exit.changed().await;
        }
    }

    /// Answers once the process is removed.
    pub(crate) async fn deleted(&self) {
        let _ = self
            .state
            .subscribe()
            .wait_for(|state| *state == State::Deleted)
            .await;
    }

    /// Answers once no start is under way.
    pub(crate) async fn not_starting(&self) {
        let _ = self
            .state
            .subscribe()
            .wait_for(|state| *state != State::Starting)
            .await;
    }
}

/// One task: a container with its processes.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) bundle: PathBuf,
    pub(crate) init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Task {
    pub(crate) fn new(bundle: PathBuf, init: Arc<Process>) -> Arc<Self> {
        Arc::new(Self {
            bundle,
            init,
            execs: Mutex::default(),
        })
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process of that exec id; init for the empty one.
    pub(crate) fn process(&self, exec: &str) -> Option<Arc<Process>> {
        if exec.is_empty() {
            return Some(self.init.clone());
        }
        self.execs().get(exec).cloned()
    }

    /// Adds an exec; `false` if the id is taken.
    pub(crate) fn add_exec(&self, exec: &str, process: Arc<Process>) -> bool {
        match self.execs().entry(exec.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(process);
                true
            }
        }
    }

    pub(crate) fn remove_exec(&self, exec: &str) {
        self.execs().remove(exec);
    }

    /// The execs that were started and have not ended.
    pub(crate) fn running_execs(&self) -> Vec<Arc<Process>> {
        self.execs()
            .values()
            .filter(|process| matches!(process.state(), State::Running | State::Paused))
            .cloned()
            .collect()
    }
}
