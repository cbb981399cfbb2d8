//! What is written is read again, and what can't be read stops nothing.

use super::*;
use crate::lifecycle::container::Reason;

fn sandbox() -> SandboxRecord {
    SandboxRecord {
        user: 0,
        id: PodId::try_from("a".repeat(64)).unwrap(),
        spec: Arc::new(SandboxSpec::default()),
        state: sandbox::State::Ready,
        message: String::new(),
        created_at_ns: 5,
        network: None,
        ips: vec!["10.88.0.5".parse().unwrap()],
        seen_ips: None,
        vm: None,
        cgroup: None,
        guest: None,
        resources: None,
        overhead: None,
        checkpoint: None,
    }
}

fn image(digit: &str) -> ImageId {
    format!("sha256:{}", digit.repeat(64)).parse().unwrap()
}

fn container() -> ContainerRecord {
    ContainerRecord {
        id: ContainerId::try_from("b".repeat(64)).unwrap(),
        guest_id: None,
        pod: sandbox().id,
        spec: Arc::new(ContainerSpec::default()),
        image_id: image("0"),
        image_ref: "x".into(),
        state: RecordedState::Exited(Exit {
            code: 137,
            reason: Reason::OomKilled,
            message: String::new(),
            at_ns: 9,
        }),
        created_at_ns: 6,
        started_at_ns: 7,
        image_slot: Some(5),
        volumes: Vec::new(),
        locals: Vec::new(),
        devices: Vec::new(),
        log_path: None,
        stop_signal: Signal::TERM,
        stopping: None,
        user: None,
        resources: None,
    }
}

#[tokio::test]
async fn records_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hull.redb");
    let open = || Records::open(&path, &dir.path().join("records"));
    let (records, _) = open().unwrap();
    records.put_sandbox(&sandbox()).await.unwrap();
    let container = ContainerRecord {
        volumes: vec![VolumeRecord {
            mount: 1,
            image_id: image("5"),
            slot: Some(6),
        }],
        locals: vec![LocalRecord {
            mount: 2,
            directory: "/k".into(),
            storage: "volume-k".into(),
            slot: Some(8),
        }],
        devices: vec![DeviceRecord {
            storage: "device-0".into(),
            slot: 7,
        }],
        ..container()
    };
    records.put_container(&container).await.unwrap();
    assert!(matches!(
        open().map_err(PodError::from),
        Err(PodError::FailedPrecondition { .. })
    ));
    drop(records);

    let (records, broken) = open().unwrap();
    assert_eq!(broken, None);
    let expected = Loaded {
        sandboxes: vec![sandbox()],
        containers: vec![container.clone()],
        ..Loaded::default()
    };
    assert_eq!(records.load().unwrap(), expected);
    let containers = vec![container.id];
    records
        .delete_sandbox(&sandbox().id, containers)
        .await
        .unwrap();
    assert_eq!(records.load().unwrap(), Loaded::default());
}

#[tokio::test]
async fn a_lost_store_comes_back_from_the_copies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hull.redb");
    let open = || Records::open(&path, &dir.path().join("records")).unwrap();
    let (records, _) = open();
    records.put_sandbox(&sandbox()).await.unwrap();
    records.put_container(&container()).await.unwrap();
    drop(records);
    for broken in [&b"garbage"[..], b""] {
        std::fs::write(&path, broken).unwrap();
        let (records, told) = open();
        assert!(told.is_some());
        let loaded = records.load().unwrap();
        assert_eq!(loaded.sandboxes, [sandbox()]);
        assert_eq!(loaded.containers, [container()]);
        assert_eq!(loaded.faults.len(), 1);
        // They are in the store again.
        assert!(records.load().unwrap().faults.is_empty());
    }
    let (records, _) = open();
    records.delete_container(&container().id).await.unwrap();
    records.delete_sandbox(&sandbox().id, vec![]).await.unwrap();
    drop(records);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(open().0.load().unwrap(), Loaded::default());
}

