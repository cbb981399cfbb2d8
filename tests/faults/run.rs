//! The list of all that goes wrong, one after another, and what came of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hull_base::faults::Kind as PointKind;

use crate::{
    host::{self, HostFault},
    kind::Kind,
    kubelet::{IMAGE, STAYS},
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
        format!("{} {point} {nth} {}", call.name(), action.name())
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

/// Which faults are to happen.
#[derive(Debug)]
pub enum Wanted {
    /// Those that have one of these in their names, `CALL POINT NTH ACTION` or `host FAULT`, as whole words.
    Named(Vec<String>),
    /// Enough to see that all of it works: each point once, each action once in each call, and what a host
    /// may lack.
    Sample {
        points: BTreeSet<String>,
        actions: BTreeSet<(Call, &'static str)>,
    },
}

impl Wanted {
    /// All, or what `HULL_FOCUS` says: words with commas in between, or `sample`.
    pub fn of_environment() -> Self {
        let focus = env::var("HULL_FOCUS").unwrap_or_default();
        if focus == "sample" {
            return Self::sample();
        }
        let words = focus.split(',').filter(|word| !word.is_empty());
        Self::Named(words.map(str::to_owned).collect())
    }

    /// Few.
    pub fn sample() -> Self {
        Self::Sample {
            points: BTreeSet::new(),
            actions: BTreeSet::new(),
        }
    }

    fn is_all(&self) -> bool {
        matches!(self, Self::Named(words) if words.is_empty())
    }

    /// Whether there may be some of a call, or of the host.
    fn has_some_of(&self, part: &str) -> bool {
        let Self::Named(words) = self else {
            return true;
        };
        let is_part = |name: &str| name == HOST || Call::ALL.iter().any(|call| call.name() == name);
        let may_have = |words: &String| {
            let first = words.split(' ').next().unwrap_or_default();
            first == part || !is_part(first)
        };
        self.is_all() || words.iter().any(may_have)
    }

    fn has_name(&self, name: &str) -> bool {
        let Self::Named(words) = self else {
            return true;
        };
        let has = |words: &String| format!(" {name} ").contains(&format!(" {words} "));
        self.is_all() || words.iter().any(has)
    }

    fn has_of_host(&self, fault: HostFault) -> bool {
        match self {
            Self::Named(_) => self.has_name(&format!("{HOST} {}", fault.name())),
            Self::Sample { .. } => !fault.is_slow(),
        }
    }

    fn has(&mut self, fault: &Fault) -> bool {
        match self {
            Self::Named(_) => self.has_name(&fault.name()),
            Self::Sample { points, actions } => {
                let is_new_point = points.insert(fault.point.clone());
                let is_new_action = actions.insert((fault.call, fault.action.name()));
                is_new_point || is_new_action
            }
        }
    }
}

/// What faults of the host are called.
const HOST: &str = "host";

/// The faults, each followed by what has to be right.
pub async fn faults(mut wanted: Wanted) -> Result<()> {
    let mut run = Run::start().await?;
    println!("| where | what happens | outcome | time |");
    println!("|---|---|---|---|");
    let mut outcomes = Outcomes::default();
    for call in Call::ALL {
        if !wanted.has_some_of(&call.name()) || !call.is_possible(run.node.kind) {
            continue;
        }
        let reached = trace(&mut run.node, &mut run.pods, call).await?;
        outcomes
            .reached
            .extend(reached.iter().map(|(point, _)| point.clone()));
        for fault in planned(run.node.kind, call, &reached) {
            if !wanted.has(&fault) {
                continue;
            }
            let begun = Instant::now();
            let point = all_points()[&fault.point];
            let (node, pods) = (&mut run.node, &mut run.pods);
            let happened = at(node, pods, call, point, fault.nth, fault.action).await;
            let result = run.settle(happened).await;
            let place = format!("{call:?}: {} {}", fault.point, fault.nth);
            outcomes.add(place, fault.action.name(), begun, result);
        }
    }
    for fault in host::ALL {
        if !wanted.has_of_host(fault) || !fault.is_possible() {
            continue;
        }
        let begun = Instant::now();
        let (node, pods) = (&mut run.node, &mut run.pods);
        let happened = fault.happens(node, pods, &mut run.witness).await;
        let result = run.settle(happened.map(|()| true)).await;
        outcomes.add(HOST.into(), fault.name(), begun, result);
    }
    run.pods.end(&run.node).await?;
    run.node.end(&run.witness.pod).await?;
    close(&run.node, &outcomes, &wanted)
}

/// Each time that a call reaches a point, the daemon is killed there; VMM, agent and file server die the
/// first time; writes fail in both ways.
fn planned(kind: Kind, call: Call, reached: &[(String, usize)]) -> Vec<Fault> {
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
                if has_agent(kind, call, name) {
                    add(1, Action::KillAgent);
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

/// Whether there is an agent that can be killed: in a VM, it is a container that does.
fn has_agent(kind: Kind, call: Call, point: &str) -> bool {
    let runs = has_vm(call, point) && point != "vm-configured";
    runs && (kind == Kind::Fake || !call.has_own_pod())
}

/// The node, and what is there on it whatever goes wrong.
struct Run {
    node: Node,
    pods: Pods,
    witness: Witness,
    /// What is there but for the shared pod and the witness.
    before: Left,
}

impl Run {
    async fn start() -> Result<Self> {
        let node = Node::start().await?;
        node.pull(IMAGE).await?;
        node.pull(STAYS).await?;
        let mut pods = Pods::default();
        // What is there once: a template of disks, the bridge.
        pods.shared(&node).await?;
        pods.end(&node).await?;
        let before = node.left();
        let witness = Witness::start(&node).await?;
        Ok(Self {
            node,
            pods,
            witness,
            before,
        })
    }

    /// Sees to it that all is right again.
    async fn settle(&mut self, happened: Result<bool>) -> Result<bool> {
        self.node.disarm();
        let right = self.is_right(happened).await;
        if let Err(error) = &right {
            let complaints = self.node.complaints();
            println!("{error:#}; the daemon said last:\n    {complaints}");
            // What is lost must not be lost again in the next one.
            self.begin_anew().await.context("begin anew")?;
        }
        right
    }

    async fn is_right(&mut self, happened: Result<bool>) -> Result<bool> {
        let reached = happened?;
        self.witness.look(&self.node).await?;
        self.nothing_left().await?;
        Ok(reached)
    }

    /// With another daemon, no pods but a witness, and what is left now.
    async fn begin_anew(&mut self) -> Result<()> {
        self.node.restart().await?;
        self.pods.forget();
        let is_harmed = self.witness.look(&self.node).await.is_err();
        for pod in self.node.sandboxes().await? {
            if is_harmed || pod.id != self.witness.pod.id {
                let _ = self.node.stop_sandbox(&pod.id).await;
                let _ = self.node.remove_sandbox(&pod.id).await;
            }
        }
        self.before = self.node.left();
        if is_harmed {
            self.witness = Witness::start(&self.node).await?;
        }
        Ok(())
    }

    /// Nothing is left beyond what there is anyway.
    async fn nothing_left(&self) -> Result<()> {
        let deadline = Instant::now() + GONE;
        let shared = self.pods.left();
        loop {
            let mut left = self.node.left().since(&self.before);
            left.retain(|what| !shared.has(what) && !self.witness.left.has(what));
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left: {left:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn close(node: &Node, outcomes: &Outcomes, wanted: &Wanted) -> Result<()> {
    let mut unreached = Vec::new();
    if wanted.is_all() || matches!(wanted, Wanted::Sample { .. }) {
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
    match kind {
        Kind::Fake => point.starts_with("cgroup-") && no_cgroups,
        Kind::Real => point == "vm-stopped",
    }
}
