//! The programs that the spec wants to be run on the host as a container comes and goes.
//!
//! ```text
//! prestart, createRuntime   where the shim is: the container's root is mounted, the pod's network
//!                           namespace is there, and nothing of the container runs
//! createContainer           in the pod's network namespace, and in a mount namespace of its own
//!                           that has the container's root at `root.path`
//! startContainer            in the guest, see the agent's launch stage
//! poststart                 where the shim is, once the process runs
//! poststop                  where the shim is, once nothing of the container is left
//! ```
//!
//! A hook that fails before the process runs is the end of the container; one that fails later is a
//! warning. Everything here blocks.

mod after;
mod place;

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, io};

use husk_hook::{Ending, Hook};
use oci_spec::runtime::{ContainerState, Hooks, Spec};
use serde::{Deserialize, Serialize};

use crate::SpecError;
use crate::error::{cap_text, describe};

pub(crate) use after::{arm_poststop, run_all_poststop, run_poststop};
pub(crate) use place::{StagedRoot, run_while_creating};

/// Why a hook is the end of its container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// It could not be run.
    #[error("{hook} cannot be run")]
    Run {
        /// The hook.
        hook: HookName,
        /// Why.
        source: io::Error,
    },
    /// It has failed.
    #[error("{hook} failed: {ending}")]
    Failed {
        /// The hook.
        hook: HookName,
        /// How it ended, with its last words.
        ending: String,
    },
    /// What must run at the container's end can't be written down.
    #[error("cannot write down the poststop hooks")]
    Arm(#[source] io::Error),
    /// The place in which hooks run could not be made.
    #[error("cannot make the place for the hooks: {step}")]
    Place {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Names a hook to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookName {
    kind: Kind,
    index: usize,
    path: PathBuf,
}

impl fmt::Display for HookName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} hook #{} {:?}",
            self.kind.name(),
            self.index,
            self.path
        )
    }
}

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::CreateContainer,
        Self::StartContainer,
        Self::Poststart,
        Self::Poststop,
    ];

    /// As config.json names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    fn of(self, hooks: &Hooks) -> Vec<Hook> {
        let hooks = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::StartContainer => hooks.start_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        let hooks = hooks.iter().flatten().map(|hook| Hook {
            path: hook.path().clone(),
            args: hook.args().clone().unwrap_or_default(),
            env: hook.env().clone().unwrap_or_default(),
            timeout: hook.timeout(),
        });
        hooks.collect()
    }
}

/// A container's hooks, each of which can be run, and what they are told of the container.
#[derive(Debug, Clone)]
pub(crate) struct Lifecycle {
    hooks: Vec<(Kind, Vec<Hook>)>,
    /// Where the container's root is on the host, as its owner sees it.
    pub(crate) root: PathBuf,
    state: State,
}

/// What hooks read from their standard input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    oci_version: String,
    id: String,
    status: ContainerState,
    /// Of the process that stands for the container on the host; none once it has stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: PathBuf,
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    annotations: serde_json::Map<String, serde_json::Value>,
}

impl Lifecycle {
    /// Takes what concerns hooks from a spec, and checks it.
    pub(crate) fn of(spec: &Spec, id: &str, bundle: &Path) -> Result<Self, SpecError> {
        let listed = spec.hooks().clone().unwrap_or_default();
        let hooks = Kind::ALL.map(|kind| (kind, kind.of(&listed))).to_vec();
        for (kind, hooks) in &hooks {
            if hooks.len() > HOOKS_MAX {
                return Err(refusal(format!("hooks.{}", kind.name()), "too many"));
            }
            for (index, hook) in hooks.iter().enumerate() {
                let named = |reason| refusal(format!("hooks.{}[{index}]", kind.name()), reason);
                hook.check().map_err(named)?;
            }
        }
        let root = spec.root().as_ref().map(|root| root.path().clone());
        let annotations = spec.annotations().iter().flatten();
        Ok(Self {
            hooks,
            root: bundle.join(root.unwrap_or_default()),
            state: State {
                oci_version: spec.version().clone(),
                id: id.to_owned(),
                status: ContainerState::Creating,
                pid: None,
                bundle: bundle.to_owned(),
                annotations: annotations
                    .map(|(key, value)| (key.clone(), value.as_str().into()))
                    .collect(),
            },
        })
    }

    fn hooks(&self, kind: Kind) -> &[Hook] {
        let mut all = self.hooks.iter();
        let hooks = all.find_map(|(listed, hooks)| (*listed == kind).then_some(hooks));
        hooks.map_or(&[], Vec::as_slice)
    }

    pub(crate) fn has(&self, kind: Kind) -> bool {
        !self.hooks(kind).is_empty()
    }

    /// How long hooks of a kind may take, all together.
    pub(crate) fn time_limit(&self, kind: Kind) -> Duration {
        self.hooks(kind).iter().map(Hook::time_limit).sum()
    }

    /// Runs those that must succeed, up to the first that doesn't. `pid` stands for the container.
    pub(crate) fn run(
        &self,
        kind: Kind,
        status: ContainerState,
        pid: u32,
    ) -> Result<(), HookError> {
        let state = State {
            status,
            pid: Some(pid),
            ..self.state.clone()
        };
        let directory = match kind {
            Kind::CreateContainer => &self.root,
            _ => &self.state.bundle,
        };
        run_each(kind, self.hooks(kind), &state, directory).try_for_each(|ended| ended)
    }

    /// Runs those whose failures are warnings.
    pub(crate) fn run_poststart(&self, pid: u32) {
        let state = State {
            status: ContainerState::Running,
            pid: Some(pid),
            ..self.state.clone()
        };
        let hooks = self.hooks(Kind::Poststart);
        warn_of_failures(
            &state.id,
            run_each(Kind::Poststart, hooks, &state, &state.bundle),
        );
    }
}

/// Runs hooks one after the other, as the results are asked for.
fn run_each<'a>(
    kind: Kind,
    hooks: &'a [Hook],
    state: &'a State,
    directory: &'a Path,
) -> impl Iterator<Item = Result<(), HookError>> + 'a {
    hooks.iter().enumerate().map(move |(index, hook)| {
        let name = HookName {
            kind,
            index,
            path: hook.path.clone(),
        };
        let state = serde_json::to_vec(state).map_err(io::Error::from);
        // The bundle may be gone by the time of poststop.
        let directory = if directory.is_dir() {
            directory
        } else {
            Path::new("/")
        };
        match state.and_then(|state| hook.run(&state, directory)) {
            Ok(Ending::Success) => Ok(()),
            Ok(ending) => Err(HookError::Failed {
                hook: name,
                ending: cap_text(&ending.to_string()),
            }),
            Err(source) => Err(HookError::Run { hook: name, source }),
        }
    })
}

fn warn_of_failures(container: &str, ended: impl Iterator<Item = Result<(), HookError>>) {
    for failure in ended.filter_map(Result::err) {
        tracing::warn!(container, "{}", describe(&failure));
    }
}

fn refusal(what: String, reason: &'static str) -> SpecError {
    SpecError::Unsupported { what, reason }
}

/// Most hooks of one kind.
const HOOKS_MAX: usize = 64;

#[cfg(test)]
mod tests;
