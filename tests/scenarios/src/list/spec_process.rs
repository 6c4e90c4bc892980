//! What config.json says about the process.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::ctr::Ctr;
use crate::spec::{Bundle, Check};

/// Everything that a spec may say about who a process is and what it may do.
pub(super) fn process_as_asked_for(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    std::fs::write(
        bundle.root().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1001::/home/user:/bin/sh\n",
    )?;
    let held = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
    bundle.spec["process"] = json!({
        "terminal": false,
        "user": { "uid": 1000, "gid": 1001, "umask": 0o027, "additionalGids": [5, 2000] },
        "args": ["sh"],
        "env": ["PATH=/nowhere:/bin", "WORD=first", "WORD=second", "EMPTY=", "HOME="],
        "cwd": "/made/by/../runtime",
        "capabilities": {
            "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN", "CAP_UNHEARD_OF"],
            "effective": ["CAP_NET_BIND_SERVICE"],
            "permitted": held, "inheritable": held, "ambient": held,
        },
        "rlimits": [
            { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX },
            { "type": "RLIMIT_STACK", "soft": 1 << 20, "hard": 1 << 24 },
            { "type": "RLIMIT_RTPRIO", "soft": 3, "hard": 4 },
        ],
        "noNewPrivileges": true,
        "oomScoreAdj": 321,
    });
    // The working directory is made before the root becomes read-only.
    bundle.spec["root"]["readonly"] = true.into();
    bundle.spec["hostname"] = "asked-for.example".into();
    bundle.check(&PROCESS_AS_ASKED_FOR)
}

const PROCESS_AS_ASKED_FOR: [Check<'static>; 11] = [
    ("hostname", "hostname", "asked-for.example"),
    ("user", "id -u; id -g; id -G", "1000\n1001\n1001 5 2000"),
    ("umask", "umask", "0027"),
    ("cwd", "pwd", "/made/runtime"),
    (
        "environment",
        "echo $WORD ${EMPTY-unset} $HOME",
        "second /home/user",
    ),
    (
        "capabilities",
        "grep Cap /proc/1/status | tr -d '\\t'",
        "CapInh:0000000000000420\nCapPrm:0000000000000420\nCapEff:0000000000000420\n\
         CapBnd:0000000000000421\nCapAmb:0000000000000420",
    ),
    (
        "limits",
        "ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc; ulimit -s; ulimit -Hs; ulimit -r; ulimit -Hr",
        "123\n456\n0\nunlimited\n1024\n16384\n3\n4",
    ),
    (
        "new privileges",
        "grep NoNewPrivs /proc/self/status | tr -d '\\t'",
        "NoNewPrivs:1",
    ),
    ("oom", "cat /proc/self/oom_score_adj", "321"),
    (
        "read-only root",
        "test -w / || echo no; touch /x",
        "no\ntouch: /x: Read-only file system",
    ),
    // Its own descriptors and nobody else's.
    ("descriptors", "ls /proc/1/fd", "0\n1\n2"),
];

/// What a spec leaves open is as little as other runtimes give.
pub(super) fn process_of_few_words(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["process"] = json!({
        "user": { "uid": 0, "gid": 0 },
        "args": ["sh"],
        "env": ["PATH=/bin"],
        "cwd": "/root",
    });
    bundle.check(&[
        (
            "capabilities",
            "grep Cap /proc/1/status | tr -d '\\t'",
            "CapInh:0000000000000000\nCapPrm:0000000000000000\nCapEff:0000000000000000\n\
             CapBnd:0000000000000000\nCapAmb:0000000000000000",
        ),
        ("umask", "umask", "0022"),
        ("home", "echo $HOME; pwd", "/root\n/root"),
        (
            "new privileges",
            "grep NoNewPrivs /proc/self/status | tr -d '\\t'",
            "NoNewPrivs:0",
        ),
    ])
}

/// A user goes to a directory that he may not enter, as he does with other runtimes.
pub(super) fn exec_as_another(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let root = bundle.root();
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1001::/home:/bin/sh\n",
    )?;
    bundle.spec["process"]["args"] = json!(["sleep", "1000"]);
    bundle.detach()?;
    let exec = |id: &str, flags: &[&str], command: &[&str]| {
        let start = ["task", "exec", "--exec-id", id];
        ctr.ctr(&[&start[..], flags, &[&ctr.id], command].concat())
    };
    let said = exec(
        "e1",
        &["--user", "1000:1001", "--cwd", "/root"],
        &["sh", "-c", "id -u; id -g; pwd; echo $HOME; umask"],
    )?;
    let said = said.success()?;
    ensure!(said == "1000\n1001\n/root\n/home\n0022", "it said {said:?}");
    // Unlike a container's, its working directory is not made.
    let lost = exec("e2", &["--cwd", "/no/such/place"], &["true"])?;
    ensure!(
        lost.status != 0 && lost.stderr.contains("/no/such/place"),
        "in a directory that is not there: {lost:?}"
    );
    let said = exec("e3", &["--cwd", "/tmp"], &["sh", "-c", "pwd; id -u"])?.success()?;
    ensure!(said == "/tmp\n0", "it said {said:?}");
    ctr.ctr(&["task", "kill", "--signal", "SIGKILL", &ctr.id])?
        .success()?;
    ctr.remove_task(137)?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    Ok(())
}

/// What newer versions of the specification have. Debian's runc is too old for most of it.
pub(super) fn process_of_the_newest_spec(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let process = &mut bundle.spec["process"];
    process["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 7,
        "flags": ["SCHED_FLAG_RESET_ON_FORK"] });
    process["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    bundle.spec["domainname"] = "example.husk".into();
    bundle.spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
    bundle.spec["linux"]["timeOffsets"] = json!({
        "monotonic": { "secs": 1_000_000 }, "boottime": { "secs": 2_000_000, "nanosecs": 5 },
    });
    bundle.namespace(json!({ "type": "time" }))?;
    bundle.check(&[
        // proc(5): nice, the real-time priority and the policy; SCHED_BATCH is 3.
        ("scheduler", "cut -d' ' -f19,40,41 /proc/1/stat", "7 0 3"),
        ("I/O priority", "ionice -p 1", "best-effort: prio 6"),
        (
            "domain name",
            "cat /proc/sys/kernel/domainname",
            "example.husk",
        ),
        ("personality", "uname -m", "i686"),
        (
            "clocks",
            "awk '{ print int($1 / 1000000) }' /proc/uptime",
            "2",
        ),
    ])
}

/// What can't be is refused by its name, before anything runs.
pub(super) fn process_that_can_not_be(ctr: &Ctr) -> Result<()> {
    let refused = |word: &str, change: fn(&mut serde_json::Value)| {
        let mut bundle = Bundle::new(ctr)?;
        change(&mut bundle.spec);
        bundle
            .refused(&[word])
            .map_err(|error| error.context(format!("about {word}")))
    };
    refused("rlimits", |spec| {
        let limit = json!({ "type": "RLIMIT_NOFILE", "soft": 2, "hard": 1 });
        spec["process"]["rlimits"] = json!([limit]);
    })?;
    refused("timeOffsets", |spec| {
        spec["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 1 } });
    })
}
