//! Roots that a snapshotter keeps in files, each with a file system of its own.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use husk_cri::messages::ContainerConfig;
use husk_cri::{Pod, container, pod};

use super::disks::Loop;
use crate::ctr::Ctr;
use crate::host;
use crate::kubelet::{self, Kubelet};

/// What `ctr` is told so that a container's root is in a file.
const IN_A_FILE: [&str; 2] = ["--snapshotter", "blockfile"];

/// Says what the root is on.
const ROOT: &str = "grep ' / ' /proc/mounts | cut -d' ' -f1,3";

/// The snapshotter's files.
struct Files(PathBuf);

impl Files {
    /// All that there are now.
    fn all(&self) -> Result<Vec<PathBuf>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            all.push(entry?.path());
        }
        Ok(all)
    }

    /// The one that has been made last.
    fn newest(&self) -> Result<PathBuf> {
        let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u64>().ok();
        let all = self.all()?;
        let newest = all.into_iter().max_by_key(number);
        newest.context("there is no root in a file")
    }

    /// How many of them VMMs have open.
    fn with_vmms(&self) -> Result<usize> {
        let mut all = Vec::new();
        for file in self.all()? {
            let metadata = fs::metadata(file)?;
            all.push((metadata.dev(), metadata.ino()));
        }
        let mut open = 0;
        for vmm in host::vmms()? {
            for descriptor in fs::read_dir(format!("/proc/{}/fd", vmm.pid))? {
                // It may be closed by now.
                if let Ok(metadata) = fs::metadata(descriptor?.path()) {
                    open += usize::from(all.contains(&(metadata.dev(), metadata.ino())));
                }
            }
        }
        Ok(open)
    }

    /// Fails if one of them is a loop device of the host.
    fn ensure_no_loop(&self) -> Result<()> {
        for device in fs::read_dir("/sys/block")? {
            let backing = device?.path().join("loop/backing_file");
            // Most devices are none, or have no file.
            let file = fs::read_to_string(backing).unwrap_or_default();
            let is_one = Path::new(file.trim()).starts_with(&self.0);
            ensure!(!is_one, "the host has a loop device of {file:?}");
        }
        Ok(())
    }
}

/// A root as it is said to be: on a disk of the guest's, or on a loop device of the host's.
fn ensure_on_a_disk(ctr: &Ctr, said: &str) -> Result<()> {
    let device = match ctr.is_husk() {
        true => "/dev/vd",
        false => "/dev/loop",
    };
    let is_there = said.starts_with(device) && said.ends_with(" ext4");
    ensure!(is_there, "the root is on {said:?}");
    Ok(())
}

/// With `ctr`: what containers write stays in files of their own, and a file that holds no root is told of.
pub(super) fn in_a_file(ctr: &mut Ctr) -> Result<()> {
    let places = kubelet::start()?;
    ctr.address = Some(places.socket);
    let files = Files(places.blockfiles);
    let image = places.image.display().to_string();
    ctr.ctr(&["image", "import", "--no-unpack", &image])?
        .success()?;

    let script = format!("{ROOT}; echo text > /file && sync && cat /file && rm /file");
    let said = ctr.run(&IN_A_FILE, &["sh", "-c", &script])?.success()?;
    let (root, said) = said.split_once('\n').context("it says too little")?;
    ensure_on_a_disk(ctr, root)?;
    ensure!(said == "text", "the root has {said:?}");

    let by_name = [&IN_A_FILE[..], &["--user", "daemon"]].concat();
    let said = ctr.run(&by_name, &["id", "-un"])?.success()?;
    ensure!(said == "daemon", "its user is {said:?}");

    let sealed = [&IN_A_FILE[..], &["--read-only"]].concat();
    let ended = ctr.run(&sealed, &["touch", "/file"])?;
    let refused = ended.stderr.contains("Read-only file system");
    ensure!(refused, "a sealed root is written to: {ended:?}");

    let other = ctr.beside("other");
    let two = two_at_once(ctr, &other, &files);
    if two.is_err() {
        other.bury();
    }
    two?;
    if ctr.is_husk() {
        bad_files(ctr, &files)?;
        files.ensure_no_loop()?;
    }
    Ok(())
}

/// Two containers of one image, and one of them once more.
fn two_at_once(ctr: &Ctr, other: &Ctr, files: &Files) -> Result<()> {
    let shell = |ctr: &Ctr, script: &str| {
        let exec = ["task", "exec", "--exec-id", "e", &ctr.id, "sh", "-c"];
        ctr.ctr(&[&exec[..], &[script]].concat())?.success()
    };
    for ctr in [ctr, other] {
        ctr.detach(&IN_A_FILE, &["sleep", "1000"])?;
        ensure_on_a_disk(ctr, &shell(ctr, ROOT)?)?;
        shell(ctr, &format!("echo {} > /file", ctr.id))?;
    }
    if ctr.is_husk() {
        let open = files.with_vmms()?;
        ensure!(open == 2, "VMMs have {open} files open");
        files.ensure_no_loop()?;
    }
    let end = |ctr: &Ctr| ctr.ctr(&["task", "rm", "--force", &ctr.id]);
    for ctr in [ctr, other] {
        let said = shell(ctr, "cat /file")?;
        ensure!(said == ctr.id, "the root of {} has {said:?}", ctr.id);
        end(ctr)?;
    }
    ctr.ctr(&["task", "start", "--detach", "--null-io", &ctr.id])?
        .success()?;
    let said = shell(ctr, "cat /file")?;
    ensure!(said == ctr.id, "a new task finds {said:?}");
    end(ctr)?;
    for ctr in [ctr, other] {
        ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    }
    Ok(())
}

