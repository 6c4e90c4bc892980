use std::fs;

use nix::mount::MsFlags;
use serde_json::{Value, json};

use super::*;
use crate::mounts::publish;
use crate::mounts::tests::real::{in_own_namespace, points, share};
use crate::netns::Netns;

fn spec(hooks: &Value) -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "annotations": { "a": "b" },
        "hooks": hooks,
    }))
    .unwrap()
}

fn lifecycle(hooks: &Value) -> Result<Lifecycle, SpecError> {
    Lifecycle::of(&spec(hooks), "c1", Path::new("/tmp"))
}

#[test]
fn hooks_that_cannot_be_run_are_refused_by_name() {
    for kind in Kind::ALL {
        let (good, bad) = (
            json!({ "path": "/bin/true" }),
            json!({ "path": "bin/true" }),
        );
        let refused = lifecycle(&json!({ kind.name(): [good, bad] })).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains(&format!("hooks.{}[1]", kind.name())),
            "{text}"
        );
        assert!(text.contains("absolute"), "{text}");
    }
    let many = vec![json!({ "path": "/bin/true" }); HOOKS_MAX + 1];
    assert!(lifecycle(&json!({ "prestart": many })).is_err());
}

#[test]
fn failing_hook_is_named_and_the_last_to_run() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("mark");
    let script = |script: String| json!({ "path": "/bin/sh", "args": ["sh", "-c", script] });
    let hooks = lifecycle(&json!({ "createRuntime": [
        script("true".to_owned()),
        script("echo no such luck >&2; exit 9".to_owned()),
        script(format!(": > {}", mark.display())),
    ] }))
    .unwrap();
    let failure = hooks
        .run(Kind::CreateRuntime, ContainerState::Creating, 7)
        .unwrap_err();
    assert_eq!(
        failure.to_string(),
        r#"createRuntime hook #1 "/bin/sh" failed: exit status 9, last words: no such luck"#
    );
    assert!(!mark.exists());
}

#[test]
fn hook_reads_the_state() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("state");
    let script = format!("PATH=/bin:/usr/bin; cat > {}", file.display());
    let hooks = json!({ "prestart": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    let hooks = lifecycle(&hooks).unwrap();
    hooks
        .run(Kind::Prestart, ContainerState::Creating, 7)
        .unwrap();
    let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let expected = json!({
        "ociVersion": "1.1.0", "id": "c1", "status": "creating", "pid": 7, "bundle": "/tmp",
        "annotations": { "a": "b" },
    });
    assert_eq!(state, expected);
}

#[test]
fn poststop_hooks_run_once_and_without_their_maker() {
    let directory = tempfile::tempdir().unwrap();
    let state_dir = crate::state::StateDir::locate(directory.path(), "ns", "pod").unwrap();
    let file = directory.path().join("told");
    let script = format!("PATH=/bin:/usr/bin; cat >> {}; exit 1", file.display());
    let hooks = json!({ "poststop": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
    let hooks = lifecycle(&hooks).unwrap();
    arm_poststop(&state_dir, &hooks).unwrap();
    run_poststop(&state_dir, "another");
    run_all_poststop(&state_dir);
    run_all_poststop(&state_dir);
    run_poststop(&state_dir, "c1");
    let state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert_eq!(state["status"], "stopped");
    assert_eq!(state.get("pid"), None);
}

#[test]
fn what_hooks_mount_below_the_root_becomes_a_part_of_it() {
    in_own_namespace(|directory| {
        let (layout, shared, staging) = share(directory);
        let [root, extra] = ["rootfs", "extra"].map(|name| directory.join(name));
        for path in [&layout.join("c"), &staging.join("c"), &root, &extra] {
            fs::create_dir(path).unwrap();
        }
        fs::write(extra.join("file"), "").unwrap();
        let staging = staging.join("c");
        let none = None::<&str>;
        nix::mount::mount(Some("x"), &staging, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        for name in ["a", "b"] {
            fs::create_dir(staging.join(name)).unwrap();
        }
        let hook = |name: &str| {
            let script = format!("mount --bind {} {}/{name}", extra.display(), root.display());
            json!({
                "path": "/bin/sh", "args": ["sh", "-c", script],
                "env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"],
            })
        };
        let hooks = spec(&json!({
            "createRuntime": [hook("a")], "createContainer": [hook("b")],
        }));
        let lifecycle = Lifecycle::of(&hooks, "c1", directory).unwrap();
        let netns = Netns::open(Path::new("/proc/thread-self/ns/net")).unwrap();
        let staged = StagedRoot {
            staging: &staging,
            is_in_place: false,
        };

        run_while_creating(&lifecycle, Some(staged), &netns, 7).unwrap();
        assert_eq!(points(&root), Vec::<PathBuf>::new());
        publish(&staging, &shared.join("c")).unwrap();

        assert!(shared.join("c/a/file").exists());
        assert!(shared.join("c/b/file").exists());
    });
}
