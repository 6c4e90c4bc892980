//! The hooks of the specification, and what engines do in them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::host;
use crate::spec::Bundle;

/// In the order in which they run, but that runc runs poststart hooks before the start.
const ON_HOST: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "poststart",
    "poststop",
];

/// What a hook finds as its own name. Its end tells busybox that it is a shell.
const NAME: &str = "/name/of/sh";

/// A hook that runs a script of the shell.
fn hook(script: &str) -> Value {
    json!({
        "path": "/bin/sh", "args": [NAME, "-c", script],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "WORD=husk"],
    })
}

/// Each hook runs in its namespaces at its moment, and is told what the specification says.
pub(super) fn each_in_its_place(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let (log, extra) = (bundle.directory("log")?, bundle.directory("extra")?);
    fs::write(extra.join("file"), "from a hook\n")?;
    fs::create_dir_all(bundle.root().join("extra"))?;
    bundle.spec["annotations"] = json!({ "a.b/c": "d" });
    let root = bundle.root().display().to_string();
    for kind in ON_HOST {
        let file = |name: &str| log.join(format!("{kind}.{name}")).display().to_string();
        let mut script = format!(
            "cat > {}; env > {}; echo {kind} >> {}; readlink /proc/self/ns/net > {}
            tr '\\0' '\\n' < /proc/$$/cmdline | head -1 > {}",
            file("state"),
            file("env"),
            log.join("order").display(),
            file("netns"),
            file("name"),
        );
        match kind {
            "createRuntime" => script.push_str(&format!("; test -x {root}/bin/busybox")),
            // Into its own mount namespace, and by that into the container.
            "createContainer" => {
                script.push_str(&format!("; mount --bind {} {root}/extra", extra.display()));
            }
            _ => {}
        }
        bundle.spec["hooks"][kind] = json!([hook(&script)]);
    }
    let script = "cat > /tmp/state; id -u > /tmp/uid; echo $WORD > /tmp/word";
    bundle.spec["hooks"]["startContainer"] = json!([hook(script)]);
    fs::set_permissions(
        bundle.root().join("tmp"),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )?;
    bundle.spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    bundle.script("cat /tmp/uid /tmp/word /extra/file; grep -c . /tmp/state");
    let said = bundle.run()?.success()?;
    ensure!(
        said == "1000\nhusk\nfrom a hook\n1",
        "the container says {said:?}"
    );

    let read = |name: &str| {
        let path = log.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {path:?}"))
    };
    let order = read("order")?;
    let order: Vec<_> = order.lines().collect();
    ensure!(order == ON_HOST, "they ran in the order {order:?}");
    let in_container = fs::read_to_string(bundle.root().join("tmp/state"))?;
    let state = |text: &str| -> Result<Value> { Ok(serde_json::from_str(text)?) };
    for (kind, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststop", "stopped"),
    ] {
        let state = state(&read(&format!("{kind}.state"))?)?;
        check_state(&state, &ctr.id, status).context(kind)?;
        let env = read(&format!("{kind}.env"))?;
        ensure!(
            env.contains("WORD=husk") && !env.contains("TTRPC"),
            "{kind} has {env}"
        );
        // runc's is in the container's PID namespace, where it can't look itself up.
        ensure!(
            kind == "createContainer" || read(&format!("{kind}.name"))?.trim_end() == NAME,
            "{kind} has another name"
        );
    }
    check_state(&state(&in_container)?, &ctr.id, "created").context("startContainer")?;
    check_state(
        &state(&read("poststart.state")?)?,
        &ctr.id,
        if ctr.is_husk() { "running" } else { "created" },
    )?;
    let (outer, inner) = (read("createRuntime.netns")?, read("createContainer.netns")?);
    // Where runc runs them they can't look at themselves, and nothing was read.
    ensure!(
        outer != inner && (inner.starts_with("net:[") || !ctr.is_husk()),
        "createContainer hooks run in the network namespace {inner:?}"
    );
    ensure!(
        fs::read_link("/proc/self/ns/net")?.display().to_string() == outer.trim_end(),
        "createRuntime hooks run in {outer}"
    );
    Ok(())
}

fn check_state(state: &Value, id: &str, status: &str) -> Result<()> {
    let bundle = state["bundle"].as_str().unwrap_or_default();
    let pid = state["pid"].as_i64().unwrap_or_default();
    ensure!(
        state["id"] == id
            && state["status"] == status
            && state["annotations"]["a.b/c"] == "d"
            && state["ociVersion"].is_string()
            && bundle.ends_with(id)
            && (pid > 0) == (status != "stopped"),
        "it is told {state}"
    );
    Ok(())
}

