//! A source tree: read as tar does, stat'ed as `git status` does.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{Places, say_each};

const TREE: &str = "tree";
const DIRECTORIES: u32 = 50;
const FILES_IN_EACH: u32 = 40;

/// Of a file of the tree: most source files are smaller.
const BYTES_MAX: u64 = 12 * 1024;

/// Makes the tree: 2,000 files of some 6 KiB in 50 directories.
pub(crate) fn make(directory: &Path) -> Result<()> {
    let mut sizes = Places::new();
    let content = vec![b'h'; usize::try_from(BYTES_MAX)?];
    for number in 0..DIRECTORIES {
        let place = directory.join(TREE).join(format!("module-{number:02}"));
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        for file in 0..FILES_IN_EACH {
            let size = usize::try_from(sizes.below(BYTES_MAX))?;
            let content = content.get(..size).context("a size beyond its maximum")?;
            fs::write(place.join(format!("source-{file:02}.rs")), content)?;
        }
    }
    Ok(())
}

/// Reads all of it twice, and stats all of it.
pub(crate) fn measure(directory: &Path) -> Result<()> {
    let root = directory.join(TREE);
    for name in ["fs_tree_first", "fs_tree_again"] {
        let began = Instant::now();
        let files = read(&root).with_context(|| format!("cannot read {}", root.display()))?;
        say_each(name, files, began)?;
    }
    let index = walk(&root)?;
    let began = Instant::now();
    for path in &index {
        black_box(path.symlink_metadata()?);
    }
    // What is not in the index is looked for as well.
    walk(&root)?;
    say_each("fs_stat_storm", u64::try_from(index.len())?, began)
}

/// Every file, with its metadata and content; how many there are.
fn read(root: &Path) -> Result<u64> {
    let mut files = 0;
    let mut block = vec![0; 10 * 1024];
    for path in walk(root)? {
        let size = path.symlink_metadata()?.len();
        let mut file = File::open(&path)?;
        let mut bytes = 0;
        loop {
            let count = file.read(&mut block)?;
            if count == 0 {
                break;
            }
            bytes += u64::try_from(count)?;
            black_box(&block);
        }
        ensure!(
            bytes == size,
            "{} is {bytes} bytes, not {size}",
            path.display()
        );
        files += 1;
    }
    Ok(files)
}

/// The files of the tree.
fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_that_is_missing_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(measure(directory.path()).is_err());
    }

    #[test]
    fn every_file_of_the_tree_is_read() {
        let directory = tempfile::tempdir().unwrap();
        make(directory.path()).unwrap();
        let files = read(&directory.path().join(TREE)).unwrap();
        assert_eq!(files, u64::from(DIRECTORIES * FILES_IN_EACH));
        measure(directory.path()).unwrap();
    }
}
