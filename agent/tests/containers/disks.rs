//! Roots on disks, which a loop device stands for here.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use super::*;

const DISK_BYTES: u64 = 16 << 20;

/// A disk with what the containers' root has; gone with the value.
struct Disk {
    node: String,
    image: PathBuf,
}

impl Disk {
    /// None, told of, where no disk can be made.
    fn new(fixture: &Fixture, name: &str) -> Option<Self> {
        let made = Self::make(fixture, name);
        made.map_err(|error| eprintln!("SKIPPED: no disk can be made here: {error:#}"))
            .ok()
    }

    fn make(fixture: &Fixture, name: &str) -> Result<Self> {
        let image = fixture.directory.join(name);
        File::create(&image)?.set_len(DISK_BYTES)?;
        let root = fixture.directory.join("rootfs");
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-d"])
            .args([&root, &image])
            .status()?;
        anyhow::ensure!(made.success(), "there is no file system");
        let looped = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image)
            .output()?;
        anyhow::ensure!(looped.status.success(), "there is no loop device");
        let node = String::from_utf8(looped.stdout)?.trim().to_owned();
        Ok(Self { node, image })
    }

    fn root(&self, options: &[&str]) -> RootDisk {
        RootDisk {
            node: self.node.clone(),
            kind: "ext4".to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..RootDisk::default()
        }
    }

    /// Whether no kernel has a file system on it mounted.
    fn is_free(&self) -> bool {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_EXCL);
        options.open(&self.node).is_ok()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The test's own result is what counts.
        let _ = Command::new("losetup").args(["-d", &self.node]).status();
        let _ = fs::remove_file(&self.image);
    }
}

/// A container with a directory of its own to mount its root at.
fn on(fixture: &'static Fixture, id: &str, root: RootDisk) -> Result<(Container, PathBuf)> {
    let place = fixture.directory.join(id);
    fs::create_dir_all(&place)?;
    let mut container = fixture.container(id);
    container.root = Some(root);
    Ok((container, place))
}

fn script(fixture: &Fixture, place: &Path, text: &str) -> Value {
    let mut spec = fixture.spec(&["sh", "-c", text]);
    spec["root"]["path"] = json!(place);
    spec
}

const ROOT_IN_MOUNTS: &str = "grep ' / ' /proc/mounts | tr ' ,' '\\n\\n' | head -n 4";

#[test]
fn root_that_is_no_file_system_is_told_of_and_let_go() {
    let Some(fixture) = fixture() else { return };
    let Some(disk) = Disk::new(fixture, "bad.img") else {
        return;
    };
    fixture.run(async {
        for (kind, options, word) in [
            ("erofs", &[][..], "erofs file system for /"),
            ("ext4", &["nosuch=1"], "ext4 file system for /"),
            ("ext4", &["bind"], "ext4"),
            ("tmpfs", &[], "tmpfs"),
        ] {
            let root = RootDisk {
                kind: kind.to_owned(),
                ..disk.root(options)
            };
            let (container, place) = on(fixture, "bad-root", root)?;
            let spec = script(fixture, &place, "true");
            let refused = container.create(&spec, &Stdio::default()).await;
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
            assert!(disk.is_free(), "{text}");
            assert!(!fixture.cgroups.join("bad-root").exists());
        }
        // One whose mounting succeeds, in a container that fails later.
        let (container, place) = on(fixture, "bad-root", disk.root(&[]))?;
        let mut spec = script(fixture, &place, "true");
        spec["process"]["args"] = json!(["/no/such/program"]);
        let refused = container.create(&spec, &Stdio::default()).await;
        assert!(refused.is_err());
        assert!(disk.is_free());
        Ok(())
    });
}

#[test]
fn root_on_a_disk_is_the_containers_alone_and_unmounted_with_it() {
    let Some(fixture) = fixture() else { return };
    let Some(disk) = Disk::new(fixture, "root.img") else {
        return;
    };
    fixture.run(async {
        let (container, place) = on(fixture, "disk-root", disk.root(&["rw"]))?;
        let text = format!("{ROOT_IN_MOUNTS}; echo kept > /kept; cat /kept");
        let (status, out, err) = container.run(&script(fixture, &place, &text), b"").await?;
        let expected = format!("{}\n/\next4\nrw\nkept\n", disk.node);
        assert_eq!((status, out.as_str()), (0, expected.as_str()), "{err}");
        assert!(disk.is_free());
        assert!(fs::read_dir(&place)?.next().is_none());

        // What it has written is there, and can be kept from being written to.
        let (container, place) = on(fixture, "disk-root", disk.root(&["noatime", "ro"]))?;
        let text = format!("{ROOT_IN_MOUNTS}; cat /kept; touch /x");
        let (status, out, err) = container.run(&script(fixture, &place, &text), b"").await?;
        let expected = format!("{}\n/\next4\nro\nkept\n", disk.node);
        assert_eq!((status, out.as_str()), (1, expected.as_str()), "{err}");
        assert!(err.contains("Read-only file system"), "{err}");

        let (container, place) = on(fixture, "disk-root", disk.root(&["rw"]))?;
        let mut spec = script(fixture, &place, "cat /kept; touch /x");
        spec["root"]["readonly"] = true.into();
        let (status, out, err) = container.run(&spec, b"").await?;
        assert_eq!((status, out.as_str()), (1, "kept\n"), "{err}");
        assert!(err.contains("Read-only file system"), "{err}");
        assert!(disk.is_free());
        Ok(())
    });
}

#[test]
fn root_on_a_disk_can_be_in_a_user_namespace() {
    let Some(fixture) = fixture() else { return };
    let Some(disk) = Disk::new(fixture, "users.img") else {
        return;
    };
    fixture.run(async {
        let (container, place) = on(fixture, "disk-users", disk.root(&["rw"]))?;
        let mut spec = script(
            fixture,
            &place,
            "id -u; cat /proc/self/uid_map; echo x > /tmp/x",
        );
        let map = json!([{"containerID": 0, "hostID": 0, "size": 1000}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        let namespaces = namespaces.context("the spec has namespaces")?;
        namespaces.push(json!({ "type": "user" }));
        let (status, out, err) = container.run(&spec, b"").await?;
        let words: Vec<&str> = out.split_whitespace().collect();
        assert_eq!((status, words), (0, vec!["0", "0", "0", "1000"]), "{err}");
        assert!(disk.is_free());
        Ok(())
    });
}
