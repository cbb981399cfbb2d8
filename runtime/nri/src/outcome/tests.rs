use hull_proto_nri::{
    Hook, Hooks, KeyValue, LinuxContainerUpdate, LinuxDevice, LinuxMemory, LinuxResources, Mount,
    OptionalInt, OptionalInt64, POSIXRlimit,
};

use super::*;

fn variables(of: &[(&str, &str)]) -> ContainerAdjustment {
    let variable = |(key, value): &(&str, &str)| KeyValue {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
        ..KeyValue::default()
    };
    ContainerAdjustment {
        env: of.iter().map(variable).collect(),
        ..ContainerAdjustment::default()
    }
}

fn container() -> Container {
    Container {
        id: "c".into(),
        env: vec!["A=1".into(), "PATH=/bin".into()],
        ..Container::default()
    }
}

fn memory(limit: i64) -> LinuxResources {
    let limit = OptionalInt64 {
        value: limit,
        ..OptionalInt64::default()
    };
    let memory = LinuxMemory {
        limit: Some(limit).into(),
        ..LinuxMemory::default()
    };
    LinuxResources {
        memory: Some(memory).into(),
        ..LinuxResources::default()
    }
}

fn update(container: &str, limit: i64, ignore_failure: bool) -> ContainerUpdate {
    let linux = LinuxContainerUpdate {
        resources: Some(memory(limit)).into(),
        ..LinuxContainerUpdate::default()
    };
    ContainerUpdate {
        container_id: container.into(),
        linux: Some(linux).into(),
        ignore_failure,
        ..ContainerUpdate::default()
    }
}

#[test]
fn the_next_plugin_sees_what_the_one_before_changed() {
    let (mut all, mut told) = (Outcome::default(), container());
    all.adjust("10-a", variables(&[("A", "2"), ("B", "3")]), &mut told)
        .unwrap();
    assert_eq!(told.env, ["PATH=/bin", "A=2", "B=3"]);
    all.adjust("20-b", variables(&[("C", "4"), ("-PATH", "")]), &mut told)
        .unwrap();
    assert_eq!(told.env, ["A=2", "B=3", "C=4"]);
    let env = all.adjust.env.iter().map(|it| it.key.as_str());
    assert_eq!(env.collect::<Vec<_>>(), ["A", "B", "C", "-PATH"]);
}

#[test]
fn two_plugins_can_not_set_the_same_unless_one_takes_it_from_the_other() {
    let (mut all, mut told) = (Outcome::default(), container());
    all.adjust("10-a", variables(&[("A", "2")]), &mut told)
        .unwrap();
    // Its own.
    all.adjust("10-a", variables(&[("A", "3")]), &mut told)
        .unwrap();
    let refused = all.adjust("20-b", variables(&[("A", "4")]), &mut told);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "Env A: plugin 10-a sets it too"
    );
    let takes = variables(&[("-A", ""), ("A", "5")]);
    all.adjust("20-b", takes, &mut told).unwrap();
    assert_eq!(told.env, ["PATH=/bin", "A=5"]);
    assert_eq!(all.adjust.env.len(), 1);
    let owners = all.owners();
    let env = &owners.owners["c"].compound[&(Field::Env as i32)];
    assert_eq!(env.owners["A"], "20-b");
}

#[test]
fn each_kind_of_part_has_one_owner() {
    let text = |it: &str| it.to_owned();
    let mount = Mount {
        destination: text("/m"),
        ..Mount::default()
    };
    let limit = POSIXRlimit {
        type_: text("RLIMIT_CPU"),
        ..POSIXRlimit::default()
    };
    let linux = |change: &dyn Fn(&mut LinuxContainerAdjustment)| {
        let mut asked = ContainerAdjustment::default();
        change(asked.linux.mut_or_insert_default());
        asked
    };
    let asked = [
        ContainerAdjustment {
            annotations: [(text("k"), text("v"))].into(),
            ..ContainerAdjustment::default()
        },
        ContainerAdjustment {
            mounts: vec![mount],
            ..ContainerAdjustment::default()
        },
        ContainerAdjustment {
            args: vec![text("true")],
            ..ContainerAdjustment::default()
        },
        ContainerAdjustment {
            rlimits: vec![limit],
            ..ContainerAdjustment::default()
        },
        linux(&|linux| linux.resources = Some(memory(5)).into()),
        linux(&|linux| linux.oom_score_adj = Some(OptionalInt::default()).into()),
    ];
    for asked in asked {
        let (mut all, mut told) = (Outcome::default(), container());
        all.adjust("10-a", asked.clone(), &mut told).unwrap();
        let refused = all.adjust("20-b", asked.clone(), &mut told);
        assert!(refused.is_err(), "{asked:?}");
    }
    // A word that overrides.
    let args = |words: &[&str]| ContainerAdjustment {
        args: words.iter().map(|it| text(it)).collect(),
        ..ContainerAdjustment::default()
    };
    let (mut all, mut told) = (Outcome::default(), container());
    all.adjust("10-a", args(&["a"]), &mut told).unwrap();
    all.adjust("20-b", args(&["", "b"]), &mut told).unwrap();
    assert_eq!(
        (told.args.as_slice(), all.adjust.args),
        (&[text("b")][..], vec![text("b")])
    );
}

