use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::fs::symlink;

use super::*;

struct Share {
    directory: tempfile::TempDir,
    watches: Watches,
}

impl Share {
    /// With an empty directory for each of the volumes.
    fn new(volumes: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let inotify = Arc::new(inotify::init(flags).unwrap());
        for volume in volumes {
            fs::create_dir_all(directory.path().join(volume)).unwrap();
        }
        let watches = Watches::new(directory.path(), inotify);
        Self { directory, watches }
    }

    fn watched(volumes: &[&str]) -> Self {
        let mut share = Self::new(volumes);
        let volumes: Vec<_> = volumes.iter().map(PathBuf::from).collect();
        share.watches.add(&volumes);
        share
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    /// What has happened since the last look, a line each.
    fn changes(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.watches.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            events.push(Event::of(&event));
        }
        let changes = self.watches.changes(events);
        changes.iter().map(line).collect()
    }

    fn watched_paths(&self) -> Vec<&Path> {
        let all = self.watches.paths.values().flatten();
        let mut all: Vec<_> = all.map(PathBuf::as_path).collect();
        all.sort();
        all
    }
}

fn line(change: &Change) -> String {
    let text = |place: &Place| {
        let part = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        format!("{}/{}", part(&place.directory), part(&place.name))
    };
    let mut line = format!(
        "{:?} {}",
        change.kind.enum_value().unwrap(),
        text(&change.place)
    );
    if let Some(new) = change.renamed_to.as_ref() {
        line = format!("{line} {}", text(new));
    }
    match change.is_directory {
        true => format!("{line}/"),
        false => line,
    }
}

const VOLUME: &str = "c1/mounts/0";

#[test]
fn kubelets_way_to_change_a_volume_is_told_in_order() {
    let mut share = Share::watched(&[VOLUME]);
    let at = |share: &Share, path: &str| share.path(VOLUME).join(path);
    fs::create_dir(at(&share, "..1")).unwrap();
    fs::write(at(&share, "..1/key"), "one").unwrap();
    symlink("..1", at(&share, "..data_tmp")).unwrap();
    fs::rename(at(&share, "..data_tmp"), at(&share, "..data")).unwrap();
    let changes = share.changes();
    assert_eq!(
        changes,
        [
            "MADE c1/mounts/0/..1/",
            "MADE c1/mounts/0/..1/key",
            "MADE c1/mounts/0/..data_tmp",
            "RENAMED c1/mounts/0/..data_tmp c1/mounts/0/..data",
        ]
    );

    // The new directory is watched too.
    fs::remove_file(at(&share, "..1/key")).unwrap();
    fs::remove_dir(at(&share, "..1")).unwrap();
    assert_eq!(
        share.changes(),
        ["REMOVED c1/mounts/0/..1/key", "REMOVED c1/mounts/0/..1/",]
    );
    assert_eq!(share.watched_paths(), [Path::new(VOLUME)]);
}

#[test]
fn contents_and_attributes_of_files_are_told_once_each() {
    use std::io::Write;
    let mut share = Share::watched(&[VOLUME]);
    let path = share.path(VOLUME).join("file");
    let mut file = fs::File::create(&path).unwrap();
    for _ in 0..3 {
        file.write_all(b"x").unwrap();
        file.set_permissions(fs::metadata(&path).unwrap().permissions())
            .unwrap();
    }
    drop(file);
    assert_eq!(
        share.changes(),
        [
            "MADE c1/mounts/0/file",
            "WRITTEN c1/mounts/0/file",
            "ATTRIBUTES c1/mounts/0/file",
            "CLOSED c1/mounts/0/file",
        ]
    );
}

#[test]
fn file_that_is_a_volume_is_told_of_by_its_own_place() {
    let mut share = Share::new(&["c1/mounts"]);
    fs::write(share.path(VOLUME), "").unwrap();
    share.watches.add(&[PathBuf::from(VOLUME)]);
    fs::write(share.path(VOLUME), "more").unwrap();
    assert_eq!(
        share.changes(),
        ["WRITTEN c1/mounts/0", "CLOSED c1/mounts/0"]
    );
}

