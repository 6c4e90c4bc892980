//! Root file systems and volumes at work.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::ctr::Ctr;

/// The checks of a file system, beside this program.
const CHECKS: &str = "/share/husk-fscheck";

/// A directory of the testbed on a file system of its own kind: not the overlay of containers.
const HOST_DIRECTORY: &str = "/var/tmp/husk-scenarios";

/// A Debian root file system with tools and packages, which `testbed-import` imports.
const DEBIAN: &str = "docker.io/library/debian:husk";

/// For what takes minutes in the testbed.
const LONG_DEADLINE_S: u32 = 1800;

/// A volume behaves in the container as it does on the host, down to each error.
pub(super) fn file_system(ctr: &Ctr) -> Result<()> {
    let place = Path::new(HOST_DIRECTORY);
    fs::create_dir_all(place)?;
    let result = compare_with_host(ctr, place);
    fs::remove_dir_all(place)?;
    result
}

fn compare_with_host(ctr: &Ctr, place: &Path) -> Result<()> {
    let (host, volume) = (place.join("host"), place.join("volume"));
    fs::create_dir(&host)?;
    fs::create_dir(&volume)?;
    fs::copy(CHECKS, place.join("fscheck")).context("cannot copy the checks")?;
    let expected = Command::new(CHECKS)
        .arg(&host)
        .output()
        .context("cannot run the checks")?;
    let expected = String::from_utf8_lossy(&expected.stdout)
        .trim_end()
        .to_owned();
    ensure!(
        expected.contains(" 0 failed"),
        "the host's own file system fails: {expected}"
    );
    let mount = format!("type=bind,src={HOST_DIRECTORY},dst=/mnt,options=rbind:rw");
    let flags = ["--privileged", "--mount", &mount];
    let ended = ctr.run(&flags, &["/mnt/fscheck", "/mnt/volume"])?;
    let said = ended.text();
    ensure!(
        said == expected,
        "ended with {}, {}",
        ended.status,
        difference(&expected, &said, &ended.stderr)
    );
    Ok(())
}

/// The lines of one text that the other lacks.
fn difference(expected: &str, said: &str, stderr: &str) -> String {
    let lines = |a: &str, b: &str| {
        let other: Vec<_> = b.lines().collect();
        let missing: Vec<_> = a.lines().filter(|line| !other.contains(line)).collect();
        missing.join("\n  ")
    };
    format!(
        "not as on the host: it says\n  {}\ninstead of\n  {}\n{stderr}",
        lines(said, expected),
        lines(expected, said)
    )
}

/// What people do in a Debian: install a package, run a script, compile a program.
pub(super) fn debian_work(ctr: &mut Ctr) -> Result<()> {
    import_debian(ctr)?;
    let script = r#"
        dpkg -i /opt/packages/hello_*.deb >/dev/null && hello
        python3 -c 'import json, hashlib; print(json.dumps({"python": sum(range(10))}))'
        printf '#include <stdio.h>\nint main(void) { puts("compiled"); return 0; }\n' > /tmp/a.c
        gcc -O1 -o /tmp/a /tmp/a.c && /tmp/a
        dpkg -r hello >/dev/null && ! test -e /usr/bin/hello && echo removed"#;
    let said = ctr.run(&[], &["sh", "-ec", script])?.success()?;
    ensure!(
        said == "Hello, world!\n{\"python\": 45}\ncompiled\nremoved",
        "it said {said:?}"
    );
    Ok(())
}

/// A tree of files goes through tar, and comes out with all its attributes.
pub(super) fn debian_tree(ctr: &mut Ctr) -> Result<()> {
    tar_a_tree(ctr, 1_000)
}

/// The same with so many files that the server can't hold each by a descriptor.
pub(super) fn debian_big_tree(ctr: &mut Ctr) -> Result<()> {
    tar_a_tree(ctr, 20_000)
}

fn tar_a_tree(ctr: &mut Ctr, files: u32) -> Result<()> {
    import_debian(ctr)?;
    // 200 files a directory. The second archive is compared with the first: names, contents and
    // all attributes are in it.
    let script = r#"
        mkdir /tree /copy
        python3 - <<'END'
import os
for number in range(FILES):
    directory = f"/tree/{number // 200:03}"
    if number % 200 == 0:
        os.mkdir(directory, 0o700 | number // 200 % 64)
    path = f"{directory}/{number:05}"
    if number % 50 == 49:
        os.symlink(f"{number - 1:05}", path)
    elif number % 50 == 48:
        os.link(f"{directory}/{number - 1:05}", path)
    else:
        with open(path, "w") as file:
            file.write(f"file {number}\n" * (number % 7))
        os.chmod(path, 0o400 | number % 0o400)
        if number % 10 == 3:
            os.chown(path, number % 1000, number % 77)
        os.utime(path, ns=(number * 10**9 + 5, number * 10**9 + 7))
END
        archive() {
            tar -C "$1" --sort=name --numeric-owner --format=posix \
                --pax-option=delete=atime,delete=ctime,exthdr.name=%d/%f -cf "$2" .
        }
        archive /tree /a.tar
        tar -C /copy --numeric-owner -xpf /a.tar
        archive /copy /b.tar
        cmp /a.tar /b.tar && tar -tf /a.tar | wc -l"#
        .replace("FILES", &files.to_string());
    let said = ctr.run(&[], &["sh", "-ec", &script])?.success()?;
    // The files, their directories, and the tree's own.
    let expected = files + files.div_ceil(200) + 1;
    ensure!(
        said == expected.to_string(),
        "it said {said:?}, not {expected}"
    );
    Ok(())
}

/// Imports the image, once for all runtimes.
fn import_debian(ctr: &mut Ctr) -> Result<()> {
    ctr.image = DEBIAN;
    ctr.deadline_s = LONG_DEADLINE_S;
    let status = Command::new("testbed-import")
        .status()
        .context("cannot run testbed-import")?;
    ensure!(status.success(), "testbed-import ended with {status}");
    Ok(())
}
