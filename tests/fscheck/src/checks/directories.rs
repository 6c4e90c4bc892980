//! Reading directories.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::harness::*;

super::checks!(
    directory_lists_what_is_there,
    empty_directory_lists_itself_and_its_parent,
    entries_have_types_and_inodes,
    large_directory_lists_everything_once,
    seek_returns_to_an_entry,
    rewound_directory_shows_new_names,
    deleting_while_reading_loses_nothing,
    open_directory_outlives_its_name,
    long_names_are_listed,
);

struct Entry {
    name: String,
    kind: FileType,
    inode: u64,
    next: u64,
}

fn open_directory(name: &str) -> Result<OwnedFd, Errno> {
    open(name, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Entries from here on, at most `count`.
fn read(directory: impl AsFd, count: usize) -> Result<Vec<Entry>, Errno> {
    let mut buffer = vec![MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut found = Vec::new();
    while found.len() < count
        && let Some(entry) = entries.next()
    {
        let entry = entry?;
        found.push(Entry {
            name: entry.file_name().to_string_lossy().into_owned(),
            kind: entry.file_type(),
            inode: entry.ino(),
            next: entry.next_entry_cookie(),
        });
    }
    Ok(found)
}

fn names(directory: impl AsFd) -> Result<Vec<String>, Errno> {
    let mut names: Vec<String> = read(directory, usize::MAX)?
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    names.sort();
    Ok(names)
}

fn make_files(count: usize) -> Result<BTreeSet<String>, Problem> {
    mkdir("d", 0o755)?;
    let all: BTreeSet<String> = (0..count)
        .map(|number| format!("file-{number:05}"))
        .collect();
    for name in &all {
        create(&format!("d/{name}"), 0o644)?;
    }
    Ok(all)
}

fn without_dots(names: impl IntoIterator<Item = String>) -> Vec<String> {
    names
        .into_iter()
        .filter(|name| name != "." && name != "..")
        .collect()
}

fn directory_lists_what_is_there() -> Outcome {
    mkdir("d", 0o755)?;
    for name in ["b", "a", "c"] {
        create(&format!("d/{name}"), 0o644)?;
    }
    equal(
        "names",
        names(open_directory("d")?)?,
        [".", "..", "a", "b", "c"].map(String::from).into(),
    )?;
    fs::unlink("d/b")?;
    fs::rename("d/c", "d/z")?;
    equal(
        "names after",
        names(open_directory("d")?)?,
        [".", "..", "a", "z"].map(String::from).into(),
    )
}

fn empty_directory_lists_itself_and_its_parent() -> Outcome {
    mkdir("d", 0o755)?;
    equal(
        "names",
        names(open_directory("d")?)?,
        [".", ".."].map(String::from).into(),
    )
}

fn entries_have_types_and_inodes() -> Outcome {
    mkdir("d", 0o755)?;
    mkdir("d/directory", 0o755)?;
    create("d/file", 0o644)?;
    fs::symlink("file", "d/link")?;
    fs::mknodat(fs::CWD, "d/fifo", FileType::Fifo, mode(0o644), 0)?;
    for entry in read(open_directory("d")?, usize::MAX)? {
        let expected = match entry.name.as_str() {
            "file" => FileType::RegularFile,
            "link" => FileType::Symlink,
            "fifo" => FileType::Fifo,
            _ => FileType::Directory,
        };
        if entry.kind != FileType::Unknown {
            equal(&entry.name, entry.kind, expected)?;
        }
        if entry.name != ".." {
            equal(
                &entry.name,
                entry.inode,
                lstat(&format!("d/{}", entry.name))?.st_ino,
            )?;
        }
    }
    Ok(())
}

fn large_directory_lists_everything_once() -> Outcome {
    let all = make_files(3000)?;
    let found = without_dots(names(open_directory("d")?)?);
    equal("count", found.len(), all.len())?;
    holds(
        "the names are right",
        found.into_iter().collect::<BTreeSet<_>>() == all,
    )?;
    // With attributes, as `ls -l` asks for them.
    for entry in read(open_directory("d")?, usize::MAX)? {
        lstat(&format!("d/{}", entry.name))?;
    }
    Ok(())
}

fn seek_returns_to_an_entry() -> Outcome {
    make_files(500)?;
    let directory = open_directory("d")?;
    let all = read(&directory, usize::MAX)?;
    for at in [0, 1, 7, 250, 498] {
        fs::seek(&directory, SeekFrom::Start(all[at].next))?;
        let next = read(&directory, 1)?;
        let next = next.first().map(|entry| entry.name.clone());
        equal("the next entry", next, Some(all[at + 1].name.clone()))?;
    }
    Ok(())
}

fn rewound_directory_shows_new_names() -> Outcome {
    mkdir("d", 0o755)?;
    let directory = open_directory("d")?;
    equal("before", names(&directory)?.len(), 2)?;
    create("d/f", 0o644)?;
    fs::seek(&directory, SeekFrom::Start(0))?;
    equal("after", names(&directory)?.len(), 3)
}

fn deleting_while_reading_loses_nothing() -> Outcome {
    let all = make_files(1000)?;
    let directory = open_directory("d")?;
    let mut deleted = BTreeSet::new();
    loop {
        let entries = read(&directory, 50)?;
        // The reader may have read ahead: what it has not handed out it reads again from here.
        let Some(last) = entries.last() else { break };
        fs::seek(&directory, SeekFrom::Start(last.next))?;
        for name in without_dots(entries.into_iter().map(|entry| entry.name)) {
            fs::unlink(format!("d/{name}"))?;
            holds("no name comes twice", deleted.insert(name))?;
        }
    }
    equal("deleted", deleted.len(), all.len())?;
    Ok(fs::rmdir("d")?)
}

fn open_directory_outlives_its_name() -> Outcome {
    mkdir("d", 0o755)?;
    let directory = open_directory("d")?;
    fs::rmdir("d")?;
    // Linux has it that a removed directory can't be read; others, that it is empty.
    match names(&directory) {
        Err(Errno::NOENT) => Ok(()),
        names => equal("names", without_dots(names?), Vec::new()),
    }
}

fn long_names_are_listed() -> Outcome {
    mkdir("d", 0o755)?;
    for letter in 'a'..='z' {
        create(&format!("d/{}", letter.to_string().repeat(255)), 0o644)?;
    }
    let found = without_dots(names(open_directory("d")?)?);
    equal("count", found.len(), 26)?;
    holds("each is whole", found.iter().all(|name| name.len() == 255))
}
