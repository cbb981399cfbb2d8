//! All fuzz targets as one program; HULL_FUZZ_TARGET says which it is, and without it the program prints their
//! names. What they do is in the module `fuzz` of each crate.
#![no_main]

use std::{env, process, sync::OnceLock};

/// The entry point that was chosen.
static RUN: OnceLock<fn(&[u8])> = OnceLock::new();

fn choose() {
    let all = [
        hull::fuzz::TARGETS,
        hull_fs::fuzz::TARGETS,
        hull_image::fuzz::TARGETS,
        hull_network::fuzz::TARGETS,
        hull_nri::fuzz::TARGETS,
        hull_spdy::fuzz::TARGETS,
        hull_streaming::fuzz::TARGETS,
        hull_vm::fuzz::TARGETS,
        hull_vmm::fuzz::TARGETS,
    ];
    let mut all = all.concat();
    let Ok(name) = env::var("HULL_FUZZ_TARGET") else {
        all.sort_by_key(|(name, _)| *name);
        for (name, _) in all {
            println!("{name}");
        }
        process::exit(0);
    };
    let target = all.into_iter().find(|(known, _)| *known == name);
    let (_, run) = target.unwrap_or_else(|| panic!("HULL_FUZZ_TARGET={name}: no such target"));
    let _ = RUN.set(run);
}

libfuzzer_sys::fuzz_target!(init: choose(), |input: &[u8]| {
    if let Some(run) = RUN.get() {
        run(input);
    }
});
