//! The scenarios.

mod basics;
mod clock;
mod disk_roots;
mod disks;
mod docker;
mod embedded;
mod ends;
mod faults;
mod files;
mod growth;
mod hooks;
mod limits;
mod network;
mod network_later;
mod orphans;
mod pods;
mod pods_faults;
mod pods_filter;
mod pods_many;
mod pods_network;
mod pods_sandboxer;
mod pods_stats;
mod pods_whole;
mod spec_limits;
mod spec_mounts;
mod spec_process;
mod spec_rest;
mod spec_roots;
mod spec_seccomp;
mod stdio;
mod task_api;
mod tasks;
mod vsock;

use anyhow::Result;

use crate::ctr::Ctr;

/// One story with a user in it.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Ctr) -> Result<()>,
    /// About a part that other runtimes don't have.
    pub(crate) is_husk_only: bool,
    /// When it runs.
    pub(crate) tier: Tier,
    /// The oldest containerd that can do its part.
    since: Version,
}

/// Major and minor number.
type Version = (u32, u32);

/// The first with the CRI v1 calls that the kubelet's client makes (GetContainerEvents), and with a `ctr`
/// that passes on all of a spec's process.
const CONTAINERD_1_7: Version = (1, 7);

/// The first of the testbed's whose CRI takes pods of the Sandbox API.
const CONTAINERD_2_1: Version = (2, 1);

/// How often a scenario is worth its time. A run of one tier has those before it as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Differs with containerd: on each version, every time.
    Core,
    /// On one version of containerd, every time.
    Whole,
    /// Takes so long that it has to be asked for.
    Full,
}

impl Tier {
    /// The tier that the command line calls so.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "core" => Some(Self::Core),
            "whole" => Some(Self::Whole),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

impl Scenario {
    const fn core(mut self) -> Self {
        self.tier = Tier::Core;
        self
    }

    const fn full(mut self) -> Self {
        self.tier = Tier::Full;
        self
    }

    const fn since(mut self, version: Version) -> Self {
        self.since = version;
        self
    }

