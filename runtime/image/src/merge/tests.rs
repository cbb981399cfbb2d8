use super::*;

fn attributes(mode: u16) -> Attributes {
    Attributes {
        mode,
        ..implied_directory(ROOT).attributes
    }
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    Entry {
        path: path.into(),
        attributes: attributes(0o700),
        kind,
    }
}

fn dir(path: &str) -> Entry {
    entry(path, EntryKind::Directory)
}

fn file(path: &str) -> Entry {
    entry(path, EntryKind::File { size: 1, offset: 0 })
}

fn link(path: &str, target: &str) -> Entry {
    entry(
        path,
        EntryKind::Symlink {
            target: target.into(),
        },
    )
}

fn hardlink(path: &str, target: &str) -> Entry {
    entry(
        path,
        EntryKind::Hardlink {
            target: target.into(),
        },
    )
}

fn gone(path: &str) -> Entry {
    entry(path, EntryKind::Whiteout)
}

fn opaque(path: &str) -> Entry {
    entry(path, EntryKind::Opaque)
}

/// Paths of the merged tree; files with the layer that they are from.
fn merged(layers: Vec<Vec<Entry>>) -> Result<Vec<String>, MergeError> {
    let mut merger = Merger::new(100_000, u64::MAX);
    for layer in layers {
        merger.apply(layer)?;
    }
    let tree = merger.finish();
    let mut paths = Vec::new();
    let mut pending = vec![(String::new(), ROOT)];
    while let Some((path, id)) = pending.pop() {
        match &tree.nodes[id as usize].kind {
            NodeKind::Directory { children, .. } => {
                for (name, child) in &**children {
                    pending.push((format!("{path}/{}", name.escape_ascii()), *child));
                }
                paths.push(format!("{path}/"));
            }
            NodeKind::File { layer, .. } => paths.push(format!("{path}@{layer}")),
            _ => paths.push(path),
        }
    }
    paths.sort();
    Ok(paths)
}

#[test]
fn a_tree_takes_no_more_memory_than_it_may() {
    let layer = |names: &[&str]| names.iter().map(|name| file(name)).collect::<Vec<_>>();
    let entries = layer(&["a/b/c/d", "a/b/c/e", "x/y/z", "a/b/f"]);
    let mut estimate = Estimate::default();
    entries.iter().for_each(|entry| estimate.add(entry));
    Merger::new(100, estimate.memory()).apply(entries).unwrap();
    // What no entry shows: a link that leads to directories which are made for each of its names.
    let deep = "d/".repeat(100);
    let entries = vec![link("l", &deep), file("l/x")];
    let mut estimate = Estimate::default();
    entries.iter().for_each(|entry| estimate.add(entry));
    let merged = Merger::new(1000, estimate.memory()).apply(entries);
    assert!(matches!(merged, Err(MergeError::TooMuchMemory(_))));
}

proptest::proptest! {
    /// Without links, what is estimated is enough for any entries in any order.
    #[test]
    fn estimates_are_enough(
        paths in proptest::collection::vec("[ab](/[ab]{1,2}){0,4}", 1..40),
        kinds in proptest::collection::vec(0u8..5, 40),
    ) {
        let mut merger = Merger::new(10_000, 0);
        for entries in paths.chunks(10) {
            let of_kind = |(path, kind): (&String, &u8)| match kind {
                0 => gone(path),
                1 => opaque(path),
                2 => file(path),
                3 => hardlink(path, "a"),
                _ => dir(path),
            };
            let entries: Vec<_> = entries.iter().zip(&kinds).map(of_kind).collect();
            let mut estimate = Estimate::default();
            entries.iter().for_each(|entry| estimate.add(entry));
            merger.max_memory += estimate.memory();
            if let Err(error) = merger.apply(entries) {
                proptest::prop_assert!(matches!(error, MergeError::Invalid { .. }), "{}", error);
                break;
            }
        }
    }
}

#[test]
fn upper_layers_replace_hide_and_keep() {
    let paths = merged(vec![
        vec![
            file("a/b"),
            file("a/c"),
            file("d/e"),
            file("d/f"),
            file("g"),
            dir("h"),
            file("h/i"),
        ],
        vec![
            file("a/b"),
            gone("a/c"),
            opaque("d"),
            file("d/new"),
            dir("g"),
            file("h"),
        ],
    ]);
    assert_eq!(
        paths.unwrap(),
        ["/", "/a/", "/a/b@1", "/d/", "/d/new@1", "/g/", "/h@1"]
    );
}

#[test]
fn whiteouts_never_hide_their_own_layer() {
    for layer in [
        vec![file("a/x"), gone("a/x"), opaque("a"), gone("a")],
        vec![gone("a"), opaque("a"), gone("a/x"), file("a/x")],
    ] {
        let paths = merged(vec![vec![file("a/x"), file("a/y")], layer]).unwrap();
        assert_eq!(paths, ["/", "/a/", "/a/x@1"]);
    }
    assert_eq!(
        merged(vec![vec![gone("no/such"), opaque("none")]]).unwrap(),
        ["/"]
    );
}

