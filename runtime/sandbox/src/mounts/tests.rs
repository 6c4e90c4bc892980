use super::*;

#[test]
fn escaped_mount_point_is_read() {
    let line = b"36 35 98:0 /x /run/a\\040b\\134c\xff rw shared:1 - ext4 /dev/sda rw";
    let path = OsString::from_vec(b"/run/a b\\c\xff".to_vec());
    assert_eq!(mount_point(line), Some(PathBuf::from(path)));
}

#[test]
fn garbled_mountinfo_is_skipped() {
    for line in ["", "1 2 3", r"1 2 3 / /a\0", r"1 2 3 / /a\999"] {
        assert_eq!(mount_point(line.as_bytes()), None, "{line}");
    }
}

#[test]
fn layers_become_relative_to_their_directory() {
    let data = [
        "index=off".to_owned(),
        "lowerdir=/snap/12/fs:/snap/9/fs".to_owned(),
        "upperdir=/snap/13/fs".to_owned(),
    ];
    let (directory, options) = shorten_layers(&data).unwrap();
    assert_eq!(directory, Path::new("/snap"));
    assert_eq!(
        options,
        "index=off,lowerdir=12/fs:9/fs,upperdir=/snap/13/fs"
    );
}

#[test]
fn options_without_plain_layers_are_left_alone() {
    for data in ["upperdir=/a", r"lowerdir=/a\:b:/c", "lowerdir="] {
        assert_eq!(shorten_layers(&[data.to_owned()]), None, "{data}");
    }
}

/// Those that mount for real, in a mount namespace of the test's thread. They need root.
pub(crate) mod real {
    use std::sync::mpsc;

    use super::*;

