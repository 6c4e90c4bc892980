//! poststop hooks, which must run even if the process that made the container is gone: what they
//! need is written down before the first hook of the container runs.

use std::path::{Path, PathBuf};
use std::{fs, io};

use husk_hook::Hook;
use oci_spec::runtime::ContainerState;
use serde::{Deserialize, Serialize};

use super::{HookError, Kind, Lifecycle, State, run_each, warn_of_failures};
use crate::state::StateDir;

/// What is written down.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    hooks: Vec<Hook>,
    state: State,
}

/// Sees to it that a container's poststop hooks will run.
pub(crate) fn arm_poststop(state_dir: &StateDir, lifecycle: &Lifecycle) -> Result<(), HookError> {
    let hooks = lifecycle.hooks(Kind::Poststop);
    match hooks.is_empty() {
        true => Ok(()),
        false => write_record(state_dir, lifecycle, hooks).map_err(HookError::Arm),
    }
}

fn write_record(state_dir: &StateDir, lifecycle: &Lifecycle, hooks: &[Hook]) -> io::Result<()> {
    let record = Record {
        hooks: hooks.to_vec(),
        state: State {
            status: ContainerState::Stopped,
            pid: None,
            ..lifecycle.state.clone()
        },
    };
    let path = record_path(state_dir, &record.state.id);
    fs::create_dir_all(state_dir.hooks())?;
    let partial = path.with_extension("new");
    fs::write(&partial, serde_json::to_vec(&record)?)?;
    fs::rename(&partial, &path)
}

/// Runs a container's poststop hooks, if they have not been run.
pub(crate) fn run_poststop(state_dir: &StateDir, container: &str) {
    run_recorded(&record_path(state_dir, container));
}

/// Runs those of all containers.
pub(crate) fn run_all_poststop(state_dir: &StateDir) {
    let Ok(entries) = fs::read_dir(state_dir.hooks()) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            run_recorded(&path);
        }
    }
}

/// The record goes last: hooks that somebody has interrupted run again.
fn run_recorded(path: &Path) {
    let read = fs::read(path).and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?));
    match read {
        Ok(Record { hooks, state }) => {
            let ended = run_each(Kind::Poststop, &hooks, &state, &state.bundle);
            warn_of_failures(&state.id, ended);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => tracing::warn!(?path, %error, "cannot read the poststop hooks"),
    }
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(?path, %error, "cannot remove what was known of the poststop hooks");
    }
}

fn record_path(state_dir: &StateDir, container: &str) -> PathBuf {
    // Ids hold dots: nothing of one may be taken for the extension.
    state_dir.hooks().join(format!("{container}.json"))
}
