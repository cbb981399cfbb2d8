//! Many seeds, side by side.

use std::{
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use hull_base::host;

/// Runs seeds, each in a process of its own, so that none has anything of another, until so many have shown a
/// fault.
pub fn run(first: u64, count: u64, most: u64) -> ExitCode {
    let begin = Instant::now();
    let next = AtomicU64::new(first);
    let failed = AtomicU64::new(0);
    let program = std::env::current_exe().unwrap();
    let work = || {
        while failed.load(Ordering::Relaxed) < most {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return;
            }
            let output = Command::new(&program)
                .args(["--quiet", &seed.to_string()])
                .stdin(Stdio::null())
                .output()
                .unwrap();
            if !output.status.success() {
                failed.fetch_add(1, Ordering::Relaxed);
                let said = String::from_utf8_lossy(&output.stderr);
                let said: Vec<&str> = said.lines().collect();
                let last = said[said.len().saturating_sub(3)..].join("; ");
                println!("seed {seed}: {} {last}", output.status);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..host::cpus() {
            scope.spawn(work);
        }
    });
    let ran = (next.load(Ordering::Relaxed) - first).min(count);
    let failed = failed.load(Ordering::Relaxed);
    println!(
        "simulate: {ran} seeds from {first}, {failed} with a fault, {} s",
        begin.elapsed().as_secs()
    );
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
