//! Fuzz targets: what CNI plugins answer, and what configures them. `make fuzz` runs them (tests/fuzz), and
//! the test below over kept inputs.

use serde_json::Value;

use crate::cni::{NetworkList, conf, result, version::SpecVersion};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[("cni-conf", configuration), ("cni-result", answer)];

/// What ADD answers, in the version that the first byte says: what is passed on is a result of that version.
pub fn answer(input: &[u8]) {
    let Some((&version, output)) = input.split_first() else {
        return;
    };
    let version = SpecVersion::ALL[usize::from(version) % SpecVersion::ALL.len()];
    match result::parse("bridge", version, output) {
        Err(error) => assert!(error.to_string().len() <= 4096, "{error}"),
        Ok((value, result)) => {
            assert_eq!(value["cniVersion"], version.as_str());
            let again = serde_json::to_vec(&value).expect("JSON");
            let (same, as_before) = result::parse("bridge", version, &again).expect("a result");
            assert_eq!((same, as_before), (value, result));
        }
    }
}

/// A network's configuration: its plugins' names are those of programs, and what is kept of it is read again.
pub fn configuration(input: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(input) else {
        return;
    };
    let Ok(list) = conf::parse(&value) else {
        return;
    };
    assert!(!list.name.is_empty() && !list.name.contains(['/', '\0']));
    for plugin in &list.plugins {
        let name = plugin.kind.as_str();
        assert!(
            !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']),
            "{name:?}"
        );
    }
    assert!(list.versions.is_sorted());
    let kept = serde_json::to_vec(&list).expect("JSON");
    let again: NetworkList = serde_json::from_slice(&kept).expect("a list");
    assert_eq!(again, list);
}

#[test]
fn what_plugins_and_their_files_say_does_no_harm() {
    hull_corpus::replay(TARGETS);
}
