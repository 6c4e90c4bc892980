//! Parts of config.json that take real processes, mounts and namespaces to see.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn script(fixture: &Fixture, text: &str) -> Value {
    fixture.spec(&["sh", "-c", text])
}

fn mount(spec: &mut Value, mount: Value) {
    let mounts = spec["mounts"].as_array_mut().expect("the spec has mounts");
    mounts.push(mount);
}

fn namespace(spec: &mut Value, kind: &str) {
    let all = spec["linux"]["namespaces"].as_array_mut();
    let all = all.expect("the spec has namespaces");
    all.push(json!({ "type": kind }));
}

async fn refusal(fixture: &'static Fixture, id: &str, spec: &Value) -> String {
    let container = fixture.container(id);
    let error = container.create(spec, &Stdio::default()).await;
    assert!(fixture.sandbox.container(id).is_err());
    error.expect_err("it must be refused").to_string()
}

#[test]
fn what_can_not_be_is_refused_by_name() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        for (index, (place, value, word)) in [
            (
                "/process/rlimits",
                json!([{"type": "RLIMIT_X", "soft": 1, "hard": 1}]),
                "RLIMIT_X",
            ),
            ("/process/oomScoreAdj", json!(2000), "2000"),
            (
                "/process/scheduler",
                json!({"policy": "SCHED_X"}),
                "SCHED_X",
            ),
            (
                "/process/ioPriority",
                json!({"class": "X", "priority": 1}),
                "ioPriority",
            ),
            ("/process/cwd", json!("relative"), "relative"),
            ("/process/env", json!(["PATH=/bin", "nonsense"]), "nonsense"),
            (
                "/linux/personality",
                json!({"domain": "LINUX", "flags": ["X"]}),
                "personality",
            ),
            (
                "/linux/timeOffsets",
                json!({"monotonic": {"secs": 1}}),
                "timeOffsets",
            ),
            (
                "/linux/rootfsPropagation",
                json!("sideways"),
                "rootfsPropagation",
            ),
            (
                "/linux/devices",
                json!([{"type": "c", "path": "/dev/x", "major": 240, "minor": 9999}]),
                "/dev/x",
            ),
            (
                "/mounts",
                json!([{"destination": "/m", "type": "tmpfs", "options": ["idmap"]}]),
                "/m",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let mut spec = fixture.spec(&["true"]);
            let (parent, name) = place.rsplit_once('/').context("a path")?;
            let parent = spec.pointer_mut(parent).context("the parent is there")?;
            parent[name] = value;
            let text = refusal(fixture, &format!("refused-{index}"), &spec).await;
            assert!(text.contains(word), "{place}: {text}");
        }
        Ok(())
    });
}

#[test]
fn environment_is_completed() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = script(fixture, "echo $WORD $HOME");
        spec["process"]["env"] = json!(["PATH=/bin", "WORD=first", "HOME=", "WORD=second"]);
        let (_, out, _) = fixture.container("env").run(&spec, b"").await?;
        assert_eq!(out, "second /\n");
        Ok(())
    });
}

#[test]
fn no_capabilities_are_none_and_an_exec_has_those_of_init() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = script(fixture, "grep CapPrm /proc/self/status");
        spec["process"]["capabilities"] = Value::Null;
        let (_, out, _) = fixture.container("powerless").run(&spec, b"").await?;
        assert_eq!(out, "CapPrm:\t0000000000000000\n");

        let container = fixture.container("powers");
        container.sleep().await?;
        let mut exec = process(&["sh", "-c", "grep CapPrm /proc/self/status"]);
        exec["capabilities"] = Value::Null;
        let (_, out) = container.exec("inherits", &exec, b"").await?;
        assert_eq!(out, "CapPrm:\t00000000000000e3\n");
        exec["capabilities"] = json!({"bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]});
        let (_, out) = container.exec("own", &exec, b"").await?;
        assert_eq!(out, "CapPrm:\t0000000000000001\n");
        container.end().await?;
        Ok(())
    });
}

