//! Compiles this crate's sources once more, as the guest: freestanding, for no operating system.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=guest.ld");
    println!("cargo::rustc-check-cfg=cfg(freestanding)");
    let variable = |name| env::var_os(name).ok_or_else(|| format!("{name} is not set"));
    let directory = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let script = directory.join("guest.ld");
    let status = Command::new(variable("RUSTC")?)
        .arg(directory.join("src/lib.rs"))
        .args(["--crate-name", "guest", "--crate-type", "bin"])
        .args(["--edition", "2024", "--cap-lints", "allow"])
        .args(["--cfg", "freestanding"])
        .arg("--target")
        .arg(variable("TARGET")?)
        // A KVM that emulates may not know SSE.
        .arg("-Ctarget-feature=-sse,-sse2")
        .args([
            "-Copt-level=2",
            "-Cpanic=abort",
            "-Crelocation-model=static",
        ])
        .args(["-Clink-arg=-nostdlib", "-Clink-arg=-nostartfiles"])
        .args(["-Clink-arg=-static", "-Clink-arg=-no-pie"])
        .arg("-Clink-arg=-Wl,--build-id=none,-z,max-page-size=4096")
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(PathBuf::from(variable("OUT_DIR")?).join("guest"))
        .status()?;
    if !status.success() {
        return Err(format!("compile the guest: {status}").into());
    }
    Ok(())
}
