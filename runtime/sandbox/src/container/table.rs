//! What the host remembers of a sandbox's containers and processes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::pause::Pause;
use crate::control::StreamEnd;
use crate::hooks::Lifecycle;
use crate::{ContainerError, SpecError};

/// The containers by id.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    /// Each with its processes by exec id; the empty one is init's.
    containers: HashMap<String, HashMap<String, Process>>,
    /// By container.
    hooks: HashMap<String, Lifecycle>,
    /// The one that stands for the pod, if there is one.
    pause: Option<Arc<Pause>>,
    /// The init processes, by their pids in the guest, of containers with a PID namespace of their
    /// own.
    namespace_inits: HashMap<String, u32>,
}

/// A process's streams.
#[derive(Debug, Default)]
pub(crate) struct Process {
    /// See [`ProcessIo::stdin_keeper`](crate::ProcessIo).
    pub(crate) stdin_keeper: Option<OwnedFd>,
    /// The ends of its output streams.
    pub(crate) outputs: Vec<StreamEnd>,
}

impl Containers {
    /// Takes a container's name, with that of its init.
    pub(crate) fn reserve(&mut self, id: &str) -> Result<(), ContainerError> {
        if self.containers.contains_key(id) {
            return Err(ContainerError::AlreadyExists {
                what: "container",
                id: id.to_owned(),
            });
        }
        let init = HashMap::from([(String::new(), Process::default())]);
        self.containers.insert(id.to_owned(), init);
        Ok(())
    }

    /// Takes a process's name.
    pub(crate) fn reserve_process(
        &mut self,
        container: &str,
        exec_id: &str,
    ) -> Result<(), ContainerError> {
        let processes = self
            .containers
            .get_mut(container)
            .ok_or_else(|| not_found("container", container))?;
        if processes.contains_key(exec_id) {
            return Err(ContainerError::AlreadyExists {
                what: "process",
                id: exec_id.to_owned(),
            });
        }
        processes.insert(exec_id.to_owned(), Process::default());
        Ok(())
    }

    /// A process that is there.
    pub(crate) fn process(
        &mut self,
        container: &str,
        exec_id: &str,
    ) -> Result<&mut Process, ContainerError> {
        self.containers
            .get_mut(container)
            .ok_or_else(|| not_found("container", container))?
            .get_mut(exec_id)
            .ok_or_else(|| not_found("process", exec_id))
    }

    /// Whether a process is there.
    pub(crate) fn check(&mut self, container: &str, exec_id: &str) -> Result<(), ContainerError> {
        self.process(container, exec_id).map(|_| ())
    }

    /// Remembers the hooks of a container that is there now.
    pub(crate) fn keep_hooks(&mut self, container: &str, hooks: Lifecycle) {
        self.hooks.insert(container.to_owned(), hooks);
    }

    pub(crate) fn hooks(&self, container: &str) -> Option<Lifecycle> {
        self.hooks.get(container).cloned()
    }

    pub(super) fn set_pause(&mut self, pause: Arc<Pause>) {
        self.pause = Some(pause);
    }

    /// The container that stands for the pod, if that is it.
    pub(super) fn pause(&self, container: &str) -> Option<Arc<Pause>> {
        let is_it = |pause: &&Arc<Pause>| pause.id == container;
        self.pause.as_ref().filter(is_it).cloned()
    }

    /// Remembers the init of a PID namespace of its own.
    pub(super) fn set_namespace_init(&mut self, container: &str, pid: u32) {
        self.namespace_inits.insert(container.to_owned(), pid);
    }

    /// Whose PID namespace a container joins that names the pod's: the pod's, or that of the only
    /// container with one of its own. The pod's containers share one, or none does; so a container
    /// that joins one where another has its own is there to look into that other.
    pub(super) fn pids_to_join(&self) -> Result<Option<u32>, ContainerError> {
        let mut inits = self.namespace_inits.values();
        match (inits.next(), inits.next()) {
            (init, None) => Ok(init.copied()),
            (_, Some(_)) => Err(SpecError::Unsupported {
                what: "linux.namespaces, pid".to_owned(),
                reason: "which of the pod's containers is meant can't be told; a container of a \
                         pod with several can be joined only if they share their processes",
            }
            .into()),
        }
    }

    pub(crate) fn remove(&mut self, container: &str) {
        if self.pause(container).is_some() {
            self.pause = None;
        }
        self.namespace_inits.remove(container);
        self.hooks.remove(container);
        self.containers.remove(container);
    }

    pub(crate) fn remove_process(&mut self, container: &str, exec_id: &str) {
        if let Some(processes) = self.containers.get_mut(container) {
            processes.remove(exec_id);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.hooks.clear();
        self.pause = None;
        self.namespace_inits.clear();
        self.containers.clear();
    }
}

fn not_found(what: &'static str, id: &str) -> ContainerError {
    ContainerError::NotFound {
        what,
        id: id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn kind<T>(result: Result<T, ContainerError>) -> Option<ErrorKind> {
        result.err().map(|error| error.kind())
    }

    #[test]
    fn unknown_names_are_not_found() {
        let mut containers = Containers::default();
        assert_eq!(kind(containers.check("c", "")), Some(ErrorKind::NotFound));
        let reserved = containers.reserve_process("c", "e");
        assert_eq!(kind(reserved), Some(ErrorKind::NotFound));
        containers.reserve("c").unwrap();
        assert_eq!(kind(containers.check("c", "e")), Some(ErrorKind::NotFound));
    }

    #[test]
    fn names_are_taken_once() {
        let mut containers = Containers::default();
        containers.reserve("c").unwrap();
        containers.reserve_process("c", "e").unwrap();
        let again = containers.reserve("c");
        assert_eq!(kind(again), Some(ErrorKind::AlreadyExists));
        for exec_id in ["", "e"] {
            let again = containers.reserve_process("c", exec_id);
            assert_eq!(kind(again), Some(ErrorKind::AlreadyExists));
        }
    }

    #[test]
    fn pids_are_joined_where_one_can_be_meant() {
        let mut containers = Containers::default();
        assert_eq!(containers.pids_to_join().unwrap(), None);
        containers.set_namespace_init("a", 7);
        assert_eq!(containers.pids_to_join().unwrap(), Some(7));
        containers.set_namespace_init("b", 8);
        assert!(containers.pids_to_join().is_err());
        containers.remove("a");
        assert_eq!(containers.pids_to_join().unwrap(), Some(8));
    }

    #[test]
    fn removed_names_are_free() {
        let mut containers = Containers::default();
        containers.reserve("c").unwrap();
        containers.reserve_process("c", "e").unwrap();
        containers.remove_process("c", "e");
        containers.reserve_process("c", "e").unwrap();
        containers.remove("c");
        containers.reserve("c").unwrap();
        assert_eq!(kind(containers.check("c", "e")), Some(ErrorKind::NotFound));
    }
}