#[test]
fn parents_are_followed_inside_the_image() {
    let paths = merged(vec![
        vec![
            dir("usr/bin"),
            link("bin", "usr/bin"),
            link("abs", "/usr/bin"),
            link("up", "../../../usr/./bin/"),
            link("deep/chain", "../up"),
            link("made", "not/there"),
        ],
        vec![
            file("bin/a"),
            file("abs/b"),
            file("up/c"),
            file("deep/chain/d"),
            file("made/e"),
            gone("bin/a"),
            hardlink("x", "abs/b"),
        ],
    ]);
    assert_eq!(
        paths.unwrap(),
        [
            "/",
            "/abs",
            "/bin",
            "/deep/",
            "/deep/chain",
            "/made",
            "/not/",
            "/not/there/",
            "/not/there/e@1",
            "/up",
            "/usr/",
            "/usr/bin/",
            "/usr/bin/a@1",
            "/usr/bin/b@1",
            "/usr/bin/c@1",
            "/usr/bin/d@1",
            "/x@1"
        ]
    );
}

#[test]
fn a_directory_keeps_its_children_and_replaces_a_link() {
    let mut again = dir("d");
    again.attributes.mode = 0o755;
    again.attributes.xattrs = [(b"user.b".to_vec(), vec![2])].into();
    let mut before = dir("d");
    before.attributes.xattrs = [(b"user.a".to_vec(), vec![1])].into();
    let mut merger = Merger::new(100, u64::MAX);
    merger
        .apply(vec![before, file("d/x"), link("l", "d")])
        .unwrap();
    merger.apply(vec![again, dir("l")]).unwrap();
    let tree = merger.finish();
    let NodeKind::Directory { children, .. } = &tree.nodes[0].kind else {
        panic!()
    };
    let d = &tree.nodes[children[&b"d"[..]] as usize];
    assert_eq!(d.attributes.mode, 0o755);
    assert_eq!(d.attributes.xattrs.len(), 2);
    assert!(matches!(&d.kind, NodeKind::Directory { children, .. } if children.len() == 1));
    let l = &tree.nodes[children[&b"l"[..]] as usize];
    assert!(matches!(&l.kind, NodeKind::Directory { children, .. } if children.is_empty()));
}

#[test]
fn tricks_are_refused_with_the_path() {
    for (layer, expected) in [
        (
            vec![file("a"), file("a/b")],
            "parent that is not a directory",
        ),
        (vec![hardlink("a", "none")], "hard link to nothing"),
        (
            vec![dir("d"), hardlink("a", "d")],
            "hard link to a directory",
        ),
        (vec![hardlink("a", "")], "hard link to a directory"),
        (
            vec![link("a", "b"), link("b", "a"), file("a/x")],
            "too many symbolic links",
        ),
        (
            vec![link("a", "a/a"), file("a/x")],
            "too many symbolic links",
        ),
    ] {
        let error = merged(vec![layer]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = merged(vec![(0..100_001).map(|i| file(&i.to_string())).collect()]).unwrap_err();
    assert!(matches!(error, MergeError::TooManyEntries(100_000)));
}

#[test]
fn a_very_deep_tree_needs_no_deep_stack() {
    let mut layer = Vec::new();
    let mut base = String::new();
    for number in 0..500 {
        let step = format!("{base}{}", "d/".repeat(100));
        layer.push(file(&format!("{step}f")));
        layer.push(link(&format!("l{number}"), &step));
        base = format!("l{number}/");
    }
    // Each link goes on from the one before, so following the last takes too many of them.
    let error = merged(vec![layer]).unwrap_err().to_string();
    assert!(error.contains("too many symbolic links"), "{error}");
}

/// Entries of the tree that a process makes whose memory the next test looks at.
const ENTRIES: &str = "HULL_TEST_MERGE_ENTRIES";

/// Not a test of its own: that process. It says how much memory it had at most.
#[test]
fn merging_process() {
    let Ok(count) = std::env::var(ENTRIES) else {
        return;
    };
    let count: u32 = count.parse().unwrap();
    let mut merger = Merger::new(u64::MAX, u64::MAX);
    for number in 0..count {
        let path = format!("{:06}/{number:06}", number / 1000);
        merger
            .add(entry(&path, EntryKind::File { size: 0, offset: 0 }))
            .unwrap();
    }
    crate::erofs::write(io::sink(), &merger.finish(), &[], [0; 16]).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    println!("PEAK {}", peak.unwrap().trim());
}

#[test]
fn a_file_without_contents_takes_little_memory() {
    // More, for who wants to see it.
    let many = std::env::var("HULL_TEST_MEMORY_ENTRIES").map_or(60_000, |n| n.parse().unwrap());
    let peak = |count: u64| -> u64 {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "merge::tests::merging_process", "--nocapture"])
            .env(ENTRIES, count.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let peak = text.lines().find_map(|line| line.split_once("PEAK "));
        let peak = peak.unwrap_or_else(|| panic!("{text}")).1;
        peak.trim_end_matches(" kB").parse().unwrap()
    };
    let (few, all) = (peak(1000), peak(many));
    let each = (all - few) * 1024 / many;
    println!("{many} files: {all} KiB at most, {each} bytes for each");
    assert!(each < 220, "{each} bytes for each of {many} files");
}
