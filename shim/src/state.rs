//! The life of a task's process: one enum, one table.

/// Where a process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Made, and waiting for its start.
    Created,
    /// Its start is under way.
    Starting,
    /// It runs.
    Running,
    /// Its container is frozen.
    Paused,
    /// It has ended; its exit status is known.
    Stopped,
    /// It is being removed.
    Deleting,
    /// It is removed; only who asked for it meanwhile still sees it.
    Deleted,
}

/// What can happen to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Start was called.
    Start,
    /// The start succeeded.
    Started,
    /// The start failed.
    StartFailed,
    /// Its container was frozen.
    Pause,
    /// Its container was thawed.
    Resume,
    /// It ended.
    Exit,
    /// Delete was called.
    Delete,
    /// The removal is done.
    Deleted,
}

/// A step that the state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {} a process that is {}", self.step.verb(), self.state.name())]
pub(crate) struct Refused {
    state: State,
    step: Step,
}

impl State {
    /// The state after `step`. A pair that is not listed is refused.
    pub(crate) fn after(self, step: Step) -> Result<Self, Refused> {
        use {State as S, Step as E};
        Ok(match (self, step) {
            (S::Created, E::Start) => S::Starting,
            (S::Starting, E::Started) => S::Running,
            // As runc's shim has it: what failed to start can only be deleted.
            (S::Starting, E::StartFailed) => S::Stopped,
            (S::Running, E::Pause) => S::Paused,
            (S::Paused, E::Resume) => S::Running,
            (S::Created | S::Running | S::Paused, E::Exit) => S::Stopped,
            // A container that was never started may be deleted.
            (S::Created | S::Stopped, E::Delete) => S::Deleting,
            (S::Deleting, E::Deleted) => S::Deleted,
            (state, step) => return Err(Refused { state, step }),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
            Self::Deleted => "deleted",
        }
    }
}

impl Step {
    fn verb(self) -> &'static str {
        match self {
            Self::Start | Self::Started | Self::StartFailed => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Exit => "end",
            Self::Delete | Self::Deleted => "delete",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 7] = [
        State::Created,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopped,
        State::Deleting,
        State::Deleted,
    ];
    const STEPS: [Step; 8] = [
        Step::Start,
        Step::Started,
        Step::StartFailed,
        Step::Pause,
        Step::Resume,
        Step::Exit,
        Step::Delete,
        Step::Deleted,
    ];

    /// One row a state, one column a step, in the order above; `.` is refused.
    const TABLE: [&str; 7] = [
        "starting . . . . stopped deleting .",
        ". running stopped . . . . .",
        ". . . paused . stopped . .",
        ". . . . running stopped . .",
        ". . . . . . deleting .",
        ". . . . . . . deleted",
        ". . . . . . . .",
    ];

    #[test]
    fn every_pair_of_state_and_step_is_as_the_table_says() {
        for (state, row) in STATES.into_iter().zip(TABLE) {
            for (step, wanted) in STEPS.into_iter().zip(row.split(' ')) {
                let after = state.after(step).map_or(".", |after| match after {
                    State::Deleting => "deleting",
                    other => other.name(),
                });
                assert_eq!(after, wanted, "{state:?} {step:?}");
            }
        }
    }

    #[test]
    fn refusal_names_step_and_state() {
        let refused = State::Running.after(Step::Delete).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "cannot delete a process that is running"
        );
    }
}
