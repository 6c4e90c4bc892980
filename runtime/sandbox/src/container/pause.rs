//! The container that stands for a pod.
//!
//! To containerd it is a task like any other; in the guest there is nothing of it: what it would
//! keep alive, the pod's namespaces, are the guest's own.

use std::time::SystemTime;

use tokio::sync::watch;

use super::INIT;
use crate::{ContainerError, Exit, ListedProcess, VmEnd};

/// Its life.
#[derive(Debug)]
pub(crate) struct Pause {
    pub(super) id: String,
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Running,
    Ended(Exit),
}

impl Pause {
    pub(super) fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            state: watch::Sender::new(State::Created),
        }
    }

    pub(super) fn start(&self) -> Result<(), ContainerError> {
        let started = self.state.send_if_modified(|state| {
            let is_new = *state == State::Created;
            if is_new {
                *state = State::Running;
            }
            is_new
        });
        if started {
            return Ok(());
        }
        Err(ContainerError::Invalid {
            text: format!("{:?} was started before", self.id),
        })
    }

    /// Ends it as Kubernetes' own program for pods would end: of its own will on SIGINT and SIGTERM.
    /// As the first process of a PID namespace it would not get what it does not handle.
    pub(super) fn signal(&self, signal: u32) {
        let status = match signal {
            SIGKILL => STATUS_KILLED,
            SIGINT | SIGTERM => 0,
            _ => return,
        };
        self.end(status);
    }

    fn end(&self, status: u32) {
        self.state.send_if_modified(|state| {
            let is_alive = !matches!(state, State::Ended(_));
            if is_alive {
                let at = SystemTime::now();
                *state = State::Ended(Exit { status, at });
            }
            is_alive
        });
    }

    /// Waits for its end; that of the virtual machine is its end too.
    pub(super) async fn ended(&self, vm_ended: impl Future<Output = VmEnd>) -> Exit {
        let mut states = self.state.subscribe();
        let ended = states.wait_for(|state| matches!(state, State::Ended(_)));
        tokio::select! {
            // The sender lives in self.
            _ = ended => {}
            _ = vm_ended => self.end(STATUS_KILLED),
        }
        match *self.state.borrow() {
            State::Ended(exit) => exit,
            State::Created | State::Running => Exit {
                status: STATUS_KILLED,
                at: SystemTime::now(),
            },
        }
    }

    /// The process that it seems to have, as long as it lives: containerd takes a task without one for
    /// the remains of a failed start, and removes its shim when it restarts.
    pub(super) fn processes(&self) -> Vec<ListedProcess> {
        let init = ListedProcess {
            pid: NO_PID,
            exec_id: Some(INIT.to_owned()),
        };
        match *self.state.borrow() {
            State::Created | State::Running => vec![init],
            State::Ended(_) => Vec::new(),
        }
    }

    /// What can't be done to it.
    pub(super) fn refuse<T>(&self, what: &str) -> Result<T, ContainerError> {
        Err(ContainerError::Invalid {
            text: format!(
                "{:?} stands for a pod, and has no process to {what}",
                self.id
            ),
        })
    }
}

/// There is no process in the guest.
const NO_PID: u32 = 0;

const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// 128 + SIGKILL.
const STATUS_KILLED: u32 = 137;

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    fn end() -> VmEnd {
        VmEnd {
            reason: "test".to_owned(),
            is_clean: false,
        }
    }

    #[test]
    fn it_has_a_process_until_it_ends() {
        let pause = Pause::new("p");
        pause.start().unwrap();
        assert_eq!(pause.processes().len(), 1);
        pause.signal(SIGKILL);
        assert!(pause.processes().is_empty());
    }

    #[test]
    fn second_start_is_refused() {
        let pause = Pause::new("p");
        pause.start().unwrap();
        assert!(pause.start().is_err());
        pause.signal(SIGKILL);
        assert!(pause.start().is_err());
    }

    #[tokio::test]
    async fn first_signal_that_ends_it_is_its_status() {
        for (signals, status) in [
            ([SIGKILL, SIGTERM], STATUS_KILLED),
            ([SIGTERM, SIGKILL], 0),
            ([1, SIGINT], 0),
        ] {
            let pause = Pause::new("p");
            for signal in signals {
                pause.signal(signal);
            }
            assert_eq!(pause.ended(pending()).await.status, status, "{signals:?}");
        }
    }

    #[tokio::test]
    async fn end_of_the_machine_is_its_end() {
        let pause = Pause::new("p");
        pause.start().unwrap();
        assert_eq!(pause.ended(ready(end())).await.status, STATUS_KILLED);
        assert_eq!(pause.ended(pending()).await.status, STATUS_KILLED);
    }
}
