use std::path::PathBuf;

use hull_spec::{
    info::{ContainerState, SandboxState},
    signal::Signal,
    spec::ContainerSpec,
};
use proptest::prelude::*;

use super::*;

const PODS: u8 = 6;
const CONTAINERS: u8 = 9;

/// Ids that begin alike, some of them for long.
fn digits(number: u8) -> String {
    format!(
        "{}{number:x}{}",
        "ab".repeat(usize::from(number % 3)),
        "0".repeat(64)
    )[..64]
        .to_owned()
}

fn pod_id(number: u8) -> PodId {
    PodId::try_from(digits(number)).unwrap()
}

fn container_info(number: u8, pod: u8) -> ContainerInfo {
    ContainerInfo {
        id: ContainerId::try_from(digits(number)).unwrap(),
        pod: pod_id(pod),
        spec: Arc::new(ContainerSpec::default()),
        image_id: format!("sha256:{}", "1".repeat(64)).parse().unwrap(),
        image_ref: String::new(),
        state: ContainerState::Created,
        created_at_ns: 0,
        started_at_ns: 0,
        finished_at_ns: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        log_path: PathBuf::new(),
        stop_signal: Signal::TERM,
        mount_images: BTreeMap::new(),
        user: None,
        resources: None,
    }
}

fn view(pod: u8, phase: Phase, containers: &[u8]) -> Arc<PodView> {
    let sandbox = SandboxInfo {
        id: pod_id(pod),
        spec: Arc::new(SandboxSpec::default()),
        state: SandboxState::Ready,
        message: String::new(),
        created_at_ns: 0,
        ips: Vec::new(),
        vm: None,
        guest: None,
        boot: None,
    };
    let infos = containers.iter().map(|number| container_info(*number, pod));
    Arc::new(PodView {
        phase,
        sandbox,
        containers: infos.map(|info| (info.id.clone(), info)).collect(),
        vm: None,
        agent: None,
    })
}

/// An entry whose sandbox has a name of its own.
fn entry(pod: u8) -> PodEntry {
    let spec = SandboxSpec {
        metadata: SandboxMetadata {
            name: pod.to_string(),
            ..SandboxMetadata::default()
        },
        ..SandboxSpec::default()
    };
    PodEntry {
        id: pod_id(pod),
        spec: Arc::new(spec),
        commands: mpsc::channel(1).0,
        view: watch::Sender::new(view(pod, Phase::Starting, &[])),
        started: watch::Sender::new(None),
        delivered: Delivered::default(),
        permits: Permits::default(),
    }
}

/// What is done to the registry, as pods' tasks, the daemon's start and a take-over do.
#[derive(Debug, Clone)]
enum Step {
    Reserve(u8),
    Publish(u8, Phase, Vec<u8>),
    /// Another entry with the same view.
    Replace(u8),
    Release(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let phase = prop_oneof![Just(Phase::Starting), Just(Phase::Up), Just(Phase::Gone)];
    // A container stays in one pod.
    let publish = (0..PODS, phase, prop::collection::vec(0..CONTAINERS, 0..4)).prop_map(
        |(pod, phase, numbers)| {
            let own = numbers.into_iter().filter(|number| number % PODS == pod);
            Step::Publish(pod, phase, own.collect())
        },
    );
    prop_oneof![
        2 => (0..PODS).prop_map(Step::Reserve),
        4 => publish,
        1 => (0..PODS).prop_map(Step::Replace),
        1 => (0..PODS).prop_map(Step::Release),
    ]
}

/// The ids of `all` that begin with `prefix`, looked at one after another.
fn scan(prefix: &str, all: &[String]) -> Result<String, &'static str> {
    let found: Vec<_> = all.iter().filter(|id| id.starts_with(prefix)).collect();
    match found[..] {
        _ if prefix.is_empty() => Err("not found"),
        [] => Err("not found"),
        [id] => Ok(id.clone()),
        _ => Err("ambiguous"),
    }
}

fn told<T>(result: Result<T, PodError>, id: impl Fn(T) -> String) -> Result<String, &'static str> {
    result.map(id).map_err(|error| match error {
        PodError::NotFound { .. } => "not found",
        PodError::Ambiguous { .. } => "ambiguous",
        _ => "something else",
    })
}

proptest! {
    #[test]
    fn whatever_happens_an_id_leads_to_what_a_scan_of_all_finds(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let registry = Registry::default();
        let mut entries: Vec<PodEntry> = (0..PODS).map(entry).collect();
        let mut reserved = [false; PODS as usize];
        for step in steps {
            match step {
                Step::Reserve(pod) => {
                    let _ = registry.reserve(entries[usize::from(pod)].clone());
                    reserved[usize::from(pod)] = true;
                }
                Step::Publish(pod, phase, containers) => {
                    let to = entries[usize::from(pod)].view.clone();
                    registry.publish(&to, Arc::unwrap_or_clone(view(pod, phase, &containers)));
                }
                Step::Replace(pod) if reserved[usize::from(pod)] => {
                    let commands = mpsc::channel(1).0;
                    let entry = &mut entries[usize::from(pod)];
                    *entry = PodEntry { commands, ..entry.clone() };
                    registry.replace(entry.clone());
                }
                Step::Replace(_) => {}
                Step::Release(pod) => {
                    registry.release(&pod_id(pod));
                    reserved[usize::from(pod)] = false;
                    entries[usize::from(pod)] = entry(pod);
                }
            }
            let views = registry.views("");
            let up = views.iter().filter(|view| view.phase == Phase::Up);
            let pods: Vec<_> = up.map(|view| view.sandbox.id.to_string()).collect();
            let containers: Vec<_> = views
                .iter()
                .flat_map(|view| view.containers.keys().map(ToString::to_string))
                .collect();
            let ids = (0..CONTAINERS.max(PODS)).map(digits);
            for id in ids.chain(["c".into(), String::new()]) {
                for length in [1, 2, 3, 4, 5, 6, 64] {
                    let prefix = &id[..id.len().min(length)];
                    let found = registry.sandbox(prefix);
                    prop_assert_eq!(told(found, |entry| entry.id.to_string()), scan(prefix, &pods));
                    let ids = |views: &[Arc<PodView>]| -> Vec<String> {
                        views.iter().map(|view| view.sandbox.id.to_string()).collect()
                    };
                    let mut expected = ids(&views);
                    expected.retain(|id| id.starts_with(prefix));
                    prop_assert_eq!(ids(&registry.views(prefix)), expected);
                    let found = registry.container(prefix);
                    if let Ok((id, entry)) = &found {
                        prop_assert!(entry.view.borrow().containers.contains_key(id));
                    }
                    let found = told(found, |(id, _)| id.to_string());
                    prop_assert_eq!(found, scan(prefix, &containers));
                }
            }
        }
    }
}
