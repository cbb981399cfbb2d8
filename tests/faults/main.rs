//! A daemon that is killed, stopped, or refused a write at each point that it knows
//! (`hull_base::faults`), VMMs and file servers that die while it is there, and a host that lacks
//! something: after each, the next call or the next daemon puts all right.
//!
//! Pods are fake (`runtime/pod/examples/fake-vmm`) with `make faults VMS=fake`, which takes some minutes, and
//! real ones with `make faults`. What is right: a pod that runs all the time
//! has the same VM, answers, and has each line of its log once; kubelet's retry succeeds; exit codes and
//! logs are what they should be; of all else nothing is left ([`left`]).
//!
//! Read [`run`] first; a daemon and its client are in [`node`], what kubelet calls in [`kubelet`], what is
//! done at a point in [`points`], and what else goes wrong in [`host`].
//!
//! `HULL_FOCUS` in the environment has words of the names of what is to be run.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod host;
mod kind;
mod kubelet;
mod left;
mod node;
mod points;
mod process;
mod run;
mod soak;
mod witness;

use std::{env, process::Command};

use run::Wanted;
use soak::Load;

/// Runs a test of this program again, in namespaces of its own: what it leaves ends with it.
fn inside(test: &str) -> bool {
    if env::var_os("HULL_FAULTS_INSIDE").is_some() {
        return true;
    }
    let Some(skipped) = kind::Kind::of_environment().lacks() else {
        let status = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            // Bash buries those whose parents have ended.
            .args(["bash", "-c", "ip link set lo up; \"$@\"; exit $?", "bash"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", test, "--include-ignored", "--nocapture"])
            .env("HULL_FAULTS_INSIDE", "1")
            .status();
        assert!(status.unwrap().success());
        return false;
    };
    println!("SKIPPED: {test}: {skipped}");
    false
}

#[test]
#[ignore = "takes minutes: make faults, make soak"]
fn every_point_is_survived() {
    if inside("every_point_is_survived") {
        run::block_on(run::faults(Wanted::of_environment()));
    }
}

#[test]
fn a_sample_of_points_is_survived() {
    if inside("a_sample_of_points_is_survived") {
        run::block_on(run::faults(Wanted::sample()));
    }
}

#[test]
#[ignore = "takes minutes: make faults, make soak"]
fn what_comes_and_goes_leaves_nothing() {
    if inside("what_comes_and_goes_leaves_nothing") {
        run::block_on(soak::soak(Load::of_environment()));
    }
}

#[test]
fn a_few_pods_and_restarts_leave_nothing() {
    if inside("a_few_pods_and_restarts_leave_nothing") {
        run::block_on(soak::soak(Load::few()));
    }
}
