//! Generates the CRI messages, clients and servers from `proto/api.proto`.
//!
//! protox parses the file, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/api.proto");
    let files = protox::compile(["api.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Maps in a fixed order: answers and logs are the same from run to run.
        .btree_map(".")
        // Holds passwords; lib.rs writes a Debug that doesn't show them.
        .skip_debug(["runtime.v1.AuthConfig"])
        .compile_fds(files)?;
    Ok(())
}
