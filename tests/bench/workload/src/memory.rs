//! Memory that is taken and given back.

use std::hint::black_box;
use std::io::{self, Read, Write};

use anyhow::{Context, Result};

const MIB: usize = 1024 * 1024;
const PAGE: usize = 4096;

/// Says `ready` and waits for a line; touches so much memory, says `held` and waits for a line;
/// frees it, says `freed`, and waits for the end of its input.
pub(crate) fn hold(mib: u32) -> Result<()> {
    say("ready")?;
    io::stdin().read_line(&mut String::new())?;
    let bytes = usize::try_from(mib)?.checked_mul(MIB).context("too much")?;
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(PAGE) {
        page.fill(b'h');
    }
    black_box(&memory);
    say("held")?;
    io::stdin().read_line(&mut String::new())?;
    // So large an allocation is a mapping of its own, which goes as a whole.
    drop(memory);
    say("freed")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn say(word: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{word}")?;
    Ok(out.flush()?)
}