#[test]
fn working_directory_is_entered_with_roots_rights_and_made_for_init_only() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let private = fixture.directory.join("rootfs/private");
        fs::create_dir_all(&private)?;
        fs::set_permissions(&private, fs::Permissions::from_mode(0o700))?;
        let mut spec = fixture.spec(&["sh", "-c", "pwd; id -u"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["cwd"] = "/private".into();
        spec["root"]["readonly"] = true.into();
        let (_, out, _) = fixture.container("private").run(&spec, b"").await?;
        assert_eq!(out, "/private\n1000\n");

        let container = fixture.container("nowhere");
        container.sleep().await?;
        let mut exec = process(&["pwd"]);
        exec["cwd"] = "/not/there".into();
        let error = container.exec("lost", &exec, b"").await.unwrap_err();
        assert!(error.to_string().contains("/not/there"), "{error}");
        container.end().await?;
        Ok(())
    });
}

#[test]
fn scheduling_is_set_from_outside() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = script(fixture, "cat /proc/1/stat; cat /proc/self/oom_score_adj");
        spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 3});
        spec["process"]["oomScoreAdj"] = 100.into();
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (_, out, err) = fixture.container("batch").run(&spec, b"").await?;
        let words: Vec<&str> = out.split_whitespace().collect();
        // proc(5): nice is the 19th word, the policy the 41st; SCHED_BATCH is 3.
        assert_eq!((words[18], words[40]), ("5", "3"), "{out}{err}");
        assert_eq!(words.last(), Some(&"100"));
        Ok(())
    });
}

#[test]
fn exec_has_inits_personality_and_its_own_cpus() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let container = fixture.container("domain");
        let mut spec = fixture.spec(&["sleep", "1000"]);
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        container.create(&spec, &Stdio::default()).await?;
        container.start().await?;
        let mut exec = process(&[
            "sh",
            "-c",
            "uname -m; grep Cpus_allowed_list /proc/self/status",
        ]);
        exec["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
        let (_, out) = container.exec("one", &exec, b"").await?;
        assert_eq!(out, "i686\nCpus_allowed_list:\t0\n");
        container.end().await?;
        Ok(())
    });
}

#[test]
fn time_namespace_has_its_own_clocks() {
    let Some(fixture) = fixture() else { return };
    if !Path::new("/proc/self/ns/time").exists() {
        eprintln!("SKIPPED: this kernel has no time namespaces");
        return;
    }
    fixture.run(async {
        let container = fixture.container("clocks");
        let mut spec = fixture.spec(&["sleep", "1000"]);
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 50_000_000}});
        namespace(&mut spec, "time");
        container.create(&spec, &Stdio::default()).await?;
        container.start().await?;
        let (_, out) = container
            .exec("one", &process(&["cat", "/proc/uptime"]), b"")
            .await?;
        assert!(out.starts_with('5') && out.find('.') == Some(8), "{out}");
        container.end().await?;
        Ok(())
    });
}

#[test]
fn user_namespace_of_other_ids_has_all_that_a_container_has() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        // Root of the namespace is nobody outside.
        fs::set_permissions(&fixture.directory, fs::Permissions::from_mode(0o755))?;
        let text = "id -u; cat /proc/self/uid_map; cat /dev/null && echo x > /dev/null; \
            hostname other && hostname; touch /tmp/made && ls -ln /tmp/made; \
            ls -d /sys/kernel; cat /proc/self/oom_score_adj";
        let mut spec = script(fixture, text);
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["process"]["oomScoreAdj"] = 7.into();
        let all = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
        spec["process"]["capabilities"] =
            json!({"bounding": all, "effective": all, "permitted": all});
        namespace(&mut spec, "user");
        mount(
            &mut spec,
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"]}),
        );
        let (status, out, err) = fixture.container("other-ids").run(&spec, b"").await?;
        let words: Vec<&str> = out.split_whitespace().collect();
        assert_eq!(
            words.get(..5),
            Some(&["0", "0", "100000", "1000", "other"][..]),
            "{out}{err}"
        );
        assert_eq!((status, words.last()), (0, Some(&"7")), "{out}{err}");
        assert!(words.contains(&"/sys/kernel"), "{out}{err}");
        Ok(())
    });
}

