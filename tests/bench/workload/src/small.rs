//! Many small files: created, stat'ed, listed, removed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{elapsed, say_each, to_f64};

/// In each of them.
const CONTENT: [u8; 1024] = [b'h'; 1024];

/// Works in a new directory below `root` and removes it.
pub(crate) fn measure(root: &Path, count: u32) -> Result<()> {
    let directory = root.join("husk-workload-small");
    fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let done = work(&directory, count);
    fs::remove_dir_all(&directory)
        .with_context(|| format!("cannot remove {}", directory.display()))?;
    done
}

fn work(directory: &Path, count: u32) -> Result<()> {
    let paths: Vec<PathBuf> = (0..count)
        .map(|number| directory.join(format!("file-{number:05}")))
        .collect();
    let each = u64::from(count);

    let began = Instant::now();
    for path in &paths {
        File::create_new(path)?.write_all(&CONTENT)?;
    }
    say_each("fs_create", each, began)?;
    let mut seconds = elapsed(began)?;

    let began = Instant::now();
    for path in &paths {
        let size = path.symlink_metadata()?.len();
        ensure!(size == 1024, "{} has {size} bytes", path.display());
    }
    say_each("fs_stat", each, began)?;
    seconds += elapsed(began)?;

    let began = Instant::now();
    let listed = fs::read_dir(directory)?.count();
    ensure!(
        listed == paths.len(),
        "{listed} files are listed, not {count}"
    );
    say_each("fs_readdir", each, began)?;

    let began = Instant::now();
    for path in &paths {
        fs::remove_file(path)?;
    }
    say_each("fs_unlink", each, began)?;
    seconds += elapsed(began)?;

    println!("fs_small_files {}", seconds * 1e6 / to_f64(each));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_that_is_there_already_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("husk-workload-small")).unwrap();
        assert!(measure(root.path(), 1).is_err());
    }

    #[test]
    fn nothing_is_left() {
        let root = tempfile::tempdir().unwrap();
        measure(root.path(), 10).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