    /// Whether a containerd of that version, as the testbed names it, can do its part. One that is not
    /// named is a new one.
    pub(crate) fn is_for(&self, containerd: &str) -> bool {
        let number = |text: &str| text.parse::<u32>().ok();
        let version = containerd
            .split_once('.')
            .and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
        version.is_none_or(|version| version >= self.since)
    }
}

const fn both(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    Scenario {
        name,
        run,
        is_husk_only: false,
        tier: Tier::Whole,
        since: (0, 0),
    }
}

/// One that needs CRI.
const fn both_pods(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    both(name, run).since(CONTAINERD_1_7)
}

const fn husk_pods(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    husk(name, run).since(CONTAINERD_1_7)
}

const fn husk(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    Scenario {
        is_husk_only: true,
        ..both(name, run)
    }
}

/// All of them, in the order they run.
pub(crate) const ALL: &[Scenario] = &[
    both("own_kernel", |ctr| basics::own_kernel(ctr)).core(),
    both("exit_status", |ctr| basics::exit_status(ctr)).core(),
    both("signal_status", |ctr| basics::signal_status(ctr)).core(),
    both("missing_command", |ctr| basics::missing_command(ctr)).core(),
    both("missing_image", |ctr| basics::missing_image(ctr)),
    both("bad_user", |ctr| basics::bad_user(ctr)),
    both("streams_apart", |ctr| basics::streams_apart(ctr)).core(),
    both("stdin_to_its_end", |ctr| basics::stdin_to_its_end(ctr)).core(),
    both("much_output", |ctr| basics::much_output(ctr)),
    both("environment", |ctr| basics::environment(ctr)).core(),
    both("terminal", |ctr| basics::terminal(ctr)).core(),
    both("exec_kill_ps_rm", |ctr| basics::exec_kill_ps_rm(ctr)).core(),
    both("figures_processes_and_pause", |ctr| {
        tasks::figures_processes_and_pause(ctr)
    })
    .core(),
    both("task_api_codes", |ctr| task_api::codes(ctr)).core(),
    both("events_in_order", |ctr| ends::events_in_order(ctr)).core(),
    both("streams", |ctr| stdio::streams(ctr)),
    husk("streams_out_of_reach", |ctr| {
        vsock::streams_out_of_reach(ctr)
    }),
    both("many_execs", |ctr| stdio::many_execs(ctr)).full(),
    both("very_many_execs", |ctr| stdio::very_many_execs(ctr)).full(),
    both("orphans", |ctr| orphans::orphans(ctr)),
    both("wall_clock", |ctr| clock::wall_clock(ctr)),
    both("full_disk", |ctr| ends::full_disk(ctr)),
    both("shim_stopped", |ctr| ends::shim_stopped(ctr)),
    husk("guest_out_of_memory", |ctr| ends::guest_out_of_memory(ctr)),
    husk("guest_panic", |ctr| ends::guest_panic(ctr)),
    husk("agent_killed", |ctr| ends::agent_killed(ctr)).full(),
    both("spec_limits", |ctr| spec_limits::spec_limits(ctr)),
    both("limits_updated", |ctr| spec_limits::limits_updated(ctr)),
    both("grown_by_update", |ctr| growth::grown_by_update(ctr)),
    both("spec_limits_refused", |ctr| {
        spec_limits::spec_limits_refused(ctr)
    }),
    both("spec_sysctl", |ctr| spec_limits::spec_sysctl(ctr)),
    husk("spec_refusals", |ctr| spec_limits::spec_refusals(ctr)),
    both("spec_seccomp", |ctr| spec_seccomp::spec_seccomp(ctr)),
    both("spec_seccomp_refused", |ctr| {
        spec_seccomp::spec_seccomp_refused(ctr)
    }),
    both("default_seccomp", |ctr| spec_seccomp::default_seccomp(ctr)),
    both("what_a_container_sees", |ctr| {
        limits::what_a_container_sees(ctr)
    }),
    both("out_of_memory", |ctr| limits::out_of_memory(ctr)),
    husk("thrashing", |ctr| limits::thrashing(ctr)),
    both("spec_to_the_letter", |ctr| {
        spec_rest::spec_to_the_letter(ctr)
    }),
    both("process_as_asked_for", |ctr| {
        spec_process::process_as_asked_for(ctr)
    }),
    both("process_of_few_words", |ctr| {
        spec_process::process_of_few_words(ctr)
    }),
    both("exec_as_another", |ctr| spec_process::exec_as_another(ctr)),
    husk("process_of_the_newest_spec", |ctr| {
        spec_process::process_of_the_newest_spec(ctr)
    })
    .since(CONTAINERD_1_7),
    both("roots_anywhere", |ctr| spec_roots::roots_anywhere(ctr)),
    both("user_namespace", |ctr| spec_roots::user_namespace(ctr)),
    both("volume_follows_mounts", |ctr| {
        spec_roots::volume_follows_mounts(ctr)
    }),
    husk("process_that_can_not_be", |ctr| {
        spec_process::process_that_can_not_be(ctr)
    })
    .since(CONTAINERD_1_7),
    both("bind_mounts", |ctr| spec_mounts::bind_mounts(ctr)),
    both("other_mounts", |ctr| spec_mounts::other_mounts(ctr)),
    both("devices", |ctr| spec_mounts::devices(ctr)),
    both("block_devices", |ctr| disks::of_the_spec(ctr)),
    husk("block_devices_refused", |ctr| disks::refused(ctr)),
    both("root_on_a_disk", disk_roots::in_a_file).since(CONTAINERD_1_7),
    both("masked_and_readonly_paths", |ctr| {
        spec_mounts::masked_and_readonly_paths(ctr)
    }),
    both("ten_at_once", |ctr| basics::ten_at_once(ctr)).core(),
    both("file_system", |ctr| files::file_system(ctr)),
    both("debian_work", files::debian_work),
    both("debian_tree", files::debian_tree),
    both("debian_big_tree", files::debian_big_tree).full(),
    both("hooks_each_in_its_place", |ctr| {
        hooks::each_in_its_place(ctr)
    }),
    both("hooks_failing", |ctr| hooks::failing(ctr)),
    husk("hooks_failing_late", |ctr| hooks::failing_late(ctr)),
    both("hooks_after_a_killed_shim", |ctr| {
        hooks::poststop_after_a_killed_shim(ctr)
    }),
    both("network_by_hooks", |ctr| hooks::network_by_hooks(ctr)),
    both("docker_containers", |ctr| docker::containers(ctr)),
    both("docker_long_lived", |ctr| docker::long_lived(ctr)),
    both("shim_killed_while_running", |ctr| {
        faults::shim_killed_while_running(ctr)
    })
    .core(),
    both("containerd_killed_while_running", |ctr| {
        faults::containerd_killed_while_running(ctr)
    })
    .core(),
    both("ends_while_containerd_is_away", |ctr| {
        faults::ends_while_containerd_is_away(ctr)
    })
    .core(),
    husk("vmm_killed_while_running", |ctr| {
        faults::vmm_killed_while_running(ctr)
    })
    .core(),
    husk("missing_guest_image", |ctr| {
        faults::missing_guest_image(ctr)
    }),
    husk("shim_killed_while_starting", |ctr| {
        faults::shim_killed_while_starting(ctr)
    }),
    husk("vmm_killed_while_starting", |ctr| {
        faults::vmm_killed_while_starting(ctr)
    }),
    husk("containerd_killed_while_starting", |ctr| {
        faults::containerd_killed_while_starting(ctr)
    })
    .core(),
    both_pods("pods_two_containers", |ctr| pods::two_containers(ctr)),
    both_pods("pods_shared_processes", |ctr| pods::shared_processes(ctr)),
    husk_pods("pods_orphans", |ctr| orphans::pods_orphans(ctr)),
    both_pods("pods_streams", |ctr| pods::streams(ctr)),
    both_pods("pods_volumes", |ctr| pods::volumes(ctr)),
    both_pods("pods_volume_changes_heard", |ctr| {
        pods::volume_changes_heard(ctr)
    }),
    both_pods("pods_block_devices", |ctr| disks::of_a_pod(ctr)),
    both_pods("pods_roots_on_disks", |ctr| disk_roots::of_a_pod(ctr)),
    both_pods("pods_ports_forwarded", |ctr| {
        pods_network::ports_forwarded(ctr)
    }),
    both_pods("pods_stats", |ctr| pods_stats::stats(ctr)),
    both_pods("pods_packet_filter", |ctr| pods_filter::packet_filter(ctr)),
    both_pods("pods_network_faults", |ctr| {
        pods_faults::network_faults(ctr)
    }),
    both_pods("pods_whole_life", |ctr| pods_whole::whole_life(ctr)),
    both_pods("pods_unprivileged_ping", |ctr| {
        pods_whole::unprivileged_ping(ctr)
    }),
    husk_pods("pods_at_once", |ctr| pods_many::at_once(ctr)).full(),
    husk_pods("pods_killed_at_each_step", |ctr| {
        pods_many::killed_at_each_step(ctr)
    })
    .full(),
    husk_pods("pods_containerd_killed", |ctr| {
        pods_many::containerd_killed(ctr)
    })
    .full(),
    husk_pods("pods_machine_size", |ctr| pods::machine_size(ctr)),
    both_pods("pods_grow", |ctr| growth::pod_grows(ctr)),
    husk_pods("pods_of_the_host", |ctr| pods::of_the_host(ctr)),
    both_pods("pods_without_containerd", |ctr| {
        pods::without_containerd(ctr)
    }),
    husk_pods("pods_killed", |ctr| pods::killed(ctr)),
    husk("pods_sandboxer_shim", |ctr| {
        pods_sandboxer::sandboxer_shim(ctr)
    })
    .core()
    .since(CONTAINERD_2_1),
    both("bridge_of_two_pods", |ctr| network::bridge_of_two_pods(ctr)),
    both("ipv6_only", |ctr| network::ipv6_only(ctr)),
    both("changes_of_a_namespace", |ctr| {
        network_later::changes_of_a_namespace(ctr)
    }),
    both("docker_networks", |ctr| network_later::docker_networks(ctr)),
    both("namespace_that_is_not_there", |ctr| {
        network::namespace_that_is_not_there(ctr)
    }),
    husk("file_that_is_no_namespace", |ctr| {
        network::file_that_is_no_namespace(ctr)
    }),
    husk("namespace_is_used_by_one_pod_at_a_time", |ctr| {
        network::namespace_is_used_by_one_pod_at_a_time(ctr)
    }),
    husk("without_containerd", |ctr| {
        embedded::without_containerd(ctr)
    }),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenario_is_for_its_version_and_newer_ones() {
        let pods = husk_pods("pods", |_| Ok(()));
        assert!(!pods.is_for("1.6"));
        for version in ["1.7", "1.10", "2.1", ""] {
            assert!(pods.is_for(version), "{version:?}");
        }
        assert!(husk("any", |_| Ok(())).is_for("1.6"));
    }
}
