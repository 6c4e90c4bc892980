//! What config.json says, to the letter: of members that nobody knows, of values that can't be, and
//! until when.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::shim::Shim;
use crate::spec::Bundle;

/// Several containers, one after the other, beside one that lasts.
pub(super) fn spec_to_the_letter(ctr: &Ctr) -> Result<()> {
    ctr.detach(&[], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;
    type Check = fn(&Ctr, &Shim) -> Result<()>;
    let checks: [(&str, Check); 5] = [
        ("changes after Create", changes_after_create),
        ("what is not known", unknown_members),
        ("what can't be", invalid_values),
        ("propagation of the root", root_propagation),
        ("the host's devices and sockets", host_devices),
    ];
    let mut wrong = Vec::new();
    for (name, check) in checks {
        if let Err(error) = check(ctr, &shim) {
            wrong.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n        "));
    ctr.bury();
    Ok(())
}

/// A config.json that changes between Create and Start says what it said at Create.
fn changes_after_create(ctr: &Ctr, shim: &Shim) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.script("echo before");
    let ended = bundle.run_beside(shim, |config| {
        let text = fs::read_to_string(config)?;
        ensure!(text.contains("echo before"), "another config.json");
        fs::write(config, text.replace("echo before", "echo after"))?;
        Ok(())
    })?;
    ensure!(ended.text() == "before", "it says {ended:?}");
    Ok(())
}

/// Members and annotations that are not known are passed over, wherever they are.
fn unknown_members(ctr: &Ctr, shim: &Shim) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.script("echo runs");
    bundle.spec["annotations"] = json!({ "org.example.unheard-of": "", "x": "1" });
    for parent in [
        "",
        "/process",
        "/process/user",
        "/root",
        "/linux",
        "/linux/resources",
    ] {
        let parent = bundle
            .spec
            .pointer_mut(parent)
            .and_then(Value::as_object_mut);
        let parent = parent.context("the usual spec lacks a part")?;
        parent.insert("unheardOf".to_owned(), json!({ "a": [1, null] }));
    }
    let ended = bundle.run_beside(shim, |_| Ok(()))?;
    ensure!(ended.text() == "runs", "it says {ended:?}");
    Ok(())
}

/// A value that is none of those that a member may have is an error at Create, which says what.
fn invalid_values(ctr: &Ctr, shim: &Shim) -> Result<()> {
    for (pointer, value, word) in [
        ("/linux/namespaces/0/type", json!("sideways"), "sideways"),
        ("/linux/rootfsPropagation", json!("sideways"), "sideways"),
        ("/process/args", json!([]), "args"),
        ("/process/cwd", json!("relative"), "cwd"),
        ("/hostname", json!(5), "config.json"),
        ("/process/user/uid", json!(-1), "config.json"),
    ] {
        let mut bundle = Bundle::new(ctr)?;
        bundle.script("echo runs");
        bundle.spec["linux"]["rootfsPropagation"] = "rprivate".into();
        bundle.spec["hostname"] = "name".into();
        *bundle.spec.pointer_mut(pointer).context(pointer)? = value.clone();
        let ended = bundle.run_beside(shim, |_| Ok(()))?;
        ensure!(ended.status == -1, "{pointer} may be {value}: {ended:?}");
        // Those of another type are told of by runc in Go's words, without the file.
        ensure!(
            ended.stderr.to_lowercase().contains(word) || (word == "config.json" && !ctr.is_husk()),
            "{pointer} as {value}: {}",
            ended.stderr
        );
    }
    Ok(())
}

/// The root mount is what it is said to be.
fn root_propagation(ctr: &Ctr, shim: &Shim) -> Result<()> {
    for (propagation, wanted) in [
        ("slave", "kept in"),
        ("rprivate", "kept in"),
        ("shared", "shared"),
        ("rshared", "shared"),
        ("unbindable", "unbindable"),
    ] {
        if wanted != "kept in" && !ctr.is_husk() {
            // Debian's runc is too old: it gives them to the mounts around the root only.
            continue;
        }
        let mut bundle = Bundle::new(ctr)?;
        bundle.spec["linux"]["rootfsPropagation"] = propagation.into();
        bundle.script(
            "awk '$5 == \"/\" { print $7 ~ /^shared/ ? \"shared\" :
                 $7 ~ /^unbindable/ ? \"unbindable\" : \"kept in\" }' /proc/self/mountinfo",
        );
        let ended = bundle.run_beside(shim, |_| Ok(()))?;
        ensure!(ended.text() == wanted, "{propagation}: {ended:?}");
    }
    Ok(())
}

/// What lies behind a device or a socket of the host is nothing to a guest.
fn host_devices(ctr: &Ctr, shim: &Shim) -> Result<()> {
    if !ctr.is_husk() {
        return Ok(());
    }
    for (source, words) in [
        ("/run/containerd/containerd.sock", "a socket of the host"),
        ("/dev/kvm", "a device of the host"),
    ] {
        let mut bundle = Bundle::new(ctr)?;
        bundle.script("echo runs");
        bundle.mount(
            json!({ "destination": "/a", "type": "bind", "source": source,
            "options": ["rbind"] }),
        )?;
        let ended = bundle.run_beside(shim, |_| Ok(()))?;
        ensure!(
            ended.stderr.contains(words) && ended.stderr.contains(source),
            "{source}: {ended:?}"
        );
    }
    // As `--privileged` has it: all devices may be used, and those of the host are listed.
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    bundle.spec["linux"]["devices"] = json!([
        { "type": "c", "path": "/dev/kvm", "major": 10, "minor": 232 },
        { "type": "b", "path": "/dev/vda", "major": 254, "minor": 0 },
    ]);
    bundle.script("cd /dev && ls -d kvm vda kmsg null 2>/dev/null; dd if=kmsg bs=8k count=1 of=/k");
    let ended = bundle.run_beside(shim, |_| Ok(()))?;
    ensure!(
        ended.status == 0 && ended.text() == "kmsg\nnull",
        "of the host's devices and the guest's it has {ended:?}"
    );
    Ok(())
}
