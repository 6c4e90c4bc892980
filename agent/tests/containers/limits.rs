//! Limits of a container, by its cgroup.

use super::*;

#[test]
fn limits_are_seen_inside_the_guest() {
    let Some(fixture) = fixture() else { return };
    if !is_guest() {
        eprintln!("SKIPPED: limits need a machine of our own");
        return;
    }
    fixture.run(async {
        let mut spec = fixture.spec(&[
            "sh",
            "-c",
            "cd /cg; cat memory.max pids.max cpu.max; \
            cat /dev/kmsg 2>&1 | head -1; touch made && echo rw; echo 1 > memory.max",
        ]);
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20}, "pids": {"limit": 50},
            "cpu": {"quota": 50000, "period": 100000, "shares": 512},
            "devices": [{"allow": false, "access": "rwm"}]});
        let mounts = spec["mounts"].as_array_mut().context("mounts")?;
        mounts.push(
            json!({"destination": "/cg", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
        );
        spec["linux"]["devices"] = json!([{"type": "c", "path": "/dev/kmsg", "major": 1,
            "minor": 11}]);
        let (_, out, err) = fixture.container("limited").run(&spec, b"").await?;
        let expected = "67108864\n50\n50000 100000\n\
            cat: can't open '/dev/kmsg': Operation not permitted\n";
        assert_eq!(out, expected, "{err}");
        Ok(())
    });
}

#[test]
fn out_of_memory_is_told() {
    let Some(fixture) = fixture() else { return };
    if !is_guest() {
        eprintln!("SKIPPED: limits need a machine of our own");
        return;
    }
    fixture.run(async {
        let container = fixture.container("oom");
        let mut spec = fixture.spec(&[
            "sh",
            "-c",
            "x=$(cat /dev/zero | head -c 99999999 | tr '\\0' x)",
        ]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20}});
        container.create(&spec, &Stdio::default()).await?;
        let cgroup = fixture.sandbox.container("oom")?.cgroup.clone();
        container.start().await?;
        assert!(cgroup.oom_kills_above(0).await? > 0);
        container.wait().await?;
        container.delete().await
    });
}
