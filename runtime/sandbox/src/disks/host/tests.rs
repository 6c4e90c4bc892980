use super::*;

fn wanted(device: HostDevice) -> WantedDisk {
    WantedDisk {
        place: Place::Mount(0),
        device,
        is_read_only: false,
        what: "mount at \"/a\"".to_owned(),
    }
}

fn need(node: &Path, origin: Origin, is_read_only: bool) -> Need {
    Need {
        origin,
        node: node.to_owned(),
        is_read_only,
        is_claimed: true,
        is_own: false,
        places: Vec::new(),
    }
}

/// An image of 1 MiB.
fn image_file() -> (tempfile::NamedTempFile, Origin) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let origin = Origin::of_file(&file.as_file().metadata().unwrap());
    (file, origin)
}

fn serial() -> String {
    "disk0".to_owned()
}

#[test]
fn what_is_no_block_device_is_refused_by_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [
        Path::new("/no/such/device"),
        Path::new("/dev/null"),
        Path::new("/"),
        file.path(),
    ] {
        let refused = wanted(HostDevice::Path(path.into())).check().unwrap_err();
        assert!(refused.to_string().contains("mount at \"/a\""), "{refused}");
    }
    // No major is as high.
    let number = Number {
        major: 4095,
        minor: 0,
    };
    assert!(wanted(HostDevice::Number(number)).check().is_err());
}

#[test]
fn node_of_another_device_is_not_given() {
    let device = Origin::Device(Number { major: 7, minor: 3 });
    let file = tempfile::NamedTempFile::new().unwrap();
    for node in [file.path(), Path::new("/dev/zero")] {
        let error = need(node, device, true).open(serial()).unwrap_err();
        assert!(matches!(error, DiskError::Another { .. }), "{error}");
    }
    let error = need(Path::new("/no/node"), device, true)
        .claim()
        .unwrap_err();
    assert!(matches!(error, DiskError::Open { .. }), "{error}");
}

#[test]
fn file_that_has_changed_is_not_given() {
    let (file, origin) = image_file();
    let (other, _) = image_file();
    let error = need(other.path(), origin, true).open(serial()).unwrap_err();
    assert!(matches!(error, DiskError::Replaced { .. }), "{error}");
    for node in [Path::new("/"), Path::new("/dev/null")] {
        let error = need(node, origin, true).open(serial()).unwrap_err();
        assert!(matches!(error, DiskError::Replaced { .. }), "{error}");
    }
    let place = tempfile::tempdir().unwrap();
    let link = place.path().join("link");
    std::os::unix::fs::symlink(file.path(), &link).unwrap();
    let pipe = place.path().join("pipe");
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, mode, 0).unwrap();
    assert!(need(&link, origin, true).open(serial()).is_err());
    let error = need(&pipe, origin, true).open(serial()).unwrap_err();
    assert!(matches!(error, DiskError::Replaced { .. }), "{error}");

    let image = need(file.path(), origin, true);
    file.as_file().set_len((1 << 20) - 1).unwrap();
    let error = image.open(serial()).unwrap_err();
    assert!(matches!(error, DiskError::Size { .. }), "{error}");
    file.as_file().set_len(0).unwrap();
    let error = image.open(serial()).unwrap_err();
    assert!(matches!(error, DiskError::Empty { .. }), "{error}");
}

#[test]
fn file_that_is_written_to_is_given_once() {
    let (file, origin) = image_file();
    let writer = need(file.path(), origin, false);
    let reader = need(file.path(), origin, true);
    let is_busy = |need: &Need| matches!(need.open(serial()), Err(DiskError::Busy { .. }));

    let given = writer.open(serial()).unwrap();
    assert!(is_busy(&writer) && is_busy(&reader));
    drop(given);
    let given = (
        reader.open(serial()).unwrap(),
        reader.open(serial()).unwrap(),
    );
    assert!(is_busy(&writer));
    drop(given);
    assert!(writer.claim().unwrap().is_none());
    let (config, _) = writer.open(serial()).unwrap();
    assert_eq!((config.bytes, config.block_bytes), (1 << 20, 512));
    assert!(config.can_zero && !config.is_read_only);
}

#[test]
fn file_for_reading_is_not_open_for_writing() {
    let (file, origin) = image_file();
    let (config, open) = need(file.path(), origin, true).open(serial()).unwrap();
    assert!(config.is_read_only && !config.can_zero);
    let written = rustix::io::write(&open, b"x").unwrap_err();
    assert_eq!(written, Errno::BADF);
}

#[test]
fn root_that_is_written_to_is_a_containers_own() {
    let (file, origin) = image_file();
    let root = |is_read_only| WantedDisk {
        place: Place::Root,
        is_read_only,
        ..wanted(HostDevice::Image(file.path().into()))
    };
    let found = needs(&[root(false)]).unwrap();
    assert_eq!(found[0].origin, origin);
    assert!(found[0].is_own && !found[0].is_claimed);
    assert!(!needs(&[root(true)]).unwrap()[0].is_own);
}
