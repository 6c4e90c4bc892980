//! Further processes of a container.

use super::*;

#[test]
fn exec_runs_in_the_container() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("entered");
        container.sleep().await?;
        let script = process(&[
            "sh",
            "-c",
            "hostname; cat; cat /proc/self/cgroup | grep 0::; exit 5",
        ]);
        let (status, out) = container.exec("one", &script, b"in\n").await?;
        assert_eq!((status, out.as_str()), (5, "tested\nin\n0::/\n"));
        container.end().await?;
        Ok(())
    });
}

#[test]
fn exec_of_a_missing_command_fails_at_start() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("misexec");
        container.sleep().await?;
        let error = container
            .exec("bad", &process(&["nope"]), b"")
            .await
            .unwrap_err();
        let text = r#"exec: "nope": executable file not found in $PATH"#;
        assert_eq!(error.to_string(), text);
        assert!(matches!(
            fixture.sandbox.wait("misexec", "bad").await,
            Err(SandboxError::NeverRan(_))
        ));
        fixture.sandbox.delete_process("misexec", "bad")?;
        container.end().await?;
        Ok(())
    });
}

#[test]
fn exec_in_an_ended_container_is_refused() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("ended");
        container
            .create(&fixture.spec(&["true"]), &Stdio::default())
            .await?;
        container.start().await?;
        container.wait().await?;
        let error = container
            .exec("late", &process(&["true"]), b"")
            .await
            .unwrap_err();
        assert!(matches!(
            error.downcast()?,
            SandboxError::ContainerStopped(_)
        ));
        container.delete().await
    });
}

#[test]
fn many_execs_leave_no_descriptor_behind() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("many");
        container.sleep().await?;
        for round in 0..50 {
            let exec_id = format!("exec-{round}");
            let (status, _) = container.exec(&exec_id, &process(&["true"]), b"").await?;
            assert_eq!(status, 0);
        }
        assert_eq!(fixture.sandbox.container("many")?.processes()?.len(), 1);
        container.end().await?;
        Ok(())
    });
}

#[test]
fn processes_are_listed_with_their_exec_ids() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("listed");
        container.sleep().await?;
        let text = process(&["sh", "-c", "sleep 1000 & wait"]).to_string();
        let sandbox = &fixture.sandbox;
        sandbox.add_process("listed", "shell", text.as_bytes(), &Stdio::default())?;
        sandbox.start("listed", "shell").await?;
        let mut names: Vec<_> = sandbox
            .container("listed")?
            .processes()?
            .into_iter()
            .filter_map(|(_, name)| name)
            .collect();
        names.sort();
        assert_eq!(names, ["", "shell"]);
        container.end().await?;
        assert!(sandbox.container("listed").is_err());
        Ok(())
    });
}
