//! Prints what inotify tells of a directory, a line each, until a name is moved into place.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// Watches `directory` until something is moved to the name `last`.
pub(crate) fn watch(directory: &Path, last: &str) -> io::Result<()> {
    let inotify = inotify::init(CreateFlags::CLOEXEC)?;
    let events = WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MOVE
        | WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE;
    inotify::add_watch(&inotify, directory, events)?;
    let mut output = io::stdout().lock();
    writeln!(output, "watching")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().unwrap_or_default().to_string_lossy();
        let what = event.events() - ReadFlags::ISDIR;
        writeln!(output, "{} {name}", word(what))?;
        if what.contains(ReadFlags::MOVED_TO) && name == last {
            return Ok(());
        }
    }
}

fn word(what: ReadFlags) -> &'static str {
    match what {
        ReadFlags::CREATE => "create",
        ReadFlags::DELETE => "delete",
        ReadFlags::MOVED_FROM => "from",
        ReadFlags::MOVED_TO => "to",
        ReadFlags::MODIFY => "modify",
        ReadFlags::CLOSE_WRITE => "close",
        _ => "other",
    }
}