#[test]
fn what_a_vm_does_not_have_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut ContainerAdjustment)| {
        let mut asked = ContainerAdjustment::default();
        change(&mut asked);
        let refused = Outcome::default().adjust("10-a", asked, &mut container());
        refused.unwrap_err().field
    };
    assert_eq!(
        refused(&|it| it.hooks = Some(Hooks {
            poststop: vec![Hook::default()],
            ..Hooks::default()
        })
        .into()),
        "hooks"
    );
    assert_eq!(
        refused(&|it| it.CDI_devices.push(Default::default())),
        "CDI_devices"
    );
    let linux = |change: &dyn Fn(&mut LinuxContainerAdjustment)| {
        refused(&|it| change(it.linux.mut_or_insert_default()))
    };
    assert_eq!(
        linux(&|it| it.devices.push(LinuxDevice::default())),
        "linux.devices"
    );
    assert_eq!(
        linux(&|it| it.cgroups_path = "/x".into()),
        "linux.cgroups_path"
    );
    assert_eq!(
        linux(&|it| it.namespaces.push(Default::default())),
        "linux.namespaces"
    );
    assert_eq!(
        linux(&|it| it.rdt = Some(Default::default()).into()),
        "linux.rdt"
    );
    // What stubs send when nothing is asked for.
    let empty = ContainerAdjustment {
        hooks: Some(Hooks::default()).into(),
        linux: Some(Default::default()).into(),
        ..ContainerAdjustment::default()
    };
    Outcome::default()
        .adjust("10-a", empty, &mut container())
        .unwrap();
}

#[test]
fn limits_of_memory_leave_no_swap_and_are_told_to_the_next() {
    let (mut all, mut told) = (Outcome::default(), container());
    let mut asked = ContainerAdjustment::default();
    asked.linux.mut_or_insert_default().resources = Some(memory(7)).into();
    all.adjust("10-a", asked, &mut told).unwrap();
    assert_eq!(all.limits.memory_swap_limit_bytes, 7);
    assert_eq!(told.linux.resources.memory.limit.value, 7);
}

#[test]
fn updates_of_one_container_are_one_and_conflicts_may_be_ignored() {
    let mut all = Outcome::default();
    all.update("10-a", vec![update("x", 5, true)], Some("c"), None)
        .unwrap();
    let refused = all.update("20-b", vec![update("x", 6, false)], Some("c"), None);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "MemLimit: plugin 10-a sets it too"
    );
    all.update(
        "20-b",
        vec![update("x", 6, true), update("y", 8, false)],
        Some("c"),
        None,
    )
    .unwrap();
    let told: Vec<_> = all
        .updates
        .iter()
        .map(|it| {
            (
                it.container.as_str(),
                it.limits.memory_limit_bytes,
                it.ignore_failure,
            )
        })
        .collect();
    assert_eq!(told, [("x", 5, true), ("y", 8, false)]);
    assert!(
        all.update("30-d", vec![update("c", 1, true)], Some("c"), None)
            .is_err()
    );
    let mut limits = Resources::default();
    all.update(
        "30-d",
        vec![update("z", 9, false)],
        None,
        Some(("z", &mut limits)),
    )
    .unwrap();
    assert_eq!((limits.memory_limit_bytes, all.updates.len()), (9, 2));
}
