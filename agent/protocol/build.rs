//! Generates the messages and the service from agent.proto, in pure Rust.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?;
    let out = Path::new(&out);
    ttrpc_codegen::Codegen::new()
        .out_dir(out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // Inner attributes and docs are not allowed in an included file.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        let kept: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#!") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(&path, kept)?;
    }
    Ok(())
}