#[tokio::test]
async fn a_copy_of_a_deleted_record_does_not_come_back_and_no_unfinished_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copies) = (dir.path().join("hull.redb"), dir.path().join("records"));
    let open = || Records::open(&path, &copies).unwrap().0;
    let id = sandbox().id.to_string();
    let records = open();
    records.put_sandbox(&sandbox()).await.unwrap();
    let copy = Copies::open(copies.clone()).unwrap();
    let bytes = copy.get(Kind::Sandbox, &id).unwrap();
    records.delete_sandbox(&sandbox().id, vec![]).await.unwrap();
    drop(records);
    // The daemon was killed before it removed the copy, or while it wrote another.
    copy.put(Kind::Sandbox, &id, &bytes);
    std::fs::write(copies.join("container-0.new"), "half").unwrap();
    assert_eq!(open().load().unwrap(), Loaded::default());
    assert_eq!(std::fs::read_dir(&copies).unwrap().count(), 0);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_stops_nothing_and_is_not_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hull.redb");
    let (records, _) = Records::open(&path, &dir.path().join("records")).unwrap();
    let id = sandbox().id;
    let copies = || Copies::open(dir.path().join("records")).unwrap();
    let mut bytes = encode(id.as_str(), &sandbox()).unwrap().1;
    let put = |sandbox_bytes: &[u8], container_bytes: &[u8]| {
        let change = |sandboxes: &mut Table<'_>, containers: &mut Table<'_>| {
            sandboxes.insert(id.as_str(), sandbox_bytes)?;
            containers.insert(container().id.as_str(), container_bytes)?;
            Ok(())
        };
        records
            .write(Point::SandboxRecorded, "break records", change)
            .unwrap();
    };

    // Its copy is good.
    copies().put(Kind::Sandbox, id.as_str(), &bytes);
    put(b"{", br#"{"version":9,"pod":"x"}"#);
    let loaded = records.load().unwrap();
    assert_eq!(loaded.sandboxes, [sandbox()]);
    assert!(loaded.unread.is_empty());
    assert_eq!(loaded.unread_containers, [(container().id, None)]);
    assert_eq!(loaded.faults.len(), 2, "{:?}", loaded.faults);

    // It is of a later version.
    copies().remove(Kind::Sandbox, id.as_str());
    let text = String::from_utf8(bytes).unwrap();
    bytes = text
        .replacen("\"version\":1", "\"version\":2", 1)
        .into_bytes();
    let with_pod = format!(r#"{{"version":2,"pod":"{id}"}}"#);
    put(&bytes, with_pod.as_bytes());
    let loaded = records.load().unwrap();
    let stand_in = &loaded.sandboxes[0];
    assert_eq!(
        (&stand_in.id, stand_in.state),
        (&id, sandbox::State::Broken)
    );
    assert_eq!(stand_in.spec, sandbox().spec);
    assert_eq!(loaded.unread, HashSet::from([id.clone()]));
    let expected = [(container().id, Some(id.clone()))];
    assert_eq!(loaded.unread_containers, expected);
    // Whoever can read it will find it.
    let (raw, _) = records.raw().unwrap();
    assert_eq!(raw, [(id.to_string(), bytes)]);

    // It is nothing at all, and what is wrong does not tell what is in it.
    copies().remove(Kind::Sandbox, id.as_str());
    put(br#"{"version":"s3cret"}"#, b"s3cret");
    let loaded = records.load().unwrap();
    assert_eq!(loaded.sandboxes[0].spec.metadata.name, id.as_str());
    assert!(!format!("{:?}", loaded.faults).contains("s3cret"));
}

/// Fails when the form on disk changes: give new fields a default, or raise the version.
#[test]
fn the_form_on_disk_is_this() {
    let old = br#"{"version":1,
        "id":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "pod":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "spec":{},"image_id":"sha256:0000000000000000000000000000000000000000000000000000000000000000","image_ref":"x",
        "state":{"exited":{"code":137,"reason":"oom_killed","message":"","at_ns":9}},
        "created_at_ns":6,"started_at_ns":7,"image_slot":5,"stop_signal":15}"#;
    let record: ContainerRecord = decode(old).unwrap();
    assert_eq!(record, container());

    let old = br#"{"version":1,
        "id":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "spec":{},"state":"ready","created_at_ns":5,"ips":["10.88.0.5"]}"#;
    let record: SandboxRecord = decode(old).unwrap();
    assert_eq!(record, sandbox());
}

#[test]
fn a_grace_goes_on_where_it_was() {
    let stopping = Stopping {
        at_ns: 1_000_000_000,
        grace_ms: 5000,
    };
    assert_eq!(stopping.left(3_000_000_000), Duration::from_secs(3));
    assert_eq!(stopping.left(30_000_000_000), Duration::ZERO);
    assert_eq!(stopping.left(0), Duration::from_secs(5));
}

#[test]
fn another_version_is_not_misread() {
    let result: Result<SandboxRecord, _> = decode(br#"{"version":2}"#);
    assert_eq!(result, Err(Unreadable::Version(2)));
}
