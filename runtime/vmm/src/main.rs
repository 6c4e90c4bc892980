//! husk-vmm: one virtual machine in one jailed process. Started by husk, never by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    husk_vmm::process::run()
}