#[test]
fn names_that_come_and_go_are_made_and_removed() {
    let mut share = Share::watched(&[VOLUME, "c1/mounts/1"]);
    let (one, two) = (share.path(VOLUME), share.path("c1/mounts/1"));
    let outside = share.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::create_dir(outside.join("sub")).unwrap();
    fs::write(outside.join("sub/file"), "").unwrap();
    fs::rename(outside.join("sub"), one.join("sub")).unwrap();
    assert_eq!(
        share.changes(),
        ["MADE c1/mounts/0/sub/", "MADE c1/mounts/0/sub/file"]
    );
    // From one volume to another: they have nothing to do with each other in the guest.
    fs::rename(one.join("sub"), two.join("sub")).unwrap();
    assert_eq!(
        share.changes(),
        [
            "REMOVED c1/mounts/0/sub/",
            "MADE c1/mounts/1/sub/",
            "MADE c1/mounts/1/sub/file"
        ]
    );
    fs::rename(two.join("sub"), two.join("bus")).unwrap();
    fs::write(two.join("bus/other"), "").unwrap();
    assert_eq!(
        share.changes()[0],
        "RENAMED c1/mounts/1/sub c1/mounts/1/bus/"
    );
    fs::rename(two.join("bus"), outside.join("bus")).unwrap();
    assert_eq!(share.changes(), ["REMOVED c1/mounts/1/bus/"]);
    fs::write(outside.join("bus/unheard"), "").unwrap();
    assert!(share.changes().is_empty());
}

#[test]
fn big_volumes_are_not_watched_at_all() {
    let mut share = Share::new(&[VOLUME, "c1/mounts/1"]);
    for number in 0..DIRECTORIES_MAX {
        fs::create_dir(share.path(VOLUME).join(number.to_string())).unwrap();
    }
    share
        .watches
        .add(&["c1/mounts/1", VOLUME].map(PathBuf::from));
    assert_eq!(share.watched_paths(), [Path::new("c1/mounts/1")]);

    // Nor are those that grow.
    let other = share.path("c1/mounts/1");
    for number in 0..=DIRECTORIES_MAX {
        fs::create_dir(other.join(number.to_string())).unwrap();
        share.changes();
    }
    assert!(share.watched_paths().is_empty());
}

#[test]
fn links_are_not_followed() {
    let mut share = Share::new(&[VOLUME, "outside"]);
    symlink("../../../outside", share.path(VOLUME).join("link")).unwrap();
    symlink("0", share.path("c1/mounts/1")).unwrap();
    let volumes = [VOLUME, "c1/mounts/1", "c1/mounts/none", "../outside", "/"];
    share.watches.add(&volumes.map(PathBuf::from));
    assert_eq!(share.watched_paths(), [Path::new(VOLUME)]);
    fs::write(share.path("outside/file"), "").unwrap();
    assert!(share.changes().is_empty());
}

#[test]
fn one_directory_in_two_volumes_is_told_for_both_until_it_is_left() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: not root");
        return;
    }
    let mut share = Share::new(&[VOLUME, "c2/mounts/0"]);
    let (one, two) = (share.path(VOLUME), share.path("c2/mounts/0"));
    let none = None::<&str>;
    let bound = nix::mount::mount(Some(&one), &two, none, nix::mount::MsFlags::MS_BIND, none);
    if let Err(errno) = bound {
        eprintln!("SKIPPED: cannot mount: {errno}");
        return;
    }
    share
        .watches
        .add(&[VOLUME, "c2/mounts/0"].map(PathBuf::from));
    fs::create_dir(one.join("x")).unwrap();
    assert_eq!(
        share.changes(),
        ["MADE c1/mounts/0/x/", "MADE c2/mounts/0/x/"]
    );
    share.watches.leave(Path::new("c1"));
    fs::create_dir(one.join("y")).unwrap();
    assert_eq!(share.changes(), ["MADE c2/mounts/0/y/"]);
    share.watches.leave(Path::new("c2"));
    nix::mount::umount(&two).unwrap();
    fs::create_dir(one.join("z")).unwrap();
    assert!(share.changes().is_empty() && share.watched_paths().is_empty());
}
