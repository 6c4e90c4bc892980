//! Generates the messages from cri.proto, in pure Rust.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?;
    let out = Path::new(&out);
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(out)
        .include("proto")
        .input("proto/cri.proto")
        .run()
        .map_err(io::Error::other)?;
    // Inner attributes and docs are not allowed in an included file.
    let path = out.join("cri.rs");
    let kept: String = fs::read_to_string(&path)?
        .lines()
        .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write(&path, kept)
}
