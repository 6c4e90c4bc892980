//! Block devices of the host that containers are given: to use as they are, or with a file system.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_cri::messages::{ContainerConfig, Device};
use husk_cri::{Pod, container, pod};
use serde_json::{Value, json};

use crate::ctr::Ctr;
use crate::host::{self, HostMount};
use crate::kubelet::Kubelet;
use crate::spec::{Bundle, Check};

const DISK_BYTES: u64 = 8 << 20;
const SECTOR_BYTES: u64 = 512;

/// A loop device; gone with the value.
pub(super) struct Loop(PathBuf);

impl Loop {
    /// Its node.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// One with a text at its beginning.
    pub(super) fn with(file: &Path, text: &str) -> Result<Self> {
        fs::write(file, text)?;
        Self::of(file)
    }

    /// One with a file system that has a file.
    fn ext4(file: &Path, content: &Path) -> Result<Self> {
        File::create(file)?.set_len(DISK_BYTES)?;
        said(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-d"])
                .args([content, file]),
        )?;
        Self::of(file)
    }

    fn of(file: &Path) -> Result<Self> {
        File::options()
            .write(true)
            .open(file)?
            .set_len(DISK_BYTES)?;
        let made = said(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(made.trim().into()))
    }

    /// Major and minor.
    fn number(&self) -> Result<[u32; 2]> {
        let number = fs::metadata(&self.0)?.rdev();
        Ok([rustix::fs::major(number), rustix::fs::minor(number)])
    }

    fn device(&self, path: &str) -> Result<Value> {
        let [major, minor] = self.number()?;
        Ok(
            json!({ "type": "b", "path": path, "major": major, "minor": minor,
                   "fileMode": 0o640, "uid": 1000, "gid": 2000 }),
        )
    }

