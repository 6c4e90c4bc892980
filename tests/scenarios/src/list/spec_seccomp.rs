//! What config.json says of system calls.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::spec::Bundle;

/// Every action, and conditions on arguments.
pub(super) fn spec_seccomp(ctr: &Ctr) -> Result<()> {
    let rule = |name: &str, action: &str| json!({ "names": [name], "action": action });
    let errno = |name: &str, errno: u32, args: Value| json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args });
    // The second argument of kill is the signal.
    let signal = |op: &str, value: u32, value_two: u32| json!([{ "index": 1, "op": op, "value": value, "valueTwo": value_two }]);
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO",
              "errnoRet": 7 },
            rule("link", "SCMP_ACT_ERRNO"),
            rule("sethostname", "SCMP_ACT_KILL_PROCESS"),
            rule("sync", "SCMP_ACT_KILL_THREAD"),
            rule("swapoff", "SCMP_ACT_KILL"),
            rule("syslog", "SCMP_ACT_TRAP"),
            rule("umount2", "SCMP_ACT_TRACE"),
            rule("chroot", "SCMP_ACT_LOG"),
            errno("kill", 17, signal("SCMP_CMP_EQ", 3, 0)),
            errno("kill", 18, signal("SCMP_CMP_GT", 14, 0)),
            errno("kill", 40, signal("SCMP_CMP_MASKED_EQ", 0xc, 8)),
        ],
    });
    if ctr.is_husk() {
        // Debian's runc has no flags yet.
        bundle.spec["linux"]["seccomp"]["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG"]);
    }
    bundle.check(&[
        (
            "errno of the rule",
            "mkdir /tmp/x 2>&1 | grep -o 'Arg.*'",
            "Argument list too long",
        ),
        (
            "errno of no rule is EPERM",
            "echo >/tmp/a; ln /tmp/a /tmp/b 2>&1 | grep -o 'Oper.*'",
            "Operation not permitted",
        ),
        (
            "kill the process",
            "(hostname x; echo $?) 2>/dev/null",
            "159",
        ),
        ("kill the thread", "(sync; echo $?) 2>/dev/null", "159"),
        (
            "kill, the old name",
            "(swapoff /tmp/a; echo $?) 2>/dev/null",
            "159",
        ),
        ("trap", "(dmesg; echo $?) 2>/dev/null", "159"),
        (
            "trace without a tracer",
            "umount /proc 2>&1 | grep -o 'Func.*'",
            "Function not implemented",
        ),
        ("log", "chroot / echo inside", "inside"),
        (
            "conditions",
            // To process 1, a shell, which has no handlers of these and so does not hear them.
            "for n in 3 4 7 8 11 12 14 15; do kill -$n 1 2>/dev/null && echo -n \"$n \"; done",
            "4 7 12 14",
        ),
        (
            "in force",
            "grep -w Seccomp: /proc/self/status",
            "Seccomp:\t2",
        ),
    ])
}

/// What is wrong with a filter is named, and nothing runs without it.
pub(super) fn spec_seccomp_refused(ctr: &Ctr) -> Result<()> {
    let refused = |seccomp, words: &[&str]| -> Result<()> {
        let mut bundle = Bundle::new(ctr)?;
        bundle.spec["linux"]["seccomp"] = seccomp;
        bundle.script("true").refused(words)
    };
    refused(
        json!({ "defaultAction": "SCMP_ACT_MAYBE" }),
        &["SCMP_ACT_MAYBE"],
    )?;
    refused(
        json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": ["read"], "action": "SCMP_ACT_ERRNO",
              "args": [{ "index": 0, "op": "SCMP_CMP_MAYBE", "value": 1 }] } ] }),
        &["SCMP_CMP_MAYBE"],
    )
}

/// containerd's own profile: what it allows works, what it forbids does not, and what it has never
/// heard of does not exist.
pub(super) fn default_seccomp(ctr: &Ctr) -> Result<()> {
    // uselib is in no container's profile; 4000 is nobody's.
    let program =
        "for $call (134, 4000) { $! = 0; print syscall($call, 0, 0), q( ), $! + 0, qq(\\n) }";
    let mount = "type=bind,src=/testdata/debian,dst=/mnt,options=rbind:ro";
    let script =
        "mkdir /tmp/x && ln -s a /tmp/x/b && ls /tmp/x && grep -w Seccomp: /proc/self/status
        echo \"$0\" | chroot /mnt perl";
    let said = ctr
        .run(
            &["--seccomp", "--mount", mount],
            &["sh", "-c", script, program],
        )?
        .success()?;
    ensure!(said == "b\nSeccomp:\t2\n-1 1\n-1 38", "it says {said:?}");
    Ok(())
}
