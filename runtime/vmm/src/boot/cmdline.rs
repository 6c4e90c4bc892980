//! The kernel's command line.

use std::fmt::Write;

use crate::layout::MMIO_BYTES;
use crate::layout::MMIO_GPA;
use crate::layout::irq_of;

/// What every guest is told:
///
/// * its console is the virtio device, on which only alarming messages appear;
/// * a panic ends the machine at once, by the keyboard controller, which is the way to a reset that
///   needs no firmware;
/// * nothing is probed or waited for at boot that is known: KVM's clock vouches for the TSC, the few
///   tasks of a boot need no batched RCU grace periods, no DMA needs bouncing, and drivers that
///   would make interfaces by themselves make none;
/// * variables of each CPU are in pages of their own: in a huge page, as the kernel would have it, all
///   but a tenth of 2 MiB would be cleared, then given back;
/// * memory that comes while it runs is used at once, three quarters of all for what can be moved, so that
///   it can be given back;
/// * cgroup v1 is not there at all.
const BASE: &str = "console=hvc0 quiet loglevel=4 panic=-1 reboot=k tsc=reliable \
                    rcupdate.rcu_expedited=1 swiotlb=noforce dummy.numdummies=0 ifb.numifbs=0 \
                    percpu_alloc=page memhp_default_state=online \
                    memory_hotplug.online_policy=auto-movable cgroup_no_v1=all";

/// The command line of a machine with `devices` devices, whose registers and lines follow one
/// another as [`crate::layout`] says.
pub(crate) fn device_command_line(devices: usize, extra: &str) -> String {
    let mut line = BASE.to_owned();
    let registers = (MMIO_GPA..).step_by(usize::try_from(MMIO_BYTES).unwrap_or(usize::MAX));
    for (index, start) in registers.take(devices).enumerate() {
        let irq = irq_of(index);
        // Writing to a string does not fail.
        let _ = write!(line, " virtio_mmio.device={MMIO_BYTES}@{start:#x}:{irq}");
    }
    let extra = extra.trim();
    if !extra.is_empty() {
        // What stands before "--" is the kernel's, what follows is for init: so last.
        line.push(' ');
        line.push_str(extra);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{CMDLINE_BYTES_MAX, DEVICES_MAX};

    #[test]
    fn devices_follow_one_another() {
        let line = device_command_line(2, "");

        assert!(line.ends_with(
            " virtio_mmio.device=4096@0xd0000000:5 virtio_mmio.device=4096@0xd0001000:6"
        ));
    }

    #[test]
    fn devices_without_a_line_of_their_own_share_the_last() {
        let line = device_command_line(20, "");

        let lines: Vec<_> = line
            .split(' ')
            .filter_map(|word| word.rsplit_once(':'))
            .collect();
        assert_eq!(lines[17].1, "22");
        assert_eq!((lines[18].1, lines[19].1), ("23", "23"));
    }

    #[test]
    fn all_devices_leave_room_for_words() {
        let line = device_command_line(DEVICES_MAX, "");

        assert!(
            (line.len() as u64) < CMDLINE_BYTES_MAX - 256,
            "{}",
            line.len()
        );
    }

    #[test]
    fn extra_words_come_last() {
        assert!(device_command_line(1, " a b -- c ").ends_with(":5 a b -- c"));
    }
}