    fn rule(&self, access: &str) -> Result<Value> {
        let [major, minor] = self.number()?;
        Ok(json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": access }))
    }

    fn mount(&self, destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "ext4", "source": self.0, "options": options })
    }

    pub(super) fn for_pod(&self, path: &str, permissions: &str) -> Device {
        Device {
            container_path: path.to_owned(),
            host_path: self.0.display().to_string(),
            permissions: permissions.to_owned(),
            ..Device::default()
        }
    }

    /// Whether a VMM has it.
    fn is_with_vmm(&self) -> Result<bool> {
        for vmm in host::vmms()? {
            for descriptor in fs::read_dir(format!("/proc/{}/fd", vmm.pid))? {
                // It may be closed by now.
                let Ok(open) = fs::read_link(descriptor?.path()) else {
                    continue;
                };
                // The VMM's root has no such path, so that the kernel may say more than the name.
                if open.file_name() == self.0.file_name() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The scenario's own result is what counts.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

/// The output of a command that succeeds.
fn said(command: &mut Command) -> Result<String> {
    let output = command.output().context("it can't be run")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {stderr}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn push(list: &mut Value, more: Value) -> Result<()> {
    if list.is_null() {
        *list = json!([]);
    }
    list.as_array_mut().context("it is no list")?.push(more);
    Ok(())
}

/// A device that is written to, one that is only read, and file systems, by the spec.
pub(super) fn of_the_spec(ctr: &Ctr) -> Result<()> {
    let mut bundle = Bundle::new(ctr)?;
    let place = bundle.directory("disks")?;
    let content = bundle.directory("content")?;
    fs::write(content.join("file"), "made on the host\n")?;
    let written = Loop::with(&place.join("written"), "from the host\n")?;
    let sealed = Loop::with(&place.join("sealed"), "for reading\n")?;
    let data = Loop::ext4(&place.join("data"), &content)?;
    let fixed = Loop::ext4(&place.join("fixed"), &content)?;
    let linux = &mut bundle.spec["linux"];
    for (disk, path, access) in [
        (&written, "/dev/deep/written", "rwm"),
        (&sealed, "/srv/sealed", "rm"),
    ] {
        push(&mut linux["devices"], disk.device(path)?)?;
        push(&mut linux["resources"]["devices"], disk.rule(access)?)?;
    }
    bundle.mount(data.mount("/data", &["noatime", "nodev", "errors=remount-ro"]))?;
    bundle.mount(fixed.mount("/fixed", &["ro"]))?;

    bundle.check(&OF_THE_SPEC)?;

    let mut text = [0; 12];
    File::open(&written.0)?.read_exact_at(&mut text, SECTOR_BYTES)?;
    ensure!(&text == b"from inside\n", "the host reads {text:?}");
    let on_host = place.join("mounted");
    let device = data.0.display().to_string();
    let _mount = HostMount::mount(&on_host, &["-t", "ext4", &device], &place)?;
    let text = fs::read_to_string(on_host.join("deep/new"))?;
    ensure!(
        text == "new\n",
        "the host reads {text:?} in the file system"
    );
    Ok(())
}

const OF_THE_SPEC: [Check<'static>; 6] = [
    (
        "nodes",
        "stat -c '%F %a %u:%g' /dev/deep/written /srv/sealed",
        "block special file 640 1000:2000\nblock special file 640 1000:2000",
    ),
    (
        "content and size",
        "head -n 1 /dev/deep/written; head -n 1 /srv/sealed; blockdev --getsize64 /dev/deep/written",
        "from the host\nfor reading\n8388608",
    ),
    (
        "writing",
        "echo from inside | dd of=/dev/deep/written bs=512 seek=1 conv=notrunc,fsync 2>/dev/null &&
         dd if=/dev/deep/written bs=512 skip=1 count=1 2>/dev/null | head -n 1",
        "from inside",
    ),
    (
        "writing what is read-only",
        "(echo x > /srv/sealed); head -n 1 /srv/sealed",
        "sh: can't create /srv/sealed: Operation not permitted\nfor reading",
    ),
    (
        "file system",
        "cat /data/file; mkdir /data/deep; echo new > /data/deep/new; stat -f -c %T /data
         grep ' /data ' /proc/self/mountinfo | cut -d' ' -f6
         grep ' /data ' /proc/self/mountinfo | sed 's/.* - //' | cut -d' ' -f1",
        "made on the host\next2/ext3\nrw,nodev,noatime\next4",
    ),
    (
        "read-only file system",
        "cat /fixed/file; touch /fixed/x",
        "made on the host\ntouch: /fixed/x: Read-only file system",
    ),
];

/// What can't be given is told of, and leaves nothing.
pub(super) fn refused(ctr: &Ctr) -> Result<()> {
    let bundle = Bundle::new(ctr)?;
    let place = bundle.directory("disks")?;
    let empty = Loop::with(&place.join("empty"), "")?;
    let used = Loop::ext4(&place.join("used"), &bundle.directory("content")?)?;
    let device = used.0.display().to_string();
    let _mount = HostMount::mount(&place.join("mounted"), &["-t", "ext4", &device], &place)?;
    let refused = |change: &dyn Fn(&mut Bundle<'_>) -> Result<()>, words: &[&str]| {
        let mut bundle = Bundle::at(ctr, &place)?;
        change(bundle.script("true"))?;
        bundle.refused(words)
    };
    refused(
        &|bundle| bundle.mount(used.mount("/a", &[])).map(drop),
        &[&device, "in use on the host"],
    )?;
    refused(
        &|bundle| bundle.mount(empty.mount("/a", &[])).map(drop),
        &["/a", "ext4"],
    )?;
    refused(
        &|bundle| {
            bundle.namespace(json!({ "type": "user" }))?;
            push(&mut bundle.spec["linux"]["devices"], used.device("/dev/x")?)
        },
        &["/dev/x", "user namespace"],
    )?;
    ensure!(!used.is_with_vmm()?, "a VMM has {device} still");
    Ok(())
}

/// Two containers of a pod have one device, which is the pod's for as long as one of them is there.
pub(super) fn of_a_pod(ctr: &Ctr) -> Result<()> {
    let place = Path::new("/var/tmp/husk-disks").join(&ctr.id);
    fs::create_dir_all(&place)?;
    let done = in_a_pod(ctr, &place);
    fs::remove_dir_all(&place)?;
    done
}

fn in_a_pod(ctr: &Ctr, place: &Path) -> Result<()> {
    let shared = Loop::with(&place.join("shared"), "from the host\n")?;
    let sealed = Loop::with(&place.join("sealed"), "for reading\n")?;
    let sleeper = |name: &str, devices: Vec<Device>| ContainerConfig {
        devices,
        ..container(name, &["sleep", "1000"])
    };
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let of_a = vec![
            shared.for_pod("/dev/a", "rwm"),
            sealed.for_pod("/dev/sealed", "r"),
        ];
        let a = kubelet.start(pod, sleeper("a", of_a))?;
        let b = kubelet.start(pod, sleeper("b", vec![shared.for_pod("/dev/b", "rwm")]))?;
        kubelet.shell(
            &a,
            "echo from a | dd of=/dev/a conv=notrunc,fsync 2>/dev/null",
        )?;
        let read = kubelet.shell(&b, "head -n 1 /dev/b")?;
        ensure!(read == "from a", "the other container reads {read:?}");
        let read = kubelet.shell(&a, "head -n 1 /dev/sealed")?;
        ensure!(read == "for reading", "it is {read:?}");
        if ctr.is_husk() {
            let script = "cat /sys/dev/block/$(($(stat -c 0x%t /dev/sealed))):$(($(stat -c 0x%T \
                          /dev/sealed)))/ro";
            let read_only = kubelet.shell(&a, script)?;
            ensure!(read_only == "1", "the guest's kernel may write to it");
        }

        kubelet.cri.stop_container(&a, 0)?;
        kubelet.cri.remove_container(&a)?;
        kubelet.shell(&b, "echo from b | dd of=/dev/b conv=notrunc 2>/dev/null")?;
        if ctr.is_husk() {
            ensure!(shared.is_with_vmm()?, "the pod does not have what b has");
            ensure!(!sealed.is_with_vmm()?, "the pod has what nobody has");
        }
        kubelet.cri.stop_container(&b, 0)?;
        kubelet.cri.remove_container(&b)?;
        ensure!(!shared.is_with_vmm()?, "the pod has what nobody has");
        let mut text = [0; 7];
        File::open(&shared.0)?.read_exact_at(&mut text, 0)?;
        ensure!(&text == b"from b\n", "the host reads {text:?}");

        // A slot is used again.
        let c = sleeper("c", vec![sealed.for_pod("/dev/c", "rw")]);
        let c = kubelet.start(pod, c)?;
        let read = kubelet.shell(&c, "echo now | dd of=/dev/c 2>/dev/null; head -n 1 /dev/c")?;
        ensure!(read == "now", "it is {read:?}");
        if ctr.is_husk() {
            more_than_slots(kubelet, pod, place)?;
        }
        Ok(())
    })
}

/// A pod that has one has no more than three more; of a container that can't have all, none stays.
fn more_than_slots(kubelet: &Kubelet, pod: &Pod, place: &Path) -> Result<()> {
    let mut disks = Vec::new();
    for name in ["one", "two", "three", "four"] {
        disks.push(Loop::with(&place.join(name), name)?);
    }
    let paths = disks.iter().enumerate();
    let devices = paths.map(|(index, disk)| disk.for_pod(&format!("/dev/d{index}"), "rw"));
    let wanted = ContainerConfig {
        devices: devices.collect(),
        ..container("d", &["true"])
    };
    let id = kubelet.cri.create_container(pod, wanted)?;
    let refused = kubelet.cri.start_container(&id);
    let text = format!("{:#}", refused.err().context("it has more than slots")?);
    ensure!(text.contains("slots for block devices"), "it says {text:?}");
    kubelet.cri.remove_container(&id)?;
    for disk in &disks {
        ensure!(!disk.is_with_vmm()?, "the pod has {:?} still", disk.0);
    }
    Ok(())
}
