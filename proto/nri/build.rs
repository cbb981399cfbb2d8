//! Generates the messages from `proto/nri.proto`.

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/nri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/nri.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .run()?;
    // `include!` takes no inner attributes or docs; lib.rs sets what they would.
    let path = out.join("nri.rs");
    let text = fs::read_to_string(&path)?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(&path, kept.join("\n"))?;
    Ok(())
}
