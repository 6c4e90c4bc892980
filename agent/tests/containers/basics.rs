//! A container's life, and what it sees.

use super::*;

#[test]
fn missing_command_is_named_and_leaves_nothing() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("missing");
        let spec = fixture.spec(&["no-such-command"]);
        let error = container
            .create(&spec, &Stdio::default())
            .await
            .unwrap_err();
        let text = r#"exec: "no-such-command": executable file not found in $PATH"#;
        assert_eq!(error.to_string(), text);
        assert!(fixture.sandbox.container("missing").is_err());
        container.run(&fixture.spec(&["true"]), b"").await?;
        Ok(())
    });
}

#[test]
fn missing_root_is_named() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = fixture.spec(&["true"]);
        spec["root"]["path"] = "/no/such/root".into();
        let container = fixture.container("rootless");
        let error = container
            .create(&spec, &Stdio::default())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/root"), "{error}");
        Ok(())
    });
}

#[test]
fn file_without_permission_is_denied() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("denied");
        let spec = fixture.spec(&["/etc/plain"]);
        let error = container
            .create(&spec, &Stdio::default())
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"exec: "/etc/plain": permission denied"#
        );
        Ok(())
    });
}

#[test]
fn exit_status_and_output_come_back() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let spec = fixture.spec(&["sh", "-c", "cat; echo oops >&2; exit 7"]);
        let (status, out, err) = fixture.container("seven").run(&spec, b"hello").await?;
        assert_eq!((status, out.as_str(), err.as_str()), (7, "hello", "oops\n"));
        Ok(())
    });
}

#[test]
fn output_can_be_opened_again_by_name() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = fixture.spec(&["sh", "-c", "echo again > /dev/stdout"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (status, out, err) = fixture.container("again").run(&spec, b"").await?;
        assert_eq!((status, out.as_str(), err.as_str()), (0, "again\n", ""));
        Ok(())
    });
}

#[test]
fn many_bytes_pass_unchanged_both_ways() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let input: Vec<u8> = (0..20_000_000u32).map(|n| (n % 251) as u8 % 127).collect();
        let spec = fixture.spec(&["cat"]);
        let (status, out, _) = fixture.container("bytes").run(&spec, &input).await?;
        assert_eq!(status, 0);
        assert!(
            out.as_bytes() == input,
            "{} of {} bytes",
            out.len(),
            input.len()
        );
        Ok(())
    });
}

#[test]
fn container_sees_itself_alone() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let script = "echo $$; hostname; cat /proc/self/cgroup | grep 0::; ls / | head -1; \
            touch /proc/sys/x 2>/dev/null || echo sealed; cat /proc/version | wc -c; \
            grep -c / /proc/self/mountinfo > /dev/null; readlink /dev/fd; id -u; umask; \
            grep NoNewPrivs /proc/self/status; grep CapBnd /proc/self/status; ls /proc/self/fd | wc -l";
        let spec = fixture.spec(&["sh", "-c", script]);
        let (status, out, err) = fixture.container("alone").run(&spec, b"").await?;
        let expected = "1\ntested\n0::/\nbin\nsealed\n0\n/proc/self/fd\n0\n0022\nNoNewPrivs:\t1\n\
            CapBnd:\t00000000000000e3\n4\n";
        assert_eq!((status, out.as_str(), err.as_str()), (0, expected, ""));
        Ok(())
    });
}

#[test]
fn read_only_root_can_not_be_written() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = fixture.spec(&["sh", "-c", "touch /here 2>&1; touch /tmp/there && echo ok"]);
        spec["root"]["readonly"] = true.into();
        let (_, out, _) = fixture.container("readonly").run(&spec, b"").await?;
        assert_eq!(out, "touch: /here: Read-only file system\nok\n");
        Ok(())
    });
}

#[test]
fn bound_file_is_seen_and_read_only() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let source = fixture.directory.join("bound");
        fs::write(&source, "from outside\n")?;
        let mut spec = fixture.spec(&["sh", "-c", "cat /etc/deep/name; echo x > /etc/deep/name"]);
        let mount = json!({"destination": "/etc/deep/name", "type": "bind", "source": source,
            "options": ["rbind", "ro", "rprivate"]});
        spec["mounts"].as_array_mut().context("mounts")?.push(mount);
        let (status, out, _) = fixture.container("bound").run(&spec, b"").await?;
        assert_eq!((status, out.as_str()), (1, "from outside\n"));
        Ok(())
    });
}

#[test]
fn missing_working_directory_is_made() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = fixture.spec(&["pwd"]);
        spec["process"]["cwd"] = "/tmp/made/here".into();
        let (_, out, _) = fixture.container("cwd").run(&spec, b"").await?;
        assert_eq!(out, "/tmp/made/here\n");
        Ok(())
    });
}

