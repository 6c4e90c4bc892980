//! startContainer hooks: programs of the container, run in its namespaces and as its process, right
//! before that becomes what it was made for.

use std::path::Path;

use husk_hook::Ending;

use super::{OrFail, Step, refusal};
use crate::plan::{HookState, StartHooks};

/// Runs them in their order, up to the first that fails.
pub(super) fn run(hooks: &StartHooks) -> Step {
    let state = HookState {
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        ..hooks.state.clone()
    };
    let state = serde_json::to_vec(&state).or_fail(|| "write the state for hooks".into())?;
    for (index, hook) in hooks.hooks.iter().enumerate() {
        let failed = |reason: String| {
            let name = format!("startContainer hook #{index} {:?}", hook.path);
            Err(refusal(format!("{name} {reason}")))
        };
        // Where the process is already.
        match hook.run(&state, Path::new(".")) {
            Ok(Ending::Success) => {}
            Ok(ending) => return failed(format!("failed: {ending}")),
            Err(error) => return failed(format!("cannot be run: {error}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use husk_hook::Hook;

    use super::*;

    fn hooks(scripts: &[&str]) -> StartHooks {
        let hook = |script: &&str| Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/bin:/usr/bin".to_owned()],
            timeout: None,
        };
        StartHooks {
            hooks: scripts.iter().map(hook).collect(),
            state: HookState::default(),
        }
    }

    #[test]
    fn failing_hook_is_named_with_its_last_words() {
        let hooks = hooks(&["true", "echo no luck; exit 3", "exit 4"]);
        assert_eq!(
            run(&hooks).unwrap_err().text,
            r#"startContainer hook #1 "/bin/sh" failed: exit status 3, last words: no luck"#
        );
    }

    #[test]
    fn missing_hook_is_named() {
        let mut hooks = hooks(&["true"]);
        hooks.hooks[0].path = "/no/such".into();
        let text = run(&hooks).unwrap_err().text;
        assert!(text.contains("\"/no/such\" cannot be run"), "{text}");
    }

    #[test]
    fn hook_reads_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("state");
        run(&hooks(&[&format!("cat > {}", file.display())])).unwrap();
        let state: HookState = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(state.pid, std::process::id().cast_signed());
    }
}
