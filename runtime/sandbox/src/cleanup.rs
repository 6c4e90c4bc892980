//! Removing what a sandbox has left, from nothing but its name.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::process::kill_and_wait;
use crate::state::{StateDir, is_name};
use crate::vmm::KILL_DEADLINE;
use crate::{CleanupError, cgroup, hooks, mounts, network};

/// Removes everything that a sandbox may have left: kills its VMM, gives the network back, unmounts
/// what is below its share, removes its cgroup, runs the poststop hooks of its containers, and removes
/// its directory. Finds all of it from the name alone, whatever was killed at
/// whatever moment, and can be repeated; nothing there is success. A process is killed only if it is
/// the very one that was recorded, not one that has got its pid since.
///
/// Blocks for as long as the VMM takes to die, and the hooks to run.
///
/// # Errors
/// [`CleanupError`]; as much as possible has been removed.
pub fn cleanup(state_dir_root: &Path, namespace: &str, id: &str) -> Result<(), CleanupError> {
    let state =
        StateDir::locate(state_dir_root, namespace, id).map_err(|_| CleanupError::Name {
            name: format!("{namespace}/{id}"),
        })?;
    remove_all(&state)
}

/// Does for one container of a sandbox what its shim, if that is gone, can't do any more: runs its
/// poststop hooks. The rest goes with the sandbox. Can be repeated.
///
/// # Errors
/// [`CleanupError::Name`]
pub fn cleanup_container(
    state_dir_root: &Path,
    namespace: &str,
    sandbox: &str,
    container: &str,
) -> Result<(), CleanupError> {
    let name_error = || CleanupError::Name {
        name: format!("{namespace}/{sandbox}/{container}"),
    };
    let state = StateDir::locate(state_dir_root, namespace, sandbox).map_err(|_| name_error())?;
    if !is_name(container) {
        return Err(name_error());
    }
    let owner = state.read_record().owner;
    if owner.is_none_or(|owner| !matches!(owner.open(), Ok(Some(_)))) {
        hooks::run_poststop(&state, container);
    }
    Ok(())
}

/// The sandboxes of a namespace that have a directory, with whether the process that made them is
/// still there.
///
/// # Errors
/// Those of reading a directory; a missing one has no sandboxes.
pub fn sandboxes(state_dir_root: &Path, namespace: &str) -> io::Result<Vec<(String, bool)>> {
    let entries = match fs::read_dir(state_dir_root.join(namespace)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        // Sockets may be beside them.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let Ok(id) = entry.file_name().into_string() else {
            continue;
        };
        let Ok(state) = StateDir::locate(state_dir_root, namespace, &id) else {
            continue;
        };
        let owner = state.read_record().owner;
        let has_owner = owner.is_some_and(|owner| matches!(owner.open(), Ok(Some(_))));
        found.push((id, has_owner));
    }
    found.retain(|(id, _)| is_name(id));
    Ok(found)
}

/// See [`cleanup`]. Every step is tried; the first error is told.
pub(crate) fn remove_all(state: &StateDir) -> Result<(), CleanupError> {
    // As after every shutdown: what the record tells of has gone before it, and nothing is mounted
    // below a directory that could be removed. To find that out from the host's mounts takes
    // longer the more pods there are.
    if matches!(fs::symlink_metadata(state.path()), Err(error) if error.kind() == io::ErrorKind::NotFound)
    {
        return Ok(());
    }
    let record = state.read_record();
    if let Some(vmm) = &record.vmm {
        let step = |source| step("kill the VMM of", state.path().to_owned(), source);
        if let Some(pidfd) = vmm.open().map_err(step)?
            && !kill_and_wait(&pidfd, KILL_DEADLINE).map_err(step)?
        {
            // What it still uses must not be taken from under it.
            return Err(CleanupError::VmmStays {
                pid: vmm.pid,
                deadline: KILL_DEADLINE,
            });
        }
    }
    if let Some(netns) = &record.netns {
        network::detach(netns);
    }
    let unmounted = mounts::unmount_below(state.path())
        .map_err(|source| step("unmount what is below", state.path().to_owned(), source));
    let cgroup_removed = match &record.cgroup {
        Some(path) => {
            cgroup::remove(path).map_err(|source| step("remove the cgroup", path.clone(), source))
        }
        None => Ok(()),
    };
    hooks::run_all_poststop(state);
    // Files below a mount that is still there are not ours. And without the record there would be
    // no second try.
    unmounted.and(cgroup_removed)?;
    state
        .remove()
        .map_err(|source| step("remove", state.path().to_owned(), source))
}

fn step(operation: &'static str, path: PathBuf, source: io::Error) -> CleanupError {
    CleanupError::Step {
        operation,
        path,
        source,
    }
}
