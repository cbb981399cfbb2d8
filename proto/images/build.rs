//! Generates the messages, client and server from `proto/images.proto`.
//!
//! protox parses the file, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/images.proto");
    let files = protox::compile(["images.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // They hold a password; lib.rs writes a Debug that does not show it.
        .skip_debug(["hull.images.v1.PullRequest", "hull.images.v1.LoginRequest"])
        .compile_fds(files)?;
    Ok(())
}
