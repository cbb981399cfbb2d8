//! For tests of any crate: the programs that tests run as the other side, built as examples.

#![forbid(unsafe_code)]

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The newest build of an example: `NAME` of `cargo build`, `NAME-HASH` of `cargo test`, the latter with
/// `_` for each `-` of the name. The caller is a test, whose own program is <target>/PROFILE/deps/NAME-HASH.
///
/// # Panics
/// There is none, or the caller is no such program.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    let examples = profile_dir().join("examples");
    let of_test = format!("{}-", name.replace('-', "_"));
    let entries = fs::read_dir(&examples).into_iter().flatten().flatten();
    let built = entries.filter_map(|entry| {
        let path = entry.path();
        let file = path.file_name()?.to_str()?;
        let is_program = path.extension().is_none() && (file == name || file.starts_with(&of_test));
        is_program.then_some((entry.metadata().ok()?.modified().ok()?, path))
    });
    match built.max() {
        Some((_, path)) => path,
        None => panic!(
            "no {name} in {}: cargo build --examples",
            examples.display()
        ),
    }
}

/// Where cargo puts what it builds in the test's own profile: <target>/PROFILE.
///
/// # Panics
/// The caller is no program of cargo's.
#[must_use]
pub fn profile_dir() -> PathBuf {
    let test = env::current_exe().unwrap_or_default();
    match test.ancestors().nth(2) {
        Some(dir) => Path::to_owned(dir),
        None => panic!("{} is no test of cargo's", test.display()),
    }
}
