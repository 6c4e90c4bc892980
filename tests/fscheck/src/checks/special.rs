//! Devices, FIFOs and sockets, and calls that files don't have.

use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::{self, CWD, FileType, OFlags};
use rustix::io::{self, Errno};

use crate::harness::*;

super::checks!(
    fifo_carries_bytes,
    fifo_without_a_reader_is_refused,
    device_nodes_keep_their_numbers,
    null_device_works,
    socket_accepts_connections,
    open_of_socket_is_refused,
    device_without_driver_is_refused,
    terminal_request_to_a_file_is_refused,
    file_flags_are_readable_or_refused,
    executable_runs,
    copied_program_runs,
);

fn fifo_carries_bytes() -> Outcome {
    fs::mknodat(CWD, "p", FileType::Fifo, mode(0o600), 0)?;
    equal("type", kind_of("p")?, FileType::Fifo)?;
    let both = open("p", OFlags::RDWR)?;
    let writer = open("p", OFlags::WRONLY | OFlags::NONBLOCK)?;
    io::write(&writer, b"through")?;
    let mut buffer = [0; 16];
    equal("bytes", io::read(&both, &mut buffer)?, 7)
}

fn fifo_without_a_reader_is_refused() -> Outcome {
    fs::mknodat(CWD, "p", FileType::Fifo, mode(0o600), 0)?;
    refused(
        "open",
        open("p", OFlags::WRONLY | OFlags::NONBLOCK),
        Errno::NXIO,
    )
}

fn device_nodes_keep_their_numbers() -> Outcome {
    let large = fs::makedev(259, 70_000);
    fs::mknodat(CWD, "block", FileType::BlockDevice, mode(0o660), large)?;
    equal("number", lstat("block")?.st_rdev, large)?;
    equal("type", kind_of("block")?, FileType::BlockDevice)?;
    let small = fs::makedev(1, 3);
    fs::mknodat(CWD, "char", FileType::CharacterDevice, mode(0o666), small)?;
    equal("small number", lstat("char")?.st_rdev, small)?;
    refused(
        "over it",
        fs::mknodat(CWD, "char", FileType::Fifo, mode(0o666), 0),
        Errno::EXIST,
    )
}

fn null_device_works() -> Outcome {
    fs::mknodat(
        CWD,
        "null",
        FileType::CharacterDevice,
        mode(0o666),
        fs::makedev(1, 3),
    )?;
    let null = match open("null", OFlags::RDWR) {
        Err(Errno::ACCESS) => return skip("the file system is mounted without devices"),
        null => null?,
    };
    equal("written", io::write(&null, b"gone")?, 4)?;
    equal("read", io::read(&null, &mut [0; 4])?, 0)
}

fn socket_accepts_connections() -> Outcome {
    let listener = UnixListener::bind("s")?;
    equal("type", kind_of("s")?, FileType::Socket)?;
    let client = UnixStream::connect("s")?;
    let (server, _) = listener.accept()?;
    io::write(&client, b"hello")?;
    equal("bytes", io::read(&server, &mut [0; 8])?, 5)?;
    holds("a second bind is refused", UnixListener::bind("s").is_err())
}

fn open_of_socket_is_refused() -> Outcome {
    let _listener = UnixListener::bind("s")?;
    refused("open", open("s", OFlags::RDWR), Errno::NXIO)
}

fn device_without_driver_is_refused() -> Outcome {
    fs::mknodat(
        CWD,
        "c",
        FileType::CharacterDevice,
        mode(0o666),
        fs::makedev(511, 77),
    )?;
    match open("c", OFlags::RDONLY) {
        Err(Errno::ACCESS) => skip("the file system is mounted without devices"),
        result => refused("open", result, Errno::NXIO),
    }
}

fn terminal_request_to_a_file_is_refused() -> Outcome {
    let file = create("f", 0o644)?;
    refused(
        "TCGETS",
        rustix::termios::tcgetattr(&file).map(drop),
        Errno::NOTTY,
    )
}

fn file_flags_are_readable_or_refused() -> Outcome {
    let file = create("f", 0o644)?;
    match fs::ioctl_getflags(&file) {
        Ok(_) | Err(Errno::NOTTY | Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn executable_runs() -> Outcome {
    write_file("script", b"#!/bin/sh\nexit 7\n")?;
    fs::chmod("script", mode(0o755))?;
    let status = std::process::Command::new("./script").status()?;
    equal("status", status.code(), Some(7))?;
    fs::chmod("script", mode(0o644))?;
    holds(
        "without x it does not",
        std::process::Command::new("./script").status().is_err(),
    )
}

fn copied_program_runs() -> Outcome {
    let program = std::env::current_exe()?;
    std::fs::copy(program, "program")?;
    fs::chmod("program", mode(0o755))?;
    // Without a directory it says how it is used, and ends.
    let output = std::process::Command::new("./program").output()?;
    equal("status", output.status.code(), Some(2))?;
    holds("it can be replaced", fs::unlink("program").is_ok())
}
