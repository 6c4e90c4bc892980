//! Containers made from a config.json of a scenario's own: any spec, on any root.
//!
//! [`Bundle::new`] takes what `ctr oci spec` gives, on a directory with busybox; the scenario
//! changes the JSON and runs it. Starting a container takes seconds in the testbed, so checks that
//! don't disturb each other share one ([`Bundle::check`]).

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::ctr::{Ctr, Ended, finish};
use crate::fifo::{Fifos, Place};
use crate::shim::{Shim, granted};

/// On a file system of its own kind: not the overlay of containers.
const PLACE: &str = "/var/tmp/husk-bundles";

/// Begins a check's part of the output.
const MARK: &str = "@@ ";

/// One check: its name, shell commands, and what they must print, without blanks at both ends.
pub(crate) type Check<'a> = (&'a str, &'a str, &'a str);

/// A spec and a root to run it on; gone with the value.
pub(crate) struct Bundle<'a> {
    ctr: &'a Ctr,
    /// The whole of config.json.
    pub(crate) spec: Value,
    place: PathBuf,
}

impl<'a> Bundle<'a> {
    /// The usual spec, on a busybox of its own.
    pub(crate) fn new(ctr: &'a Ctr) -> Result<Self> {
        Self::at(ctr, Path::new(PLACE))
    }

    /// The same in a directory of the scenario's choice.
    pub(crate) fn at(ctr: &'a Ctr, place: &Path) -> Result<Self> {
        let text = ctr.ctr(&["oci", "spec"])?.success()?;
        let spec = serde_json::from_str(&text).context("ctr oci spec gives no JSON")?;
        let place = place.join(&ctr.id);
        // What an earlier run has left.
        let _ = fs::remove_dir_all(&place);
        let mut bundle = Self { ctr, spec, place };
        make_root(&bundle.root())?;
        bundle.spec["root"] = json!({ "path": bundle.root() });
        bundle.spec["process"]["terminal"] = false.into();
        // The usual spec has no environment: it is the image's.
        bundle.spec["process"]["env"] = json!(["PATH=/bin"]);
        bundle.spec["linux"]["cgroupsPath"] = format!("/default/{}", ctr.id).into();
        Ok(bundle)
    }

    /// The root's directory on the host.
    pub(crate) fn root(&self) -> PathBuf {
        self.place.join("rootfs")
    }

