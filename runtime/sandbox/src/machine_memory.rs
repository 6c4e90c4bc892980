//! The virtual machine's memory, as it follows the limits of its containers.
//!
//! A machine starts with what its pod's limit asks for, which may change, or not have been known. What
//! the limits of its containers come to, and what the guest needs for itself, is what it is to have:
//! never less than it started with, nor more than the host's settings allow. A guest takes memory before
//! a limit is raised and gives it back once one is lower, in its own time and as far as it can.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use crate::pod::with_overhead;
use crate::{ContainerError, MemoryGrowth, Sandbox};

/// What the machine has and why.
#[derive(Debug)]
pub(crate) struct MachineMemory {
    started_mib: u32,
    growth: MemoryGrowth,
    /// What the guest was asked to have.
    asked_mib: u32,
    /// In bytes, of the containers that have one.
    limits: HashMap<String, i64>,
}

impl MachineMemory {
    pub(crate) fn new(started_mib: u32, growth: MemoryGrowth) -> Self {
        Self {
            started_mib,
            growth,
            asked_mib: started_mib,
            limits: HashMap::new(),
        }
    }

    /// What the machine is to have while a container has this limit, whatever it had before.
    fn wanted_with(&self, container: &str, limit: i64) -> u32 {
        let others = self.limits.iter().filter(|(id, _)| *id != container);
        let limits = others.map(|(_, limit)| *limit);
        self.wanted_for(limits.fold(limit, i64::saturating_add))
    }

    /// What the machine is to have.
    fn wanted(&self) -> u32 {
        let limits = self.limits.values().copied();
        match limits.fold(0, i64::saturating_add) {
            0 => self.started_mib,
            sum => self.wanted_for(sum),
        }
    }

    fn wanted_for(&self, limit: i64) -> u32 {
        let most = self.growth.max_mib.max(self.started_mib);
        let wanted = with_overhead(limit, self.growth.overhead_mib);
        wanted.map_or(most, |wanted| wanted.clamp(self.started_mib, most))
    }
}

impl Sandbox {
    /// Changes a container's limits with `update`, in a machine that has what they let it have.
    pub(crate) async fn update_in_room(
        &self,
        container: &str,
        resources: &LinuxResources,
        update: impl Future<Output = Result<(), ContainerError>>,
    ) -> Result<(), ContainerError> {
        let Some(limit) = limit_of(resources) else {
            return update.await;
        };
        let mut memory = self.machine_memory.lock().await;
        self.grow(&mut memory, container, limit).await?;
        let updated = update.await;
        if updated.is_ok() {
            memory.limits.insert(container.to_owned(), limit);
        }
        self.shrink(&mut memory).await;
        updated
    }

    /// Makes room for a container that is to be made. One for which there is none is made nevertheless:
    /// its limit is not a promise.
    pub(crate) async fn make_room(&self, container: &str, resources: Option<&LinuxResources>) {
        let Some(limit) = resources.and_then(limit_of) else {
            return;
        };
        let mut memory = self.machine_memory.lock().await;
        if let Err(error) = self.grow(&mut memory, container, limit).await {
            tracing::warn!(container, %error, "there is less memory than the container may have");
        }
        memory.limits.insert(container.to_owned(), limit);
    }

    /// Gives back what a container needed that is not there any more.
    pub(crate) async fn take_back_room(&self, container: &str) {
        let mut memory = self.machine_memory.lock().await;
        if memory.limits.remove(container).is_some() && self.vmm.end().is_none() {
            self.shrink(&mut memory).await;
        }
    }

    async fn grow(
        &self,
        memory: &mut MachineMemory,
        container: &str,
        limit: i64,
    ) -> Result<(), ContainerError> {
        let wanted = memory.wanted_with(container, limit);
        if wanted <= memory.asked_mib {
            return Ok(());
        }
        let grown = self.vmm.resize_memory(wanted).await;
        if let Err(text) = grown {
            // What it has taken by now, it is to give back.
            if let Err(error) = self.vmm.resize_memory(memory.asked_mib).await {
                tracing::warn!(error, "the guest can't be told to give memory back");
            }
            return Err(match self.vmm.end() {
                Some(end) => ContainerError::VmGone(end),
                None => ContainerError::Vmm {
                    call: "have the guest take more memory",
                    text,
                },
            });
        }
        tracing::debug!(memory_mib = wanted, "the guest has more memory");
        memory.asked_mib = wanted;
        Ok(())
    }

    /// No error to whoever lowers a limit: it holds in any case.
    async fn shrink(&self, memory: &mut MachineMemory) {
        let wanted = memory.wanted();
        if wanted >= memory.asked_mib {
            return;
        }
        match self.vmm.resize_memory(wanted).await {
            Ok(()) => memory.asked_mib = wanted,
            Err(error) => tracing::warn!(error, "the guest can't be told to give memory back"),
        }
    }
}

/// The limit of memory that resources set. Where they take one away, the machine stays as it is.
fn limit_of(resources: &LinuxResources) -> Option<i64> {
    let memory = resources.memory().as_ref();
    let limit = memory.and_then(LinuxMemory::limit);
    limit.filter(|limit| *limit > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: i64 = 1 << 20;

    /// A machine of 256 MiB that may have 1 GiB.
    fn memory() -> MachineMemory {
        let growth = MemoryGrowth {
            max_mib: 1024,
            overhead_mib: 64,
        };
        MachineMemory::new(256, growth)
    }

    #[test]
    fn machine_has_what_its_limits_come_to_within_its_bounds() {
        let mut memory = memory();
        assert_eq!(memory.wanted(), 256);
        for (limit, wanted) in [
            (1, 256),
            (192 * MIB, 256),
            (192 * MIB + 1, 257),
            (512 * MIB, 576),
            (960 * MIB, 1024),
            (2048 * MIB, 1024),
            (i64::MAX, 1024),
        ] {
            assert_eq!(memory.wanted_with("a", limit), wanted, "{limit}");
        }
        memory.limits.insert("a".to_owned(), 300 * MIB);
        assert_eq!(memory.wanted_with("b", 200 * MIB), 564);
        assert_eq!(memory.wanted_with("a", 200 * MIB), 264);
        assert_eq!(memory.wanted_with("b", i64::MAX), 1024);
        assert_eq!(memory.wanted(), 364);
        memory.limits.remove("a");
        assert_eq!(memory.wanted(), 256);
    }

    #[test]
    fn machine_that_may_not_grow_stays_as_it_is() {
        let memory = MachineMemory::new(256, MemoryGrowth::default());
        assert_eq!(memory.wanted_with("a", 512 * MIB), 256);
        assert_eq!(memory.wanted_with("a", i64::MAX), 256);
        let smaller = MemoryGrowth {
            max_mib: 128,
            overhead_mib: 64,
        };
        let memory = MachineMemory::new(256, smaller);
        assert_eq!(memory.wanted_with("a", 512 * MIB), 256);
    }

    #[test]
    fn only_a_limit_counts() {
        let limit = |resources| limit_of(&serde_json::from_value(resources).unwrap());
        assert_eq!(limit(json!({})), None);
        assert_eq!(limit(json!({ "memory": {} })), None);
        assert_eq!(limit(json!({ "memory": { "limit": -1 } })), None);
        assert_eq!(limit(json!({ "memory": { "limit": 0 } })), None);
        assert_eq!(limit(json!({ "memory": { "limit": 5 } })), Some(5));
    }
}
