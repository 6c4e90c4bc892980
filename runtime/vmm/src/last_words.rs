//! Lines on standard error.

use std::fmt;
use std::io::{self, Write};

/// Prints a line on standard error, if that takes it. It may be a file on a disk that is full, where
/// `eprintln!` panics: no reason to end a virtual machine.
pub(crate) fn print(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