#[test]
fn user_outside_of_the_mapping_is_refused() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = user_namespace(fixture, &["id", "-u"]);
        spec["process"]["user"] = json!({"uid": 70000, "gid": 0});
        let container = fixture.container("unmapped");
        let error = container
            .create(&spec, &Stdio::default())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("become user 70000"), "{error}");
        Ok(())
    });
}

#[test]
fn user_namespace_maps_ids() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let spec = user_namespace(fixture, &["sh", "-c", "id -u; cat /proc/self/uid_map"]);
        let (status, out, err) = fixture.container("mapped").run(&spec, b"").await?;
        let words: Vec<&str> = out.split_whitespace().collect();
        assert_eq!(
            (status, words, err.as_str()),
            (0, vec!["0", "0", "0", "1000"], "")
        );
        Ok(())
    });
}

fn user_namespace(fixture: &Fixture, args: &[&str]) -> Value {
    let mut spec = fixture.spec(args);
    let map = json!([{"containerID": 0, "hostID": 0, "size": 1000}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("the spec has namespaces")
        .push(json!({"type": "user"}));
    spec
}

#[test]
fn seccomp_profile_is_in_force() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = fixture.spec(&["sh", "-c", "hostname other 2>&1; hostname"]);
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
        let (_, out, err) = fixture.container("filtered").run(&spec, b"").await?;
        assert!(!out.contains("tested"), "{out} {err}");
        Ok(())
    });
}

#[test]
fn killed_container_ends_with_137() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("killed");
        container.sleep().await?;
        assert_eq!(container.end().await?, 137);
        Ok(())
    });
}

#[test]
fn container_that_never_started_can_be_killed_and_deleted() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("unstarted");
        container
            .create(&fixture.spec(&["true"]), &Stdio::default())
            .await?;
        assert!(matches!(
            container.delete().await.unwrap_err().downcast()?,
            SandboxError::ContainerRuns(_)
        ));
        assert_eq!(container.end().await?, 137);
        Ok(())
    });
}

#[test]
fn second_container_of_the_same_id_is_refused() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("twice");
        container.sleep().await?;
        let spec = fixture.spec(&["true"]);
        let error = container
            .create(&spec, &Stdio::default())
            .await
            .unwrap_err();
        assert!(matches!(error, SandboxError::ContainerExists(_)));
        container.end().await?;
        Ok(())
    });
}

#[test]
fn paused_container_stands_still() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("paused");
        container.sleep().await?;
        let cgroup = fixture.sandbox.container("paused")?.cgroup.clone();
        cgroup.freeze(true).await?;
        let events = fs::read_to_string(cgroup.path().join("cgroup.events"))?;
        assert!(events.contains("frozen 1"), "{events}");
        cgroup.freeze(false).await?;
        container.end().await?;
        Ok(())
    });
}

#[test]
fn terminal_has_its_size_and_ends_with_the_process() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("terminal");
        let mut spec = fixture.spec(&[
            "sh",
            "-c",
            "stty size; tty; read line; stty size; echo $line",
        ]);
        spec["process"]["terminal"] = true.into();
        spec["process"]["consoleSize"] = json!({"height": 30, "width": 100});
        let mut streams = fixture.streams();
        (streams.request.stdout, streams.request.stderr) = (0, 0);
        container.create(&spec, &streams.request).await?;
        let mut terminal = streams.connect(streams.request.stdin)?;
        container.start().await?;
        let mut seen = String::new();
        while !seen.contains("/dev/pts/0\r\n") {
            let mut bytes = [0; 256];
            let length = terminal.read(&mut bytes).await?;
            anyhow::ensure!(length > 0, "the terminal ended early: {seen:?}");
            seen.push_str(&String::from_utf8_lossy(&bytes[..length]));
        }
        fixture.sandbox.resize("terminal", "", 80, 24)?;
        terminal.write_all(b"typed\n").await?;
        terminal.read_to_string(&mut seen).await?;
        assert_eq!(seen, "30 100\r\n/dev/pts/0\r\ntyped\r\n24 80\r\ntyped\r\n");
        assert_eq!(container.wait().await?, 0);
        container.delete().await
    });
}

#[test]
fn stream_from_a_port_below_the_range_is_refused() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let stdio = Stdio {
            stdout: 1024,
            ..Stdio::default()
        };
        let container = fixture.container("low");
        let error = container
            .create(&fixture.spec(&["true"]), &stdio)
            .await
            .unwrap_err();
        assert!(matches!(error, SandboxError::Stdio(_)));
        Ok(())
    });
}
