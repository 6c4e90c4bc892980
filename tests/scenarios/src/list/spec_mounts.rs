//! What config.json says about mounts, devices and paths.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::host::HostMount;
use crate::spec::{Bundle, Check};

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": "bind", "source": source, "options": options })
}

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options })
}

/// Volumes: files and directories of the host, with every option.
pub(super) fn bind_mounts(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let source = bundle.directory("source")?;
    fs::write(source.join("file"), "from outside\n")?;
    let _inner = HostMount::tmpfs(&source.join("inner"))?;
    fs::write(source.join("inner/deep"), "deep\n")?;
    let root = bundle.root();
    // A way out, if links were followed as the host's.
    symlink("../../../../outside/place", root.join("link"))?;
    symlink("/missing/target", root.join("etc/resolv.conf"))?;
    for mount in [
        bind(&source, "/plain", &["bind", "ro"]),
        bind(&source, "/deep", &["rbind", "rw"]),
        bind(&source, "/sealed", &["rbind", "rro"]),
        bind(
            &source,
            "/flags",
            &["bind", "nosuid", "nodev", "noexec", "noatime"],
        ),
        bind(&source, "/deepflags", &["rbind", "rnosuid", "rnodev"]),
        bind(&source.join("file"), "/made/for/it", &["bind", "ro"]),
        bind(&source.join("file"), "/etc/resolv.conf", &["rbind", "rw"]),
        bind(&source, "/link", &["bind"]),
        bind(&source, "relative/place", &["bind"]),
        bind(&source, "/up/../../../down", &["bind"]),
        json!({ "destination": "/untyped", "source": source, "options": ["bind"] }),
    ] {
        bundle.mount(mount)?;
    }
    bundle.check(&BIND_MOUNTS)?;
    ensure!(
        source.join("inner/written").exists(),
        "what the container wrote below a mount is not there"
    );
    ensure!(
        root.join("outside/place").is_dir(),
        "the link's target is not in the root"
    );
    Ok(())
}

const BIND_MOUNTS: [Check<'static>; 9] = [
    (
        "read-only",
        "cat /plain/file; touch /plain/x; ls /plain/inner",
        "from outside\ntouch: /plain/x: Read-only file system",
    ),
    (
        "recursive",
        "cat /deep/inner/deep; touch /deep/inner/written && echo written",
        "deep\nwritten",
    ),
    (
        "recursively read-only",
        "cat /sealed/inner/deep; touch /sealed/inner/x; touch /sealed/x",
        "deep\ntouch: /sealed/inner/x: Read-only file system\n\
         touch: /sealed/x: Read-only file system",
    ),
    (
        "flags",
        "for f in nosuid nodev noexec noatime; do
            grep ' /flags ' /proc/self/mountinfo | cut -d' ' -f6 | grep -c $f; done
         /flags/file || true",
        "1\n1\n1\n1\nsh: /flags/file: Permission denied",
    ),
    (
        "recursive flags",
        "for f in nosuid nodev noexec; do
            grep ' /deepflags ' /proc/self/mountinfo | cut -d' ' -f6 | grep -c $f; done",
        "1\n1\n0",
    ),
    ("file", "cat /made/for/it", "from outside"),
    (
        "link to nowhere",
        "cat /etc/resolv.conf /missing/target; readlink /etc/resolv.conf",
        "from outside\nfrom outside\n/missing/target",
    ),
    (
        "link that leads out",
        "cat /link/file; cat /outside/place/file",
        "from outside\nfrom outside",
    ),
    (
        "odd destinations",
        "cat /relative/place/file /down/file /untyped/file",
        "from outside\nfrom outside\nfrom outside",
    ),
];

