//! TCP: a stream each way, and small requests one at a time.
//!
//! A connection begins with one byte that says what it is for, and a count of bytes.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{elapsed, say_rate, to_f64};

const PORT: u16 = 7100;

/// For a connection, and for anything to come on it.
const DEADLINE: Duration = Duration::from_secs(60);

const STREAM_BYTES: u64 = 16 * 1024 * 1024;
const BLOCK_BYTES: usize = 64 * 1024;

/// Requests, and bytes in each and in its answer.
const REQUESTS: u64 = 500;
const REQUEST_BYTES: usize = 64;

/// From the client, to the client, requests of the client.
const UP: u8 = b'U';
const DOWN: u8 = b'D';
const ECHO: u8 = b'E';

/// Serves until the end of its input.
pub(crate) fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))
        .with_context(|| format!("cannot listen on port {PORT}"))?;
    thread::spawn(move || {
        for connection in listener.incoming() {
            // One after the other: two would share what is measured.
            if let Err(error) = connection.map_err(Into::into).and_then(answer) {
                eprintln!("husk-workload: a connection: {error:#}");
            }
        }
    });
    println!("ready");
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn answer(mut connection: TcpStream) -> Result<()> {
    prepare(&connection)?;
    let mut head = [0; 9];
    connection.read_exact(&mut head)?;
    let [kind, count @ ..] = head;
    let count = u64::from_be_bytes(count);
    match kind {
        UP => {
            receive(&mut connection, count)?;
            connection.write_all(b"!")?;
        }
        DOWN => send(&mut connection, count)?,
        ECHO => {
            let mut request = [0; REQUEST_BYTES];
            for _ in 0..count {
                connection.read_exact(&mut request)?;
                connection.write_all(&request)?;
            }
        }
        other => bail!("an unknown request {other}"),
    }
    Ok(())
}

/// Measures against a server at that address; the figures are called by `names`: up, down and
/// requests, or `-` for one that is not wanted.
pub(crate) fn measure(address: &str, names: [&str; 3]) -> Result<()> {
    let address: Ipv4Addr = address
        .parse()
        .with_context(|| format!("no IPv4 address: {address:?}"))?;
    let address = SocketAddr::from((address, PORT));
    let [up, down, requests] = names;
    // The first connection resolves addresses and fills caches.
    ask(address, ECHO, 1)?;
    if up != "-" {
        let began = Instant::now();
        ask(address, UP, STREAM_BYTES)?;
        say_rate(up, STREAM_BYTES, began)?;
    }
    if down != "-" {
        let began = Instant::now();
        ask(address, DOWN, STREAM_BYTES)?;
        say_rate(down, STREAM_BYTES, began)?;
    }
    if requests != "-" {
        let began = Instant::now();
        ask(address, ECHO, REQUESTS)?;
        println!("{requests} {}", to_f64(REQUESTS) / elapsed(began)?);
    }
    Ok(())
}

fn ask(address: SocketAddr, kind: u8, count: u64) -> Result<()> {
    let mut connection = TcpStream::connect_timeout(&address, DEADLINE)
        .with_context(|| format!("cannot connect to {address}"))?;
    prepare(&connection)?;
    let mut head = vec![kind];
    head.extend(count.to_be_bytes());
    connection.write_all(&head)?;
    match kind {
        UP => {
            send(&mut connection, count)?;
            let mut done = [0];
            connection.read_exact(&mut done)?;
        }
        DOWN => receive(&mut connection, count)?,
        _ => {
            let request = [b'h'; REQUEST_BYTES];
            let mut reply = [0; REQUEST_BYTES];
            for _ in 0..count {
                connection.write_all(&request)?;
                connection.read_exact(&mut reply)?;
                ensure!(reply == request, "the answer is not what was sent");
            }
        }
    }
    Ok(())
}

fn prepare(connection: &TcpStream) -> Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(DEADLINE))?;
    connection.set_write_timeout(Some(DEADLINE))?;
    Ok(())
}

fn send(connection: &mut TcpStream, bytes: u64) -> Result<()> {
    let block = vec![b'h'; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let count = usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES));
        connection.write_all(block.get(..count).unwrap_or_default())?;
        left = left.saturating_sub(u64::try_from(count)?);
    }
    Ok(())
}

fn receive(connection: &mut TcpStream, bytes: u64) -> Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let count = connection.read(&mut block)?;
        ensure!(count > 0, "the stream ended {left} bytes early");
        let count = u64::try_from(count)?;
        ensure!(count <= left, "more came than was asked for");
        left = left.saturating_sub(count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server for one connection.
    fn server() -> (SocketAddr, thread::JoinHandle<Result<()>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        (address, thread::spawn(move || answer(listener.accept()?.0)))
    }

    #[test]
    fn unknown_requests_and_short_streams_are_errors() {
        let heads = [
            b"X\0\0\0\0\0\0\0\x01".as_slice(),
            b"U\0\0\0\0\0\0\0\x09abc",
            b"U\0",
        ];
        for head in heads {
            let (address, server) = server();
            TcpStream::connect(address)
                .unwrap()
                .write_all(head)
                .unwrap();
            assert!(server.join().unwrap().is_err(), "{head:?}");
        }
    }

    #[test]
    fn address_of_another_form_is_refused() {
        assert!(measure("nowhere", ["a", "b", "c"]).is_err());
    }

    #[test]
    fn every_kind_of_request_is_answered() {
        for kind in [UP, DOWN, ECHO] {
            let (address, server) = server();
            ask(address, kind, 100_000).unwrap();
            server.join().unwrap().unwrap();
        }
    }
}
