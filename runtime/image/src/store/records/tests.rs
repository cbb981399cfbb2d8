use std::cell::Cell;

use super::*;

thread_local! {
    /// Image records that were parsed in this thread.
    pub(super) static PARSED: Cell<usize> = const { Cell::new(0) };
}

fn record(text: &str, configuration: &str) -> ImageRecord {
    let id = ImageId::try_from(format!("sha256:{}", text.repeat(64))).unwrap();
    ImageRecord {
        manifest_digest: Digest::try_from(id.to_string()).unwrap(),
        id,
        manifest: "{}".into(),
        configuration: configuration.into(),
        layers: Vec::new(),
        disk: Vec::new(),
        size: 1,
        pinned: false,
        removed: false,
    }
}

fn numbered(number: usize) -> ImageRecord {
    let digest = Digest::of(&number.to_le_bytes());
    ImageRecord {
        id: digest.to_string().try_into().unwrap(),
        manifest_digest: digest.clone(),
        layers: vec![digest],
        ..record("a", r#"{"rootfs":{}}"#)
    }
}

#[test]
fn an_image_that_cannot_be_read_is_forgotten_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("images.redb");
    let (records, lost) = Records::open(&path).unwrap();
    assert!(lost.is_empty());
    let configuration = r#"{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":[]}}"#;
    for (id, name, text) in [("a", "x/a:1", configuration), ("b", "x/b:1", "{")] {
        let record = record(id, text);
        records.put_image(&record, &[name.to_owned()]).unwrap();
    }
    let broken = record("c", configuration).id;
    let put = records.write("break a record", |tables| {
        tables.images.insert(broken.as_str(), b"{".as_slice())?;
        tables.names.insert("x/c:1", broken.as_str())?;
        Ok(())
    });
    put.unwrap();
    drop(records);
    let (records, lost) = Records::open(&path).unwrap();
    assert_eq!(lost.len(), 2, "{lost:?}");
    let names: Vec<_> = records.describe_all().unwrap();
    assert_eq!(names.len(), 1);
    assert_eq!(names[0].repo_tags, ["x/a:1"]);
    for gone in ["x/b:1", "x/c:1"] {
        assert_eq!(records.find(gone).unwrap(), None);
    }
}

#[test]
fn records_of_another_form_are_kept_beside_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("images.redb");
    let (records, _) = Records::open(&path).unwrap();
    let other = records.store.with(|database| {
        let transaction = database.begin_write()?;
        transaction.open_table(META)?.insert("format", FORMAT + 1)?;
        Ok(transaction.commit()?)
    });
    other.unwrap();
    drop(records);
    let (records, lost) = Records::open(&path).unwrap();
    assert!(lost[0].contains("form 2"), "{lost:?}");
    assert!(records.describe_all().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

fn parsed<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = PARSED.get();
    let value = work();
    (PARSED.get() - before, value)
}

#[test]
fn sources_go_with_their_layer() {
    let directory = tempfile::tempdir().unwrap();
    let (records, _) = Records::open(&directory.path().join("images.redb")).unwrap();
    let [one, two, blob] = [1, 2, 3].map(|number: u8| Digest::of(&[number]));
    for layer in [&one, &two] {
        records.add_source(layer, "https://a/v2", &blob).unwrap();
    }
    assert!(records.has_source(&one, "https://a/v2", &blob).unwrap());
    assert!(!records.has_source(&one, "https://b/v2", &blob).unwrap());
    assert!(!records.has_source(&one, "https://a/v2", &two).unwrap());
    let gone = HashSet::from([one.to_string()]);
    records.forget_sources(&gone).unwrap();
    assert!(!records.has_source(&one, "https://a/v2", &blob).unwrap());
    assert!(records.has_source(&two, "https://a/v2", &blob).unwrap());
}

#[test]
fn one_image_is_found_without_a_look_at_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("images.redb");
    let (records, _) = Records::open(&path).unwrap();
    for number in 0..100 {
        let record = numbered(number);
        let names = [format!("a.b/c:{number}"), format!("a.b/c@{}", record.id)];
        records.put_image(&record, &names).unwrap();
        records.lease(&record.id, "pod").unwrap();
        records.lease(&record.id, &number.to_string()).unwrap();
    }
    let check = |records: &Records| {
        let id = numbered(7).id;
        for wanted in ["a.b/c:7", id.as_str(), &id.as_str()[..20]] {
            let (count, image) = parsed(|| records.describe_named(wanted).unwrap().unwrap());
            assert!(count <= 3, "{count} records for {wanted}");
            assert_eq!((&image.id, image.leases), (&id, 2));
            assert_eq!(image.repo_tags, ["a.b/c:7"]);
            assert_eq!(image.repo_digests, [format!("a.b/c@{id}")]);
        }
        assert_eq!(records.describe_named("a.b/c:100").unwrap(), None);
    };
    check(&records);
    drop(records);
    let (records, _) = Records::open(&path).unwrap();
    check(&records);

    // A name moves on, an image goes, an owner ends.
    records
        .put_image(&numbered(8), &["a.b/c:7".to_owned()])
        .unwrap();
    let seventh = records.describe(&numbered(7).id).unwrap().unwrap();
    assert!(seventh.repo_tags.is_empty());
    let tags = records
        .describe_named("a.b/c:7")
        .unwrap()
        .unwrap()
        .repo_tags;
    assert_eq!(tags, ["a.b/c:7", "a.b/c:8"]);
    records.remove_image(&numbered(8).id).unwrap();
    assert_eq!(records.describe_named("a.b/c:7").unwrap(), None);
    assert_eq!(records.describe_named("a.b/c:8").unwrap(), None);
    let (count, freed) = parsed(|| records.release("8").unwrap());
    assert!(!freed && count == 1);
    assert!(records.release("pod").unwrap());
    assert_eq!(records.describe(&numbered(8).id).unwrap(), None);
    let ninth = records.describe(&numbered(9).id).unwrap().unwrap();
    assert_eq!(ninth.leases, 1);
}