/// File systems of the kernel's own, with their options.
pub(super) fn other_mounts(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let root = bundle.root();
    for (name, mode) in [("narrow", 0o711), ("copied", 0o755), ("copied/sub", 0o700)] {
        fs::create_dir(root.join(name))?;
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode))?;
    }
    fs::write(root.join("copied/sub/file"), "copied\n")?;
    chown(root.join("copied/sub/file"), Some(1000), Some(2000))?;
    symlink("sub/file", root.join("copied/link"))?;
    let kernel = |kind: &str, destination: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    for mount in [
        tmpfs("/sized", &["size=1m", "mode=1770", "nosuid", "strictatime"]),
        tmpfs("/narrow", &["rw"]),
        tmpfs("/copied", &["tmpcopyup", "size=4m"]),
        tmpfs("/empty", &["ro"]),
        tmpfs("/one", &["shared"]),
        tmpfs("/two", &["unbindable", "nodiratime"]),
        tmpfs("/three", &["rprivate", "noatime", "sync", "dirsync"]),
        kernel("proc", "/other/proc", &["nosuid", "noexec", "nodev", "ro"]),
        kernel(
            "sysfs",
            "/other/sys",
            &["nosuid", "noexec", "nodev", "relatime"],
        ),
        kernel(
            "cgroup",
            "/other/cgroup",
            &["nosuid", "noexec", "nodev", "rw"],
        ),
        kernel(
            "cgroup",
            "/sys/fs/cgroup",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        kernel("mqueue", "/other/mqueue", &["nosuid", "noexec", "nodev"]),
        kernel(
            "devpts",
            "/other/pts",
            &["newinstance", "ptmxmode=0600", "mode=0611", "gid=7"],
        ),
    ] {
        bundle.mount(mount)?;
    }
    bundle.namespace(json!({ "type": "cgroup" }))?;
    bundle.check(&other_checks())?;
    ensure!(
        !root.join("copied/new").exists(),
        "what was written to a copy is in the root"
    );
    Ok(())
}

fn other_checks() -> Vec<Check<'static>> {
    vec![
        (
            "size and mode",
            "stat -c %a /sized; df -k /sized | tail -n 1 | awk '{ print $2 }'
             grep ' /sized ' /proc/self/mountinfo | cut -d' ' -f6",
            "1770\n1024\nrw,nosuid",
        ),
        ("mode of what it covers", "stat -c %a /narrow", "711"),
        (
            "copy",
            "cat /copied/link; stat -c '%a %u:%g' /copied/sub /copied/sub/file; touch /copied/new
             stat -c %a /copied; grep -c ' /copied .*tmpfs' /proc/self/mountinfo",
            "copied\n700 0:0\n644 1000:2000\n755\n1",
        ),
        (
            "read-only",
            "touch /empty/x; grep ' /empty ' /proc/self/mountinfo | cut -d' ' -f6",
            "touch: /empty/x: Read-only file system\nro,relatime",
        ),
        (
            "propagation",
            "for m in one two three; do grep \" /$m \" /proc/self/mountinfo | cut -d' ' -f7 |
                 cut -d: -f1; done",
            "shared\nunbindable\n-",
        ),
        (
            "times",
            "for m in two three; do grep \" /$m \" /proc/self/mountinfo | cut -d' ' -f6; done
             grep ' /three ' /proc/self/mountinfo | sed 's/.* - //' | cut -d' ' -f3 | cut -d, -f1-3",
            "rw,nodiratime,relatime\nrw,noatime\nrw,sync,dirsync",
        ),
        (
            "proc",
            "ls -d /other/proc/1; grep ' /other/proc ' /proc/self/mountinfo | cut -d' ' -f6",
            "/other/proc/1\nro,nosuid,nodev,noexec,relatime",
        ),
        ("sysfs", "ls -d /other/sys/kernel", "/other/sys/kernel"),
        (
            "cgroup",
            "mkdir /other/cgroup/mine && rmdir /other/cgroup/mine && echo made
             mkdir /sys/fs/cgroup/mine; cut -d: -f3 /proc/self/cgroup",
            "made\nmkdir: can't create directory '/sys/fs/cgroup/mine': Read-only file system\n/",
        ),
        (
            "mqueue",
            "touch /other/mqueue/q && ls /dev/mqueue",
            "q",
        ),
        (
            "devpts",
            "stat -c '%a %t:%T' /other/pts/ptmx; ls /other/pts",
            "600 5:2\nptmx",
        ),
        (
            "shm",
            "df -k /dev/shm | tail -n 1 | awk '{ print $2 }'; stat -c %a /dev/shm",
            "65536\n1777",
        ),
    ]
}

