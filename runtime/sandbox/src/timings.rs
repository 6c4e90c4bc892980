//! When the steps of a start were done.

use std::time::Duration;

use husk_vmm_control::BootTimes;

/// The steps of a sandbox's start, in their order, each the moment at which it was done:
/// microseconds of the host's `CLOCK_MONOTONIC`, as [`monotonic_us`](crate::monotonic_us) counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartTimings {
    /// The start was asked for.
    pub asked_us: u64,
    /// The pod's directory, mounts, cgroup and network namespace exist; kernel and initrd are open.
    pub prepared_us: u64,
    /// The VMM process exists.
    pub spawned_us: u64,
    /// It has entered its jail.
    pub jailed_us: u64,
    /// KVM has made the machine.
    pub kvm_us: u64,
    /// Kernel, initrd and tables are in guest memory.
    pub loaded_us: u64,
    /// Devices and threads are there, and confined.
    pub built_us: u64,
    /// The guest's first instruction is about to run.
    pub entered_us: u64,
    /// The agent has answered.
    pub hello_us: u64,
    /// The part of the time up to the agent's answer that the guest counts itself: from its
    /// kernel's first look at the clock to the agent's connection.
    pub guest_own: Duration,
}

impl StartTimings {
    /// The pod's directory, its mounts and cgroup.
    pub fn prepare(&self) -> Duration {
        between(self.asked_us, self.prepared_us)
    }

    /// The VMM process: spawned, machine built, jailed.
    pub fn vmm(&self) -> Duration {
        between(self.prepared_us, self.built_us)
    }

    /// From the guest's first instruction to the agent's answer.
    pub fn guest(&self) -> Duration {
        between(self.built_us, self.hello_us)
    }

    pub(crate) fn set_boot(&mut self, boot: BootTimes) {
        self.jailed_us = boot.jailed_us;
        self.kvm_us = boot.kvm_us;
        self.loaded_us = boot.loaded_us;
        self.built_us = boot.built_us;
    }
}

/// The moments in between come from the VMM process, which may say anything.
fn between(from_us: u64, to_us: u64) -> Duration {
    Duration::from_micros(to_us.saturating_sub(from_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_out_of_order_are_no_time() {
        let timings = StartTimings {
            prepared_us: 7,
            built_us: 3,
            hello_us: 5,
            ..StartTimings::default()
        };
        assert_eq!(timings.vmm(), Duration::ZERO);
        assert_eq!(timings.guest(), Duration::from_micros(2));
    }
}