/// What is no root is told of by name, and leaves nothing; the right one then is taken as ever.
fn bad_files(ctr: &Ctr, files: &Files) -> Result<()> {
    let create = ["container", "create", "--runtime", ctr.runtime()];
    let create = [&create[..], &IN_A_FILE, &[ctr.image, &ctr.id, "true"]].concat();
    ctr.ctr(&create)?.success()?;
    let file = files.newest()?;
    let aside = file.with_extension("aside");
    fs::rename(&file, &aside)?;
    let changed = |change: &dyn Fn(&File) -> std::io::Result<()>| -> Result<()> {
        fs::copy(&aside, &file)?;
        Ok(change(&File::options().write(true).open(&file)?)?)
    };
    let bytes = fs::metadata(&aside)?.len();
    let named = file.display().to_string();
    let refused = |words: &[&str]| -> Result<()> {
        let ended = ctr.ctr(&["task", "start", "--null-io", &ctr.id])?;
        ensure!(ended.status != 0, "it starts in spite of {words:?}");
        for word in words {
            let is_told = ended.stderr.contains(word);
            ensure!(is_told, "not told of {word:?}: {}", ended.stderr);
        }
        Ok(())
    };
    let by_name = |reason: &str| refused(&[&named, reason]);
    let in_guest = ["cannot mount the ext4 file system for /"];

    by_name("it is not there")?;
    fs::create_dir(&file)?;
    by_name("it is neither a block device nor a file")?;
    fs::remove_dir(&file)?;
    symlink(&aside, &file)?;
    by_name("it is a link to a file")?;
    fs::remove_file(&file)?;
    changed(&|file| file.set_len(0))?;
    by_name("it is empty")?;
    changed(&|file| file.set_len(bytes + 1))?;
    by_name("its size is no multiple of 512 bytes")?;
    changed(&|file| file.set_len(bytes / 2))?;
    refused(&in_guest)?;
    changed(&|file| file.write_all_at(&[0; 4096], 0))?;
    refused(&in_guest)?;

    fs::rename(&aside, &file)?;
    ctr.ctr(&["task", "start", "--null-io", &ctr.id])?
        .success()?;
    ctr.ctr(&["container", "rm", &ctr.id])?.success()?;
    Ok(())
}

/// Each container of a pod has a disk, from its start to its removal.
pub(super) fn of_a_pod(ctr: &Ctr) -> Result<()> {
    let place = Path::new("/var/tmp/husk-disks").join(&ctr.id);
    fs::create_dir_all(&place)?;
    let done = in_a_pod(ctr, &place);
    fs::remove_dir_all(&place)?;
    done
}

fn in_a_pod(ctr: &Ctr, place: &Path) -> Result<()> {
    let files = Files(kubelet::start()?.blockfiles);
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    let handler = match ctr.is_husk() {
        true => "husk-blockfile",
        false => "runc-blockfile",
    };
    let sleeper = |name: &str| container(name, &["sleep", "1000"]);
    kubelet.with_pod_of(handler, config, |kubelet, pod| {
        let a = kubelet.start(pod, sleeper("a"))?;
        let b = kubelet.start(pod, sleeper("b"))?;
        for (id, name) in [(&a, "a"), (&b, "b")] {
            ensure_on_a_disk(ctr, &kubelet.shell(id, ROOT)?)?;
            kubelet.shell(id, &format!("echo {name} > /file"))?;
        }
        for (id, name) in [(&a, "a"), (&b, "b")] {
            let said = kubelet.shell(id, "cat /file")?;
            ensure!(said == name, "the root of {name} has {said:?}");
        }
        if ctr.is_husk() {
            let open = files.with_vmms()?;
            ensure!(open == 2, "the VMM has {open} files open");
        }
        kubelet.cri.stop_container(&a, 0)?;
        kubelet.cri.remove_container(&a)?;
        if ctr.is_husk() {
            let open = files.with_vmms()?;
            ensure!(open == 1, "the VMM has {open} files open");
            more_than_slots(kubelet, pod, place)?;
            let open = files.with_vmms()?;
            ensure!(open == 1, "the VMM has {open} files open");
            files.ensure_no_loop()?;
        }
        let c = kubelet.start(pod, sleeper("c"))?;
        ensure_on_a_disk(ctr, &kubelet.shell(&c, ROOT)?)
    })
}

/// A pod with one root on a disk has three slots more: too few for three devices and a root.
fn more_than_slots(kubelet: &Kubelet, pod: &Pod, place: &Path) -> Result<()> {
    let mut disks = Vec::new();
    for name in ["one", "two", "three"] {
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
    kubelet.cri.remove_container(&id)
}