/// /dev is as other runtimes make it, with the spec's own devices.
pub(super) fn devices(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    bundle.spec["linux"]["devices"] = json!([
        { "type": "c", "path": "/dev/own-null", "major": 1, "minor": 3, "fileMode": 0o640,
          "uid": 1000, "gid": 2000 },
        { "type": "u", "path": "/dev/deep/zero", "major": 1, "minor": 5, "fileMode": 0o20600 },
        { "type": "c", "path": "/dev/full", "major": 1, "minor": 7, "fileMode": 0o444, "gid": 7 },
        { "type": "p", "path": "/dev/pipe", "fileMode": 0o622, "uid": 3, "gid": 4 },
        { "type": "c", "path": "/srv/random", "major": 1, "minor": 8 },
    ]);
    bundle.check(&DEVICES)
}

const DEVICES: [Check<'static>; 6] = [
    (
        "usual",
        "cd /dev; stat -c '%n %F %a %u:%g %t:%T' null zero random urandom tty",
        "null character special file 666 0:0 1:3\nzero character special file 666 0:0 1:5\n\
         random character special file 666 0:0 1:8\nurandom character special file 666 0:0 1:9\n\
         tty character special file 666 0:0 5:0",
    ),
    (
        "links",
        "cd /dev; for l in fd stdin stdout stderr ptmx; do readlink $l; done
         test ! -e /proc/kcore || readlink core | sed 's,^/proc/kcore$,,'",
        "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx",
    ),
    (
        "own",
        "stat -c '%n %F %a %u:%g %t:%T' /dev/own-null /dev/deep/zero /dev/full /srv/random",
        "/dev/own-null character special file 640 1000:2000 1:3\n\
         /dev/deep/zero character special file 600 0:0 1:5\n\
         /dev/full character special file 444 0:7 1:7\n\
         /srv/random character special file 666 0:0 1:8",
    ),
    (
        "pipe",
        "stat -c '%F %a %u:%g' /dev/pipe; (echo through > /dev/pipe &) ; cat /dev/pipe",
        "fifo 622 3:4\nthrough",
    ),
    (
        "at work",
        "head -c 3 /dev/deep/zero | xxd -p; echo x > /dev/own-null && echo gone
         head -c 5 /dev/urandom | wc -c; test -e /dev/console || echo none",
        "000000\ngone\n5\nnone",
    ),
    // By the rules of the usual spec: no other device may be opened.
    (
        "others",
        "mknod /dev/mem-too c 1 1 && cat /dev/mem-too",
        "cat: can't open '/dev/mem-too': Operation not permitted",
    ),
];

/// Hidden and sealed paths, where there is something to hide and where there isn't.
pub(super) fn masked_and_readonly_paths(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let root = bundle.root();
    for name in ["secrets", "fixed"] {
        fs::create_dir(root.join(name))?;
        fs::write(root.join(name).join("file"), "text\n")?;
    }
    fs::write(root.join("etc/secret"), "text\n")?;
    fs::write(root.join("etc/fixed"), "text\n")?;
    for (member, paths) in [
        ("maskedPaths", ["/secrets", "/etc/secret", "/no/such/path"]),
        ("readonlyPaths", ["/fixed", "/etc/fixed", "/no/such/path"]),
    ] {
        let list = bundle.spec["linux"][member].as_array_mut();
        list.context("the usual spec has no such list")?
            .extend(paths.map(Value::from));
    }
    bundle.mount(tmpfs("/fixed/mounted", &["rw"]))?;
    bundle.check(&MASKED_AND_READONLY)
}

const MASKED_AND_READONLY: [Check<'static>; 5] = [
    (
        "masked",
        "ls /secrets; touch /secrets/x; cat /etc/secret; echo kept > /etc/secret; cat /etc/secret",
        "touch: /secrets/x: Read-only file system",
    ),
    (
        "usual masks",
        "stat -c '%t:%T' /proc/keys /proc/timer_list | grep -v '^1:3$'; ls /sys/firmware",
        "",
    ),
    (
        "read-only",
        "cat /fixed/file /etc/fixed; touch /fixed/x; (echo x > /etc/fixed)
         touch /fixed/mounted/x && echo not below",
        "text\ntext\ntouch: /fixed/x: Read-only file system\n\
         sh: can't create /etc/fixed: Read-only file system\nnot below",
    ),
    // Flags of what is sealed are not lost over it.
    (
        "flags",
        "grep ' /proc/sys ' /proc/self/mountinfo | cut -d' ' -f6",
        "ro,nosuid,nodev,noexec,relatime",
    ),
    (
        "parameters",
        "(echo 1 > /proc/sys/kernel/pid_max)",
        "sh: can't create /proc/sys/kernel/pid_max: Read-only file system",
    ),
];
