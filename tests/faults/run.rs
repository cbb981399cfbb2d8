//! The list of all that goes wrong, one after another, and what came of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use hull_base::faults::Kind as PointKind;
use hull_proto_cri::v1::ListPodSandboxRequest;

use crate::{
    host,
    kind::Kind,
    kubelet::IMAGE,
    left::Left,
    node::{Node, all_points},
    points::{Action, Call, Pods, at, trace},
    witness::Witness,
};

/// How long what ends by itself may take to end.
const GONE: Duration = Duration::from_secs(20);

pub fn block_on(work: impl Future<Output = Result<()>>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    if let Err(error) = runtime.unwrap().block_on(work) {
        panic!("{error:#}");
    }
}

/// What is done: a call, a point in it, which time it is reached, and what happens there.
#[derive(Debug, Clone)]
struct Fault {
    call: Call,
    point: String,
    nth: usize,
    action: Action,
}

impl Fault {
    fn name(&self) -> String {
        let Self {
            call,
            point,
            nth,
            action,
        } = self;
        format!("{call:?} {point} {nth} {}", action.name())
    }
}

/// What came of them.
#[derive(Default)]
pub struct Outcomes {
    rows: Vec<(String, String, String)>,
    lost: usize,
    reached: BTreeSet<String>,
}

impl Outcomes {
    fn add(&mut self, place: String, what: &str, begun: Instant, result: Result<bool>) {
        let word = match result {
            Ok(true) => "survived".to_owned(),
            Ok(false) => "NOT REACHED".to_owned(),
            Err(error) => format!("LOST: {error:#}"),
        };
        if word != "survived" {
            self.lost += 1;
        }
        println!(
            "| {place} | {what} | {word} | {:.1} s |",
            begun.elapsed().as_secs_f64()
        );
        self.rows.push((place, what.to_owned(), word));
    }
}

/// All faults, each followed by what has to be right.
pub async fn faults() -> Result<()> {
    let focus = env::var("HULL_FOCUS").unwrap_or_default();
    let mut node = Node::start().await?;
    node.client.pull(IMAGE).await?;
    let mut witness = Witness::start(&node, "witness").await?;
    let mut pods = Pods::default();
    // What is there once: a template of disks, the bridge.
    pods.shared(&node).await?;
    pods.end(&node).await?;
    let before = node.left();

    println!("| where | what happens | outcome | time |");
    println!("|---|---|---|---|");
    let mut outcomes = Outcomes::default();
    for call in Call::ALL {
        if !focus.is_empty()
            && !focus.contains(&format!("{call:?}"))
            && call_names().any(|name| focus.contains(&name))
        {
            continue;
        }
        let reached = trace(&mut node, &mut pods, call).await?;
        outcomes
            .reached
            .extend(reached.iter().map(|(point, _)| point.clone()));
        for fault in planned(call, &reached) {
            let name = fault.name();
            if !name.contains(&focus) {
                continue;
            }
            let begun = Instant::now();
            let point = all_points()[&fault.point];
            let happened = at(&mut node, &mut pods, call, point, fault.nth, fault.action).await;
            let result = settle(&mut node, &mut pods, &mut witness, &before, happened).await;
            let place = format!("{call:?}: {} {}", fault.point, fault.nth);
            outcomes.add(place, fault.action.name(), begun, result);
        }
    }
    for fault in host::ALL {
        if !fault.name().contains(&focus) || !fault.is_possible(node.kind) {
            continue;
        }
        let begun = Instant::now();
        let happened = fault.happens(&mut node, &mut pods, &mut witness).await;
        let result = settle(
            &mut node,
            &mut pods,
            &mut witness,
            &before,
            happened.map(|()| true),
        )
        .await;
        outcomes.add("host".into(), fault.name(), begun, result);
    }
    pods.end(&node).await?;
    node.end(&witness.pod).await?;
    close(&node, &outcomes, &focus)
}

fn call_names() -> impl Iterator<Item = String> {
    Call::ALL.into_iter().map(|call| format!("{call:?}"))
}

