//! What one request costs, without a guest: `cost DIRECTORY`, which gets a file of 1 MiB.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use husk_virtiofs::{CachePolicy, Options, ReplyWriter, RequestReader, Server, Worker};
use rustix::fs::{CWD, Mode, OFlags, openat};

const ROUNDS: u32 = 100_000;
const INIT: u32 = 26;
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const ROOT: u64 = 1;

fn main() -> anyhow::Result<()> {
    let share = std::env::args_os()
        .nth(1)
        .map(PathBuf::from)
        .context("usage: cost DIRECTORY")?;
    std::fs::write(share.join("cost"), vec![1; 1 << 20])?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, &share, directory, Mode::empty())?;
    let descriptors = openat(CWD, "/proc/self/fd", directory, Mode::empty())?;
    let server = Server::new(root, Options::single(descriptors, CachePolicy::SHARED))?;
    let mut worker = Worker::new(&server)?;
    let mut reply = vec![0; 1 << 21];
    let mut call = |request: &[u8], reply: &mut [u8]| {
        let reader = RequestReader::from_bytes(request);
        server.handle(&mut worker, reader, ReplyWriter::from_bytes(reply))
    };

    let mut init: Vec<u8> = [7_u32, 40, 0, u32::MAX]
        .iter()
        .flat_map(|field| field.to_ne_bytes())
        .collect();
    init.extend([0; 48]);
    call(&request(INIT, 0, &init), &mut reply);
    let lookup = request(LOOKUP, ROOT, b"cost\0");
    call(&lookup, &mut reply);
    let node = u64_at(&reply, 16).context("no node")?;
    call(&request(OPEN, node, &[0; 8]), &mut reply);
    let handle = u64_at(&reply, 16).context("no handle")?;

    let mut time = |name: &str, requests: &[&[u8]]| {
        let start = Instant::now();
        for _ in 0..ROUNDS {
            for request in requests {
                call(request, &mut reply);
            }
        }
        println!(
            "{name:24} {:>8.0} ns",
            start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
        );
    };
    time("unknown operation", &[&request(4000, ROOT, &[])]);
    time("GETATTR", &[&request(GETATTR, node, &[0; 16])]);
    time("LOOKUP, known", &[&lookup]);
    time("READ 4 KiB", &[&request(READ, node, &read(handle, 4096))]);
    time(
        "READ 128 KiB",
        &[&request(READ, node, &read(handle, 128 * 1024))],
    );
    time(
        "READ 1 MiB",
        &[&request(READ, node, &read(handle, 1024 * 1024))],
    );
    time("LOOKUP, none", &[&request(LOOKUP, ROOT, b"none\0")]);
    println!("{:?}", server.counters());
    Ok(())
}

fn read(handle: u64, size: u32) -> Vec<u8> {
    let mut arguments = handle.to_ne_bytes().to_vec();
    arguments.extend([0; 8]);
    arguments.extend(size.to_ne_bytes());
    arguments.extend([0; 20]);
    arguments
}

fn request(opcode: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + arguments.len()).unwrap_or(0);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(node.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}
