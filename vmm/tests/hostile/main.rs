//! A guest with a kernel's rights attacks each device of its VMM (`vmm/hostile`), and this is what becomes of it.
//!
//! Each test runs groups of attacks, a VM each, and prints what came of every attack. While the guest is at it, the
//! control socket is asked all the time. Whatever the attack: the VMM answers in time, has the memory, threads and
//! descriptors that it had, no byte of the host changes but those that are the guest's, the other devices work
//! afterwards, and so does another VM; if the VM ends, its report says why.
//!
//! Attacks at random are determined by a seed. `make hostile` tries one after another.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod run;
mod support;
mod watch;
mod world;

use std::time::{Duration, Instant};

use hull_hostile_guest::attacks::GROUPS;

use crate::run::{Order, attack};
use crate::support::has_kvm;

/// What attacks at random begin with, so that a run is like the one before.
const SEED: u64 = 14;
/// Steps of an attack at random.
const STEPS: u64 = 1500;

/// Runs the groups whose name begins like this.
fn attack_all(name: &str) {
    if !has_kvm() {
        return;
    }
    let groups = GROUPS.iter().filter(|group| group.name.starts_with(name));
    let mut failures = Vec::new();
    for group in groups {
        let order = Order {
            group,
            seed: SEED,
            steps: STEPS,
        };
        failures.extend(attack(&order));
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn rings() {
    attack_all("rings of");
}

#[test]
fn registers() {
    attack_all("registers");
}

#[test]
fn disks() {
    attack_all("block");
}

#[test]
fn files_as_memory() {
    attack_all("pmem");
}

#[test]
fn network_cards() {
    attack_all("net");
}

#[test]
fn sockets() {
    attack_all("vsock");
}

#[test]
fn file_systems() {
    attack_all("fs");
}

#[test]
fn memory_that_comes_and_goes() {
    attack_all("balloon");
    attack_all("memory");
}

#[test]
fn platform() {
    attack_all("platform");
}

#[test]
fn processors() {
    attack_all("processors");
}

#[test]
fn calls_of_the_hypervisor() {
    attack_all("hypervisor");
}

#[test]
fn slots() {
    attack_all("slots");
}

#[test]
fn at_random() {
    attack_all("random");
}

#[test]
fn ends_of_the_guest() {
    attack_all("end");
}

#[test]
#[ignore = "takes as long as it is told to: make hostile"]
fn seeds_without_end() {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let seconds = number("HULL_HOSTILE_SECONDS").unwrap_or(60);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seed = number("HULL_HOSTILE_SEED").unwrap_or_else(seed_of_now);
    let mut runs = 0;
    while Instant::now() < end {
        for group in GROUPS.iter().filter(|group| group.name == "random") {
            let order = Order {
                group,
                seed,
                steps: STEPS,
            };
            let failures = attack(&order);
            assert!(failures.is_empty(), "seed {seed}:\n{}", failures.join("\n"));
        }
        seed = seed.wrapping_add(1);
        runs += 1;
    }
    println!(
        "hostile: {runs} seeds, the last was {}",
        seed.wrapping_sub(1)
    );
}

fn seed_of_now() -> u64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    since.as_secs()
}