    /// Runs a test in a thread with mounts of its own, where `/` is shared as systemd makes it.
    pub(crate) fn in_own_namespace(test: impl FnOnce(&Path) + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: mounting takes root");
            return;
        }
        let (done, wait) = mpsc::channel();
        let running = thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
            change(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC).unwrap();
            change(Path::new("/"), MsFlags::MS_SHARED | MsFlags::MS_REC).unwrap();
            let directory = tempfile::tempdir().unwrap();
            test(directory.path());
            // /proc/self is the main thread, whose mounts are others.
            unmount_all(directory.path());
            done.send(()).unwrap();
        });
        let passed = wait.recv().is_ok();
        running.join().unwrap();
        assert!(passed);
    }

    pub(crate) fn points(directory: &Path) -> Vec<PathBuf> {
        fs::read_to_string("/proc/thread-self/mountinfo")
            .unwrap()
            .lines()
            .filter_map(|line| mount_point(line.as_bytes()))
            .filter(|point| point.starts_with(directory))
            .collect()
    }

    fn unmount_all(directory: &Path) {
        while let Some(point) = points(directory).last() {
            nix::mount::umount2(point, MntFlags::MNT_DETACH).unwrap();
        }
    }

    pub(crate) fn share(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
        let [layout, shared, staging] =
            ["layout", "shared", "staging"].map(|name| directory.join(name));
        for path in [&layout, &shared, &staging] {
            fs::create_dir(path).unwrap();
        }
        mount_share(&layout, &shared).unwrap();
        mount_private(&staging).unwrap();
        (layout, shared, staging)
    }

    #[test]
    fn share_cannot_be_written_through() {
        in_own_namespace(|directory| {
            let (layout, shared, _) = share(directory);
            fs::create_dir(layout.join("c")).unwrap();
            assert!(shared.join("c").exists());
            let written = fs::write(shared.join("x"), "");
            assert_eq!(
                written.unwrap_err().kind(),
                io::ErrorKind::ReadOnlyFilesystem
            );
        });
    }

    #[test]
    fn volume_with_mounts_below_leaves_the_hosts_alone() {
        in_own_namespace(|directory| {
            let (layout, shared, staging) = share(directory);
            let source = directory.join("source");
            fs::create_dir_all(source.join("inner")).unwrap();
            mount_private(&source.join("inner")).unwrap();
            change(&source.join("inner"), MsFlags::MS_SHARED).unwrap();
            fs::create_dir(layout.join("v")).unwrap();
            fs::create_dir(staging.join("v")).unwrap();
            let volume = Volume {
                source: source.clone(),
                is_recursive: true,
                is_slave: false,
                is_read_only: true,
            };
            mount_volume(&volume, &staging.join("v"), &shared.join("v")).unwrap();
            assert!(points(&shared).contains(&shared.join("v/inner")));
            for path in ["v/x", "v/inner/x"] {
                let written = fs::write(shared.join(path), "").unwrap_err();
                assert_eq!(written.kind(), io::ErrorKind::ReadOnlyFilesystem, "{path}");
            }

            unmount(&shared.join("v")).unwrap();

            assert_eq!(points(&shared), std::slice::from_ref(&shared));
            assert!(points(&source).contains(&source.join("inner")));
        });
    }

    #[test]
    fn volume_keeps_what_the_hosts_mount_forbids() {
        in_own_namespace(|directory| {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
            let kind = Some("tmpfs");
            nix::mount::mount(kind, directory, kind, flags, None::<&str>).unwrap();
            let spec = serde_json::json!({
                "ociVersion": "1.2.0",
                "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/" },
                "root": { "path": "rootfs" },
                "mounts": [
                    { "destination": "/t", "type": "tmpfs", "source": "tmpfs" },
                    { "destination": "/v", "type": "bind", "source": directory,
                      "options": ["rbind", "exec"] },
                ],
                "linux": { "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                    { "type": "mount" }, { "type": "network" }] },
            });
            let spec = serde_json::from_value(spec).unwrap();
            let mut memory = crate::volumes::MemoryVolumes::new("pod");
            let pod = std::process::id();
            let mut guest = crate::spec::guest_spec(spec, "c", Some(pod), &mut memory).unwrap();

            guest.keep_flags(Path::new("/"));

            let mounts = guest.spec.mounts().clone().unwrap();
            let options = mounts[1].options().clone().unwrap();
            assert_eq!(options, ["nosuid", "noexec", "rbind", "exec"]);
            assert_eq!(mounts[0].options(), &None);
        });
    }

    #[test]
    fn slave_volume_gets_later_mounts_and_gives_none_back() {
        in_own_namespace(|directory| {
            let (layout, shared, staging) = share(directory);
            let source = directory.join("source");
            fs::create_dir_all(source.join("later")).unwrap();
            mount_private(&source).unwrap();
            change(&source, MsFlags::MS_SHARED).unwrap();
            for place in [layout.join("v"), staging.join("v")] {
                fs::create_dir(place).unwrap();
            }
            let volume = Volume {
                source: source.clone(),
                is_recursive: true,
                is_slave: true,
                is_read_only: false,
            };
            mount_volume(&volume, &staging.join("v"), &shared.join("v")).unwrap();

            bind(directory, &source.join("later"), false).unwrap();

            assert!(points(&shared).contains(&shared.join("v/later")));
            unmount(&shared.join("v/later")).unwrap();
            assert!(points(&source).contains(&source.join("later")));
        });
    }

    #[test]
    fn overlay_of_very_many_layers_is_mounted() {
        in_own_namespace(|directory| {
            let (layout, shared, staging) = share(directory);
            // A tmpfs: not every file system can be a layer.
            let layers = directory.join("layers-with-a-name-of-some-length");
            fs::create_dir(&layers).unwrap();
            nix::mount::mount(
                Some("tmpfs"),
                &layers,
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .unwrap();
            let names: Vec<_> = (0..LAYERS)
                .map(|n| {
                    let layer = layers.join(format!("{n}/fs"));
                    fs::create_dir_all(&layer).unwrap();
                    fs::write(layer.join(format!("file-{n}")), "").unwrap();
                    layer.to_str().unwrap().to_owned()
                })
                .collect();
            fs::create_dir(layout.join("r")).unwrap();
            fs::create_dir(staging.join("r")).unwrap();
            let mount = RootfsMount {
                fstype: "overlay".to_owned(),
                source: "overlay".to_owned(),
                target: String::new(),
                options: vec![format!("lowerdir={}", names.join(":"))],
            };
            let (place, target) = (staging.join("r"), shared.join("r"));
            stage_rootfs(&[mount], &place, &target).unwrap();
            publish(&place, &target).unwrap();
            assert_eq!(fs::read_dir(shared.join("r")).unwrap().count(), LAYERS);
        });
    }

    const LAYERS: usize = 128;
}
