//! What the guest's processor says of itself.
//!
//! It is the host's processor as far as KVM can present it, with the machine's own topology: one
//! package, a core for each virtual CPU, no hyper-threads.

use kvm_bindings::CpuId;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
use kvm_bindings::kvm_cpuid_entry2;

/// Facts about the machine that show in CPUID.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) vcpus: u8,
    /// KVM's timer in the local APIC can be set by a point in time.
    pub(super) has_tsc_deadline: bool,
    /// Zero if the host does not know it.
    pub(super) tsc_khz: u32,
}

/// KVM's interrupt controller counts at this frequency, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_PERFORMANCE_MONITORING: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const HYPER_THREADING: u32 = 1 << 28;

/// Levels of the topology leaves, in ECX.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The level of a cache that all cores share.
const SHARED_CACHE_LEVEL: u32 = 3;

/// KVM's table for the virtual CPU `id` of this machine.
pub(super) fn of_vcpu(supported: &CpuId, facts: Facts, id: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|entry| !is_topology(entry.function) && entry.function != LEAF_TIMING)
        .collect();
    for entry in &mut entries {
        patch(entry, facts, id);
    }
    let has_topology = |leaf| supported.as_slice().iter().any(|e| e.function == leaf);
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
        if has_topology(leaf) {
            entries.extend(topology(leaf, facts, id));
        }
    }
    if facts.tsc_khz > 0 {
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TIMING,
            eax: facts.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    entries
}

/// Bits an APIC id takes within the package.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

fn is_topology(leaf: u32) -> bool {
    leaf == LEAF_TOPOLOGY || leaf == LEAF_TOPOLOGY_V2
}

fn patch(entry: &mut kvm_cpuid_entry2, facts: Facts, id: u8) {
    let vcpus = u32::from(facts.vcpus);
    let id = u32::from(id);
    match entry.function {
        LEAF_FEATURES => {
            // EBX: APIC id, addressable ids in the package; the lower half stays.
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (vcpus << 16);
            entry.ecx |= HYPERVISOR;
            set(&mut entry.ecx, TSC_DEADLINE, facts.has_tsc_deadline);
            set(&mut entry.edx, HYPER_THREADING, vcpus > 1);
        }
        LEAF_CACHES => {
            share_cache(entry, vcpus);
            // EAX, 31 to 26: addressable cores in the package, less one.
            let cores = (1 << id_bits(facts.vcpus)) - 1;
            entry.eax = (entry.eax & !(0x3f << 26)) | (cores.min(0x3f) << 26);
        }
        LEAF_AMD_CACHES => share_cache(entry, vcpus),
        LEAF_PERFORMANCE_MONITORING => {
            // The guest has no performance counters.
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        LEAF_HYPERVISOR if facts.tsc_khz > 0 => {
            // EAX: the highest leaf.
            entry.eax = entry.eax.max(LEAF_TIMING);
        }
        LEAF_AMD_SIZES => {
            // ECX: bits of the APIC id that name a core; cores, less one.
            entry.ecx = (id_bits(facts.vcpus) << 12) | (vcpus - 1);
        }
        LEAF_AMD_TOPOLOGY => {
            // EBX: one thread per core, and the core. ECX: one node.
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
}

/// EAX, 25 to 14: ids that share the cache, less one. Bits 7 to 5: its level.
fn share_cache(entry: &mut kvm_cpuid_entry2, vcpus: u32) {
    let level = (entry.eax >> 5) & 0x7;
    let sharing = if level >= SHARED_CACHE_LEVEL {
        vcpus - 1
    } else {
        0
    };
    entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
}

/// The levels thread and core, and the end.
fn topology(leaf: u32, facts: Facts, id: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, ids, kind| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: ids,
        ecx: index | kind,
        edx: u32::from(id),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, id_bits(facts.vcpus), u32::from(facts.vcpus), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bit: u32, is_set: bool) {
    if is_set {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        vcpus: 3,
        has_tsc_deadline: true,
        tsc_khz: 2_000_000,
    };

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ..Default::default()
        }
    }

    fn patched(supported: &[kvm_cpuid_entry2], id: u8) -> Vec<kvm_cpuid_entry2> {
        of_vcpu(&CpuId::from_entries(supported).unwrap(), FACTS, id)
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn features_tell_the_apic_id_and_the_hypervisor() {
        let mut host = entry(1);
        (host.ebx, host.ecx) = (0x1234_5678, 0x40);

        let guest = leaf(&patched(&[host], 2), 1, 0);

        assert_eq!(guest.ebx, 0x0203_5678);
        assert_eq!(guest.ecx, 0x40 | HYPERVISOR | TSC_DEADLINE);
        assert_eq!(guest.edx, HYPER_THREADING);
    }

    #[test]
    fn a_deadline_timer_that_kvm_lacks_is_not_promised() {
        let mut host = entry(1);
        host.ecx = TSC_DEADLINE;
        let facts = Facts {
            has_tsc_deadline: false,
            ..FACTS
        };

        let entries = of_vcpu(&CpuId::from_entries(&[host]).unwrap(), facts, 0);

        assert_eq!(leaf(&entries, 1, 0).ecx, HYPERVISOR);
    }

    #[test]
    fn the_topology_of_the_host_is_replaced() {
        let mut host = entry(LEAF_TOPOLOGY);
        (host.index, host.ebx) = (1, 128);

        let entries = patched(&[host], 1);

        let core = leaf(&entries, LEAF_TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 1));
        let of_leaf = |e: &&kvm_cpuid_entry2| e.function == LEAF_TOPOLOGY;
        assert_eq!(entries.iter().filter(of_leaf).count(), 3);
    }

    #[test]
    fn a_topology_leaf_the_host_lacks_is_not_made() {
        let entries = patched(&[entry(1)], 0);

        assert!(!entries.iter().any(|e| is_topology(e.function)));
    }

    #[test]
    fn timing_is_told_below_the_highest_leaf() {
        let mut host = entry(LEAF_HYPERVISOR);
        host.eax = 0x4000_0001;

        let entries = patched(&[host], 0);

        assert_eq!(leaf(&entries, LEAF_HYPERVISOR, 0).eax, LEAF_TIMING);
        let timing = leaf(&entries, LEAF_TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_000_000, APIC_BUS_KHZ));
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        let cache = |level: u32| {
            let mut entry = entry(LEAF_AMD_CACHES);
            entry.eax = (level << 5) | (0xfff << 14);
            entry
        };

        let entries = patched(&[cache(1), cache(3)], 0);

        let sharing: Vec<_> = entries
            .iter()
            .filter(|entry| entry.function == LEAF_AMD_CACHES)
            .map(|entry| entry.eax >> 14)
            .collect();
        assert_eq!(sharing, [0, 2]);
    }
}
