//! The scenarios.

mod basics;
mod embedded;
mod faults;
mod files;
mod tasks;

use anyhow::Result;

use crate::ctr::Ctr;

/// One story with a user in it.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Ctr) -> Result<()>,
    /// About a part that other runtimes don't have.
    pub(crate) is_husk_only: bool,
}

const fn both(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    Scenario {
        name,
        run,
        is_husk_only: false,
    }
}

const fn husk(name: &'static str, run: fn(&mut Ctr) -> Result<()>) -> Scenario {
    Scenario {
        name,
        run,
        is_husk_only: true,
    }
}

/// All of them, in the order they run.
pub(crate) const ALL: &[Scenario] = &[
    both("own_kernel", |ctr| basics::own_kernel(ctr)),
    both("exit_status", |ctr| basics::exit_status(ctr)),
    both("signal_status", |ctr| basics::signal_status(ctr)),
    both("missing_command", |ctr| basics::missing_command(ctr)),
    both("missing_image", |ctr| basics::missing_image(ctr)),
    both("bad_user", |ctr| basics::bad_user(ctr)),
    both("streams_apart", |ctr| basics::streams_apart(ctr)),
    both("stdin_to_its_end", |ctr| basics::stdin_to_its_end(ctr)),
    both("much_output", |ctr| basics::much_output(ctr)),
    both("environment", |ctr| basics::environment(ctr)),
    both("terminal", |ctr| basics::terminal(ctr)),
    both("exec_kill_ps_rm", |ctr| basics::exec_kill_ps_rm(ctr)),
    both("figures_processes_and_pause", |ctr| {
        tasks::figures_processes_and_pause(ctr)
    }),
    both("ten_at_once", |ctr| basics::ten_at_once(ctr)),
    both("file_system", |ctr| files::file_system(ctr)),
    both("debian_work", files::debian_work),
    both("debian_tree", files::debian_tree),
    both("debian_big_tree", files::debian_big_tree),
    both("shim_killed_while_running", |ctr| {
        faults::shim_killed_while_running(ctr)
    }),
    both("containerd_killed_while_running", |ctr| {
        faults::containerd_killed_while_running(ctr)
    }),
    husk("vmm_killed_while_running", |ctr| {
        faults::vmm_killed_while_running(ctr)
    }),
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
    }),
    husk("without_containerd", |ctr| {
        embedded::without_containerd(ctr)
    }),
];