    /// A directory on the host for what else the scenario needs; gone with the bundle.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.place.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {path:?}"))?;
        Ok(path)
    }

    /// The program is a shell script.
    pub(crate) fn script(&mut self, text: &str) -> &mut Self {
        self.spec["process"]["args"] = json!(["sh", "-c", text]);
        self
    }

    /// Appends a mount.
    pub(crate) fn mount(&mut self, mount: Value) -> Result<&mut Self> {
        let mounts = self.spec["mounts"].as_array_mut();
        mounts.context("the spec has no mounts")?.push(mount);
        Ok(self)
    }

    /// Gives the namespace of a kind these further members, or makes it a new one with them.
    pub(crate) fn namespace(&mut self, namespace: Value) -> Result<&mut Self> {
        let all = self.spec["linux"]["namespaces"].as_array_mut();
        let all = all.context("the spec has no namespaces")?;
        all.retain(|other| other["type"] != namespace["type"]);
        all.push(namespace);
        Ok(self)
    }

    /// Writes config.json and returns its path, for a `ctr run --config` of the scenario's own.
    pub(crate) fn write(&self) -> Result<String> {
        let config = self.place.join("config.json");
        fs::write(&config, self.spec.to_string()).context("cannot write config.json")?;
        Ok(config.display().to_string())
    }

    /// `ctr run --rm`.
    pub(crate) fn run(&self) -> Result<Ended> {
        let config = self.write()?;
        let runtime = self.ctr.runtime();
        let arguments = ["run", "--rm", "--runtime", runtime, "--config", &config];
        let arguments = [&arguments[..], &[&self.ctr.id]].concat();
        finish(self.ctr.spawn_ctr(&arguments, false)?, None)
    }

    /// Runs it to its end as a further container of a shim that serves one. What config.json says gets
    /// there as it is; `ctr` passes on only what it knows. `created` is called in between. Errors that
    /// it writes are not among the output.
    pub(crate) fn run_beside(
        &self,
        shim: &Shim,
        created: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Ended> {
        let task = shim.about(&self.beside());
        let place = Place::make("beside")?;
        let (fifos, streams) = Fifos::make(&place, "beside")?;
        let said = fifos.stdout.reader()?;
        let mut spec = self.spec.clone();
        spec["linux"]["cgroupsPath"] = format!("/default/{}", task.id).into();
        let config = self.place.join("config.json");
        fs::write(&config, spec.to_string()).context("cannot write config.json")?;
        if let Err(refused) = task.create(&self.place, &streams)? {
            return Ok(Ended {
                status: -1,
                stdout: Vec::new(),
                stderr: refused.text,
            });
        }
        let run = || -> Result<u32> {
            created(&config)?;
            granted(task.start(""))?;
            Ok(granted(task.wait(""))?.exit_status())
        };
        let status = run();
        if status.is_err() {
            // It may run, or not.
            let _ = task.kill("", 9, true);
        }
        granted(task.delete(""))?;
        Ok(Ended {
            status: i32::try_from(status?)?,
            stdout: said.rest()?,
            stderr: String::new(),
        })
    }

    fn beside(&self) -> String {
        format!("{}-beside", self.ctr.id)
    }

    /// `ctr run --detach`, for scenarios that exec into the container.
    pub(crate) fn detach(&self) -> Result<()> {
        let config = self.write()?;
        let runtime = self.ctr.runtime();
        let flags = ["run", "--detach", "--null-io", "--runtime", runtime];
        let arguments = [&flags[..], &["--config", &config, &self.ctr.id]].concat();
        self.ctr.ctr(&arguments)?.success()?;
        Ok(())
    }

    /// Runs checks one after the other in one shell, and tells all that are not as they must be.
    pub(crate) fn check(&mut self, checks: &[Check<'_>]) -> Result<()> {
        self.script(&script_of(checks));
        let ended = self.run()?;
        compare(checks, &ended)
    }

    /// The container must not come to be, and the answer must hold these words.
    pub(crate) fn refused(&self, words: &[&str]) -> Result<()> {
        let refusal = self
            .refusal()
            .with_context(|| format!("must be refused with {words:?}"))?;
        let text = refusal.to_lowercase();
        let missing: Vec<_> = words
            .iter()
            .filter(|word| !text.contains(&word.to_lowercase()))
            .collect();
        ensure!(missing.is_empty(), "without {missing:?}: {refusal}");
        Ok(())
    }

    /// How a container is refused that must not come to be.
    pub(crate) fn refusal(&self) -> Result<String> {
        let ended = self.run()?;
        ensure!(ended.status != 0, "it ran");
        // A container that was refused is known to containerd all the same.
        self.ctr.bury();
        Ok(ended.stderr)
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        // The scenario's own result is what counts.
        let _ = fs::remove_dir_all(&self.place);
    }
}

/// The checks as one script; what one of them breaks off stays within it.
pub(crate) fn script_of(checks: &[Check<'_>]) -> String {
    let mut script = String::new();
    for (name, commands, _) in checks {
        let _ = writeln!(script, "echo '{MARK}{name}'\n(\n{commands}\n) 2>&1");
    }
    script
}

/// Compares what the script of some checks has printed.
pub(crate) fn compare(checks: &[Check<'_>], ended: &Ended) -> Result<()> {
    let text = ended.text();
    let mut wrong = String::new();
    for (name, _, expected) in checks {
        let part = part_of(&text, name);
        if part != Some(expected.trim()) {
            let _ = write!(
                wrong,
                "\n  {name}: it says {part:?} instead of {expected:?}"
            );
        }
    }
    ensure!(
        wrong.is_empty(),
        "ended with {}: {}{wrong}",
        ended.status,
        ended.stderr.trim()
    );
    Ok(())
}

/// What the check of that name has printed.
fn part_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("{MARK}{name}\n")).or_else(|| {
        // The last one, that has printed nothing.
        text.ends_with(&format!("{MARK}{name}")).then_some(("", ""))
    })?;
    Some(rest.split(MARK).next().unwrap_or(rest).trim())
}

/// A root with busybox, the testbed's own, and nothing else.
pub(crate) fn make_root(root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let busybox = root.join("bin/busybox");
    fs::copy("/usr/bin/busybox", &busybox).context("cannot copy busybox")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    let installed = Command::new(&busybox)
        .args(["--install", "-s"])
        .arg(root.join("bin"))
        .status()?;
    ensure!(
        installed.success(),
        "busybox --install ended with {installed}"
    );
    for link in fs::read_dir(root.join("bin"))? {
        let path = link?.path();
        if path.is_symlink() {
            fs::remove_file(&path)?;
            std::os::unix::fs::symlink("busybox", &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(text: &str) -> Ended {
        Ended {
            status: 0,
            stdout: text.into(),
            stderr: String::new(),
        }
    }

    const CHECKS: [Check<'static>; 2] = [("one", "echo 1", "1"), ("none", "true", "")];

    #[test]
    fn missing_part_is_wrong() {
        assert!(compare(&CHECKS, &ended("")).is_err());
        assert!(compare(&CHECKS, &ended("@@ one\n1\n")).is_err());
        assert!(compare(&CHECKS, &ended("@@ one\n2\n@@ none\n")).is_err());
    }

    #[test]
    fn parts_are_told_apart() {
        compare(&CHECKS, &ended("@@ one\n1\n@@ none\n")).unwrap();
    }
}