/// A hook that fails, or takes too long, is the end of its container, whose last hooks run.
pub(super) fn failing(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let log = bundle.directory("log")?;
    let told = log.join("poststop");
    let poststop = hook(&format!("cat > {}", told.display()));
    bundle.script("echo it runs");
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let later = hook(&format!(": > {}", log.join("later").display()));
        let failing = hook("echo these words >&2; exit 3");
        bundle.spec["hooks"] = json!({ kind: [failing, later], "poststop": [poststop] });
        let mut words = vec!["these words", "exit status 3"];
        if ctr.is_husk() {
            words.push(kind);
        }
        bundle.refused(&words).context(kind)?;
        ensure!(!log.join("later").exists(), "{kind}: the next hook ran");
        fs::remove_file(&told).with_context(|| format!("{kind}: no poststop hook ran"))?;
    }
    let mut slow = hook("exec sleep 1000");
    slow["timeout"] = 2.into();
    bundle.spec["hooks"] = json!({ "createRuntime": [slow] });
    bundle.refused(&["timeout"])?;
    bundle.spec["hooks"] = json!({ "createRuntime": [{ "path": "/no/such/hook" }] });
    bundle.refused(&["/no/such/hook"])
}

/// A hook that fails once the process runs is told in the log, and nothing else comes of it.
pub(super) fn failing_late(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.script("echo it runs");
    let failing = hook("echo these words >&2; exit 3");
    bundle.spec["hooks"] = json!({ "poststart": [failing], "poststop": [failing] });
    let said = bundle.run()?.success()?;
    ensure!(said == "it runs", "it says {said:?}");
    bundle.spec["hooks"] = json!({ "startContainer": [failing] });
    bundle.refused(&["startContainer", "these words"])
}

/// A shim that was killed still has its containers' last hooks run.
pub(super) fn poststop_after_a_killed_shim(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let told = bundle.directory("log")?.join("poststop");
    let poststop = hook(&format!("cat > {0}.new; mv {0}.new {0}", told.display()));
    bundle.spec["hooks"] = json!({ "poststop": [poststop] });
    bundle.script("exec sleep 1000");
    bundle.detach()?;
    for shim in host::shims(&ctr.id)? {
        shim.kill()?;
    }
    let deadline = std::time::Instant::now() + host::DEADLINE;
    ensure!(
        host::path_becomes(&told, true, deadline)?,
        "no poststop hook ran"
    );
    ctr.bury();
    Ok(())
}

/// Where the address plugin keeps what it has given away.
const ADDRESSES: &str = "/var/lib/cni/networks/husk-hooks";

/// As nerdctl does it: a createRuntime hook runs CNI's plugins on the namespace of the pid that it
/// is told, and a poststop hook undoes it.
pub(super) fn network_by_hooks(ctr: &Ctr) -> Result<()> {
    const PLUGIN: &str = r#"import json, os, subprocess, sys
command, log = sys.argv[1:]
state = json.load(sys.stdin)
conf = {"cniVersion": "1.0.0", "name": "husk-hooks", "type": "bridge", "bridge": "husk-hooks0",
        "isGateway": True, "ipam": {"type": "host-local", "subnet": "10.77.0.0/24",
                                    "routes": [{"dst": "0.0.0.0/0"}]}}
netns = "/proc/%d/ns/net" % state["pid"] if "pid" in state else ""
env = {"CNI_COMMAND": command, "CNI_CONTAINERID": state["id"], "CNI_NETNS": netns,
       "CNI_IFNAME": "eth0", "CNI_PATH": "/usr/lib/cni", "PATH": os.environ["PATH"]}
subprocess.run(["/usr/lib/cni/bridge"], input=json.dumps(conf).encode(), env=env, check=True,
               stdout=open(log, "w"))
"#;
    let mut bundle = Bundle::new(ctr)?;
    let log = bundle.directory("log")?;
    let plugin = log.join("plugin.py");
    fs::write(&plugin, PLUGIN)?;
    let run = |command: &str| {
        let answer = log.join(command);
        hook(&format!(
            "exec python3 {} {command} {}",
            plugin.display(),
            answer.display()
        ))
    };
    let seen = log.join("seen");
    let look = hook(&format!("ip -brief address show eth0 > {}", seen.display()));
    bundle.spec["hooks"] = json!({
        "createRuntime": [run("ADD")], "createContainer": [look], "poststop": [run("DEL")],
    });
    bundle.script("ping -c 1 -W 60 10.77.0.1 | grep -c 'bytes from 10.77.0.1'");
    let ended = bundle.run();
    let kept = given_addresses();
    let _ = std::process::Command::new("ip")
        .args(["link", "delete", "husk-hooks0"])
        .status();
    let _ = fs::remove_dir_all(ADDRESSES);
    let said = ended?.success()?;
    let seen = fs::read_to_string(seen).context("no createContainer hook ran")?;
    ensure!(seen.contains("10.77.0."), "the namespace has {seen:?}");
    ensure!(said == "1", "no answer to ping: {said:?}");
    ensure!(kept.is_empty(), "addresses are still given away: {kept:?}");
    Ok(())
}

fn given_addresses() -> Vec<String> {
    let entries = fs::read_dir(Path::new(ADDRESSES))
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("10.")).collect()
}
