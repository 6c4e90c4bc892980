//! Who the process is: capabilities, user and groups.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{OrFail, Step, refusal};
use crate::oci::{Capabilities, Process};

/// Gives pipes to the process's user, so that it can open them again as /dev/stdout.
pub(super) fn own_streams(process: &Process, streams: &[OwnedFd; 3]) -> Step {
    for stream in streams {
        let stat = rustix::fs::fstat(stream).or_fail(|| "look at a standard stream".into())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
            let owner = Uid::from_raw(process.user.uid);
            match rustix::fs::fchown(stream.as_fd(), Some(owner), None) {
                // A pipe from outside of the user namespace can't be given away in it.
                Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
                Err(error) => {
                    return Err(error).or_fail(|| "give the streams to the user".into());
                }
            }
        }
    }
    Ok(())
}

/// Takes what the bounding set does not list from everything that is ever executed.
pub(super) fn bound_capabilities(process: &Process) -> Step {
    let keep = bits_of(process, |sets| &sets.bounding);
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) if !keep.contains(capability) => {
                rustix::thread::remove_capability_from_bounding_set(capability)
                    .or_fail(|| format!("drop capability {bit} from the bounding set"))?;
            }
            Ok(_) => {}
            // The kernel's last capability was the one before.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Becomes the user, with exactly the capabilities listed.
pub(super) fn switch(process: &Process) -> Step {
    let user = &process.user;
    if user.uid == u32::MAX || user.gid == u32::MAX {
        return Err(refusal(format!("user {}:{} can't be", user.uid, user.gid)));
    }
    let groups: Vec<Gid> = user
        .additional_gids
        .iter()
        .map(|&gid| Gid::from_raw(gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_keep_capabilities(true)
        .or_fail(|| "keep capabilities over the change of user".into())?;
    if let Err(error) = rustix::thread::set_thread_groups(&groups) {
        // A user namespace may forbid setgroups; with no groups wanted nothing is lost.
        if !(groups.is_empty() && error == Errno::PERM) {
            return Err(cannot_become("set the additional groups", error));
        }
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(|error| cannot_become(&format!("become group {}", user.gid), error))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .map_err(|error| cannot_become(&format!("become user {}", user.uid), error))?;
    rustix::thread::set_keep_capabilities(false).or_fail(|| "stop keeping capabilities".into())?;
    set_capabilities(process)?;
    rustix::process::umask(Mode::from_raw_mode(user.umask.unwrap_or(UMASK_USUAL)));
    Ok(())
}

/// What runc sets where the spec names none.
const UMASK_USUAL: u32 = 0o022;

fn cannot_become(step: &str, error: Errno) -> super::Failure {
    let hint = match error {
        Errno::INVAL => ": it is not mapped in the container's user namespace",
        _ => "",
    };
    refusal(format!(
        "cannot {step}: {}{hint}",
        std::io::Error::from(error)
    ))
}

fn set_capabilities(process: &Process) -> Step {
    let held = rustix::thread::capabilities(None)
        .or_fail(|| "read the capabilities".into())?
        .permitted;
    // What this process never had can't be given. A profile may name newer ones.
    let permitted = bits_of(process, |sets| &sets.permitted) & held;
    let inheritable = bits_of(process, |sets| &sets.inheritable) & held;
    let sets = CapabilitySets {
        effective: bits_of(process, |sets| &sets.effective) & permitted,
        permitted,
        inheritable,
    };
    rustix::thread::set_capabilities(None, sets).or_fail(|| "set the capabilities".into())?;
    rustix::thread::clear_ambient_capability_set()
        .or_fail(|| "clear the ambient capabilities".into())?;
    let ambient = bits_of(process, |sets| &sets.ambient) & permitted & inheritable;
    for capability in ambient.iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)
            .or_fail(|| "set the ambient capabilities".into())?;
    }
    Ok(())
}

/// One of the spec's sets; a spec without any gives none.
fn bits_of(process: &Process, set: fn(&Capabilities) -> &Vec<String>) -> CapabilitySet {
    process
        .capabilities
        .as_ref()
        .map_or(CapabilitySet::empty(), |sets| set_of(set(sets)))
}

/// Names that are not known are passed over, as other runtimes do.
fn set_of(names: &[String]) -> CapabilitySet {
    names
        .iter()
        .filter_map(|name| {
            let bit = CAPABILITIES.iter().position(|known| known == name)?;
            Some(CapabilitySet::from_bits_retain(1 << bit))
        })
        .collect()
}

/// linux/capability.h, in order.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_capability_is_passed_over() {
        let names = ["CAP_FLY".to_owned(), "CAP_CHOWN".to_owned()];
        assert_eq!(set_of(&names), CapabilitySet::CHOWN);
    }

    #[test]
    fn table_is_in_the_kernels_order() {
        let last = set_of(&["CAP_CHECKPOINT_RESTORE".to_owned()]);
        assert_eq!(last.bits(), 1 << 40);
        assert_eq!(
            set_of(&["CAP_SYS_ADMIN".to_owned()]),
            CapabilitySet::SYS_ADMIN
        );
    }

    #[test]
    fn impossible_user_is_refused_before_anything_changes() {
        let mut process = Process::default();
        process.user.uid = u32::MAX;
        assert!(switch(&process).unwrap_err().is_request_at_fault);
    }
}