#[test]
fn mounts_are_as_the_options_say() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let source = fixture.directory.join("options");
        fs::create_dir_all(source.join("inner"))?;
        fs::write(source.join("inner/file"), "text\n")?;
        let copied = fixture.directory.join("rootfs/copied");
        fs::create_dir_all(copied.join("sub"))?;
        fs::write(copied.join("sub/file"), "copied\n")?;
        let text = "touch /sealed/x /sealed/inner/x; cat /copied/sub/file; touch /copied/new; \
            touch /late/x; ls /late/deep; cat /late/deep/inner/file; \
            for m in /shared /times /tree; do \
            while read -r a b c d point flags tags rest; do \
            test $point != $m || echo $m $flags $tags; done < /proc/self/mountinfo; done";
        let mut spec = script(fixture, text);
        for (destination, options) in [
            ("/sealed", json!(["rbind", "rro"])),
            (
                "/times",
                json!(["bind", "noatime", "nosymfollow", "nosuid"]),
            ),
            (
                "/tree",
                json!(["rbind", "rnoexec", "rstrictatime", "rslave"]),
            ),
        ] {
            mount(
                &mut spec,
                json!({"destination": destination, "type": "bind",
                "source": source, "options": options}),
            );
        }
        for (destination, options) in [
            ("/copied", json!(["tmpcopyup"])),
            ("/late", json!(["ro"])),
            ("/shared", json!(["shared", "nosuid"])),
        ] {
            mount(
                &mut spec,
                json!({"destination": destination, "type": "tmpfs",
                "source": "tmpfs", "options": options}),
            );
        }
        // Into one that becomes read-only.
        mount(
            &mut spec,
            json!({"destination": "/late/deep", "type": "bind", "source": source,
            "options": ["rbind"]}),
        );
        let (_, out, err) = fixture.container("options").run(&spec, b"").await?;
        assert_eq!(
            err,
            "touch: /sealed/x: Read-only file system\n\
             touch: /sealed/inner/x: Read-only file system\n\
             touch: /late/x: Read-only file system\n"
        );
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[..3], ["copied", "inner", "text"], "{out}");
        assert!(
            lines[3].starts_with("/shared rw,nosuid,relatime shared:"),
            "{out}"
        );
        assert!(
            lines[4].starts_with("/times rw,nosuid,noatime,nosymfollow"),
            "{out}"
        );
        assert!(lines[5].starts_with("/tree rw,noexec -"), "{out}");
        assert!(!copied.join("new").exists());
        Ok(())
    });
}

#[test]
fn propagation_of_the_root_is_as_asked_for() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        for (index, (propagation, expected)) in [
            ("private", "-"),
            ("rslave", "-"),
            ("rshared", "shared"),
            ("unbindable", "unbindable"),
        ]
        .into_iter()
        .enumerate()
        {
            let text = "while read -r a b c d point flags tags rest; do \
                test $point != / || echo ${tags%:*}; done < /proc/self/mountinfo";
            let mut spec = script(fixture, text);
            spec["linux"]["rootfsPropagation"] = propagation.into();
            let container = fixture.container(&format!("propagation-{index}"));
            let (_, out, err) = container.run(&spec, b"").await?;
            assert!(out.trim() == expected, "{propagation}: {out}{err}");
        }
        Ok(())
    });
}

#[test]
fn mapped_ids_are_seen_in_the_container_alone() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let source = fixture.directory.join("mapped");
        fs::create_dir_all(&source)?;
        fs::write(source.join("file"), "text\n")?;
        let text = "ls -ln /mapped/file; touch /mapped/made; ls -ln /mapped/made";
        let mut spec = script(fixture, text);
        spec["process"]["user"] = json!({"uid": 5000, "gid": 5000});
        let map = json!([{"containerID": 0, "hostID": 5000, "size": 10}]);
        mount(
            &mut spec,
            json!({"destination": "/mapped", "type": "bind", "source": source,
            "options": ["bind", "idmap"], "uidMappings": map, "gidMappings": map}),
        );
        let container = fixture.container("mapped-ids");
        let (_, out, err) = container.run(&spec, b"").await?;
        let owners: Vec<&str> = out
            .lines()
            .filter_map(|line| line.split_whitespace().nth(2))
            .collect();
        assert_eq!(owners, ["5000", "5000"], "{out}{err}");
        let made = fs::metadata(source.join("made"))?;
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 0);
        Ok(())
    });
}

#[test]
fn privileged_container_has_the_machines_devices() {
    let Some(fixture) = fixture() else { return };
    fixture.run(async {
        let mut spec = script(fixture, "ls /dev/null /dev/odd; ls -d /dev/mine");
        spec["linux"]["devices"] = json!([
            {"type": "c", "path": "/dev/odd", "major": 240, "minor": 9999},
            {"type": "c", "path": "/dev/mine", "major": 1, "minor": 3},
        ]);
        spec["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
        let (_, out, err) = fixture.container("privileged").run(&spec, b"").await?;
        assert_eq!(out, "/dev/null\n/dev/mine\n", "{err}");
        Ok(())
    });
}
