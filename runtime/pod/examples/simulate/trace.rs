//! What happened: shown when asked for, and a sum that tells whether two runs were the same.

use std::{
    cell::{Cell, RefCell},
    fmt,
    path::Path,
};

use crate::kernel;

thread_local! {
    static SHOWN: Cell<bool> = const { Cell::new(false) };
    static DIRECTORY: RefCell<String> = const { RefCell::new(String::new()) };
    static SUM: Cell<u64> = const { Cell::new(0xcbf2_9ce4_8422_2325) };
    static FAULT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Shows what happens, and what the daemon logs, on standard error.
pub fn show() {
    SHOWN.set(true);
    let logs = tracing_subscriber::fmt().with_writer(std::io::stderr);
    let level = tracing_subscriber::filter::LevelFilter::INFO;
    logs.without_time()
        .with_ansi(false)
        .with_max_level(level)
        .init();
}

/// Leaves a directory out of what is told of what is below it: it is another in each run.
pub fn leave_out(directory: &Path) {
    DIRECTORY.set(directory.display().to_string());
}

/// Notes that something happened.
pub fn trace(what: fmt::Arguments<'_>) {
    let line = format!("{:>12.6} {what}", kernel::now().as_secs_f64());
    let line = DIRECTORY.with_borrow(|directory| match directory.as_str() {
        "" => line,
        directory => line.replace(directory, ""),
    });
    add(line.as_bytes());
    if SHOWN.get() {
        eprintln!("{line}");
    }
}

/// Adds to the sum alone (FNV-1a).
pub fn add(bytes: &[u8]) {
    let mut sum = SUM.get();
    for byte in bytes {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    SUM.set(sum);
}

/// The same for runs in which the same happened.
pub fn sum() -> u64 {
    SUM.get()
}

/// Notes that something is not as it must be. The first time counts.
pub fn fault(what: String) {
    trace(format_args!("FAULT: {what}"));
    FAULT.with_borrow_mut(|fault| {
        fault.get_or_insert(what);
    });
}

/// What is not as it must be.
pub fn found() -> Option<String> {
    FAULT.with_borrow(Clone::clone)
}
