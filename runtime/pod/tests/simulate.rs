//! Seeds of the simulation (examples/simulate): that a seed is one run, and those that showed a fault once.
//! `make simulate` runs thousands of others.

#![expect(
    clippy::unwrap_used,
    reason = "it is a test: what surprises it ends it"
)]

use std::process::{Command, Output};

/// Seeds that showed a fault of the daemon when they were new, and which. What a seed does changes with
/// the code; the fault that it showed has a test of its own where there is a name.
const SHOWED_A_FAULT: &[(u64, &str)] = &[
    (
        8,
        "a container whose record could not be deleted was removed",
    ),
    (
        10,
        "after a write to the records had failed, none succeeded",
    ),
    (68, "copies of records that were not finished stayed"),
    (
        108,
        "a copy of a deleted record came back when the store was empty",
    ),
    (
        141,
        "a sandbox that could not be recorded was recorded, and took the place of the next one",
    ),
    (
        192,
        "a running pod was ended when one connection was lost while it was adopted",
    ),
    (
        1099,
        "a log that could not be gone on with at a start was not tried again",
    ),
    (
        2183,
        "a container that ended before its start was answered was not started for the next daemon",
    ),
    (300, "the same, and its container was told to have ended"),
    (
        224,
        "a container whose creation was refused, since its record could not be written, stayed until the next daemon",
    ),
    (
        536,
        "a container whose start could not be recorded was shown as running, and not by the next daemon",
    ),
    (
        1466,
        "a container whose creation was refused was listed when its record could not be deleted",
    ),
    (
        547,
        "a line of a log was written twice when its position could not be noted, nor the line cut off again",
    ),
    (
        753,
        "a container whose start was not answered was told to have ended, and ran",
    ),
    (43, "the same with its kill lost, and the next daemon"),
    (
        5266,
        "a pod was ended whose connection to the agent was lost three times in 37 seconds, and was there again at once",
    ),
];

fn run(seed: u64) -> Output {
    let mut command = Command::new(hull_built::example("simulate"));
    let output = command.args(["--quiet", &seed.to_string()]).output();
    output.unwrap()
}

#[test]
fn a_seed_is_one_run() {
    for seed in [1, 2, 3] {
        let [first, second] = [run(seed), run(seed)].map(|run| run.stdout);
        assert!(!first.is_empty());
        assert_eq!(first, second);
    }
    assert_ne!(run(1).stdout, run(2).stdout);
}

#[test]
fn seeds_that_showed_a_fault_show_none() {
    for (seed, fault) in SHOWED_A_FAULT {
        let output = run(*seed);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{fault}: {told}");
    }
}

#[test]
fn a_hundred_seeds_show_no_fault() {
    let output = Command::new(hull_built::example("simulate"))
        .args(["1000", "100"])
        .output();
    let output = output.unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}");
}
