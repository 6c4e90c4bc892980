//! Roots on every kind of file system, and ids that are others outside.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::ctr::Ctr;
use crate::host::HostMount;
use crate::spec::{Bundle, Check};

/// Of a file system without disk.
const IN_MEMORY: &str = "/var/tmp/husk-in-memory";

/// What the testbed shares with its host, over 9p.
const SHARE: &str = "/share";

/// Layers of the deepest image that snapshotters are asked for.
const LAYERS: usize = 128;

const WRITABLE: Check<'static> = (
    "writable",
    "echo text > /written && cat /written && mkdir /made && ln -s written /link && cat /link",
    "text\ntext",
);

/// The bundle may be anywhere, and its root any directory.
pub(super) fn roots_anywhere(ctr: &Ctr) -> Result<()> {
    let memory = HostMount::tmpfs(Path::new(IN_MEMORY))?;
    let mut bundle = Bundle::at(ctr, Path::new(IN_MEMORY))?;
    bundle.check(&[WRITABLE])?;
    drop(bundle);
    drop(memory);
    fs::remove_dir(IN_MEMORY)?;

    let mut bundle = Bundle::at(ctr, Path::new(SHARE))?;
    bundle
        .check(&[WRITABLE])
        .map_err(|error| error.context("on 9p"))?;
    drop(bundle);

    deep_root(ctr).map_err(|error| error.context(format!("of {LAYERS} layers")))
}

fn deep_root(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let layers = bundle.directory("l")?;
    let place = layers
        .parent()
        .context("the layers are in a directory")?
        .to_owned();
    for directory in ["upper", "work"] {
        bundle.directory(directory)?;
    }
    let mut lower = String::new();
    for number in 1..LAYERS {
        let layer = bundle.directory(&format!("l/{number}/layers"))?;
        fs::write(layer.join(number.to_string()), number.to_string())?;
        lower.push_str(&format!("l/{number}:"));
    }
    let options = format!("lowerdir={lower}rootfs,upperdir=upper,workdir=work");
    let merged = place.join("merged");
    let arguments = ["-t", "overlay", "overlay", "-o", &options];
    let _merged = HostMount::mount(&merged, &arguments, &place)?;
    bundle.spec["root"]["path"] = json!(merged);
    let count = (LAYERS - 1).to_string();
    bundle.check(&[
        ("layers", "cat /layers/* > /all; ls /layers | wc -l", &count),
        WRITABLE,
    ])?;
    ensure!(
        place.join("upper/written").exists(),
        "what was written is not in the upper layer"
    );
    Ok(())
}

/// Root of a user namespace is an ordinary user outside, and has all that a container has.
pub(super) fn user_namespace(ctr: &Ctr) -> Result<()> {
    const FIRST: u32 = 100_000;
    let mut bundle = Bundle::new(ctr)?;
    let status = Command::new("chown")
        .args(["-R", &format!("{FIRST}:{FIRST}")])
        .arg(bundle.root())
        .status()?;
    ensure!(status.success(), "cannot change the owner of the root");
    let map = json!([{ "containerID": 0, "hostID": FIRST, "size": 65536 }]);
    bundle.spec["linux"]["uidMappings"] = map.clone();
    bundle.spec["linux"]["gidMappings"] = map;
    bundle.spec["process"]["rlimits"] =
        json!([{ "type": "RLIMIT_NOFILE", "soft": 1000, "hard": 2000 }]);
    bundle.spec["process"]["oomScoreAdj"] = 7.into();
    bundle.namespace(json!({ "type": "user" }))?;
    bundle.check(&[
        (
            "ids",
            "id -u; tr -s ' ' < /proc/self/uid_map; stat -c %u:%g /bin/busybox",
            "0\n 0 100000 65536\n0:0",
        ),
        ("files", "echo text > /written && stat -c %u:%g /written", "0:0"),
        (
            "devices",
            "stat -c '%F %t:%T' /dev/null /dev/full; echo x > /dev/null && head -c 2 /dev/zero | xxd -p",
            "character special file 1:3\ncharacter special file 1:7\n0000",
        ),
        ("limits", "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj", "1000\n2000\n7"),
        ("system", "ls -d /sys/kernel /dev/mqueue /dev/pts/ptmx", "/dev/mqueue\n/dev/pts/ptmx\n/sys/kernel"),
        ("other user", "chown 1000:1000 /written && stat -c %u:%g /written", "1000:1000"),
    ])?;
    let owner = fs::metadata(bundle.root().join("written"))?.uid();
    ensure!(
        owner == FIRST + 1000,
        "outside, the file is of user {owner}"
    );
    Ok(())
}

/// What is mounted on the host later appears in a volume that follows, and not in another.
pub(super) fn volume_follows_mounts(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let source = bundle.directory("source")?;
    let source_text = source.display().to_string();
    let _shared = HostMount::mount(
        &source,
        &["--bind", "--make-shared", &source_text],
        Path::new("/"),
    )?;
    for (destination, propagation) in [("/follows", "rslave"), ("/stays", "rprivate")] {
        bundle.mount(
            json!({ "destination": destination, "type": "bind", "source": source,
            "options": ["rbind", propagation] }),
        )?;
    }
    bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
    bundle.detach()?;
    let later = HostMount::tmpfs(&source.join("later"))?;
    fs::write(source.join("later/file"), "later\n")?;
    let exec = ["task", "exec", "--exec-id", "e1", &ctr.id];
    let script = ["sh", "-c", "cat /follows/later/file; ls /stays/later"];
    let said = ctr.ctr(&[&exec[..], &script].concat())?.success()?;
    ensure!(said == "later", "it said {said:?}");
    ctr.ctr(&["task", "kill", "--signal", "SIGKILL", &ctr.id])?
        .success()?;
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    ensure!(
        source.join("later/file").exists(),
        "the host's mount is gone"
    );
    drop(later);
    Ok(())
}