/// Each time that a call reaches a point, the daemon is killed there; VMM and file server die the first
/// time; writes fail in both ways.
fn planned(call: Call, reached: &[(String, usize)]) -> Vec<Fault> {
    let each = env::var("HULL_FAULTS_EACH").ok();
    let most = each.and_then(|each| each.parse().ok()).unwrap_or(MOST);
    let points = all_points();
    let mut faults = Vec::new();
    for (name, count) in reached {
        let mut add = |nth, action| {
            faults.push(Fault {
                call,
                point: name.clone(),
                nth,
                action,
            });
        };
        match points[name].kind() {
            PointKind::Effect => {
                // An output is written in as many pieces as it comes in.
                let times = if call == Call::Log {
                    1
                } else {
                    (*count).min(most)
                };
                (1..=times).for_each(|nth| add(nth, Action::Kill));
                if has_vm(call, name) {
                    add(1, Action::KillVmm);
                }
                if [
                    "paths-shared",
                    "paths-unshared",
                    "guest-created",
                    "guest-deleted",
                ]
                .contains(&name.as_str())
                {
                    add(1, Action::KillFiles);
                }
            }
            PointKind::Write => ["enospc", "eio"]
                .map(Action::Fails)
                .into_iter()
                .for_each(|action| add(1, action)),
        }
    }
    faults
}

/// How often a point is killed at in one call, if `HULL_FAULTS_EACH` does not say more: records are written
/// at several of its stages.
const MOST: usize = 1;

/// Whether there is a VM at this point.
fn has_vm(call: Call, point: &str) -> bool {
    let in_vm = ["vm-", "agent-", "guest-", "storage-", "paths-"]
        .iter()
        .any(|part| point.starts_with(part));
    call.has_pod() && in_vm && !["vm-stopped", "guest-shut-down"].contains(&point)
}

/// Sees to it that all is right again.
async fn settle(
    node: &mut Node,
    pods: &mut Pods,
    witness: &mut Witness,
    before: &Left,
    happened: Result<bool>,
) -> Result<bool> {
    node.disarm();
    let mut right = async {
        let reached = happened?;
        witness.look(node).await?;
        if let Err(left) = nothing_left(node, pods, before).await {
            bail!("left: {left:?}");
        }
        Ok(reached)
    }
    .await;
    if let Err(error) = &mut right {
        let complaints = node.complaints();
        println!("{error:#}; the daemon said last:\n    {complaints}");
        // What is lost must not be lost again in the next one.
        node.restart().await?;
        pods.forget();
        for name in all_pods(node).await? {
            if name.0 != witness.pod.id {
                let _ = node.stop_sandbox(&name.0).await;
                let _ = node.remove_sandbox(&name.0).await;
            }
        }
        if witness.look(node).await.is_err() {
            let _ = node.stop_sandbox(&witness.pod.id).await;
            let _ = node.remove_sandbox(&witness.pod.id).await;
            bail!("the running pod is lost: {error:#}");
        }
    }
    right
}

async fn all_pods(node: &Node) -> Result<Vec<(String,)>> {
    let answer = node
        .client
        .runtime
        .clone()
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await?;
    Ok(answer
        .into_inner()
        .items
        .into_iter()
        .map(|item| (item.id,))
        .collect())
}

/// What is left beyond what the shared pod has.
async fn nothing_left(node: &Node, pods: &Pods, before: &Left) -> Result<(), Vec<String>> {
    let deadline = Instant::now() + GONE;
    loop {
        let mut left = node.left().since(before);
        let shared = pods.left();
        left.retain(|what| !shared.has(what));
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(left);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn close(node: &Node, outcomes: &Outcomes, focus: &str) -> Result<()> {
    let mut unreached = Vec::new();
    if focus.is_empty() {
        for name in all_points().into_keys() {
            if !outcomes.reached.contains(&name) && !cannot_be_reached(node.kind, &name) {
                unreached.push(name);
            }
        }
    }
    let mut by_what: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (_, what, word) in &outcomes.rows {
        let (all, survived) = by_what.entry(what).or_default();
        *all += 1;
        *survived += usize::from(word == "survived");
    }
    println!();
    for (what, (all, survived)) in by_what {
        println!("{what}: {survived} of {all}");
    }
    for (place, what, word) in outcomes.rows.iter().filter(|row| row.2 != "survived") {
        println!("{place}, {what}: {word}");
    }
    for name in &unreached {
        println!("NOT REACHED by any call: {name}");
    }
    let all = outcomes.rows.len() + unreached.len();
    let lost = outcomes.lost + unreached.len();
    println!("faults: {all} points, {} survived, {lost} lost", all - lost);
    if lost > 0 {
        bail!("{lost} points are lost");
    }
    Ok(())
}

/// Points of what does not happen on this node.
fn cannot_be_reached(kind: Kind, point: &str) -> bool {
    let no_cgroups = !std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    point.starts_with("cgroup-") && no_cgroups && kind == Kind::Fake
}
