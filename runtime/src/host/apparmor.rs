//! AppArmor of this host's kernel.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Whether the module is on, by the kernel: `Y`, or no file where it was not even started.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const POLICIES: &str = "/sys/kernel/security/apparmor";

/// Where the kernel tells of its policy; none: AppArmor is off, which it is until the next boot.
pub(crate) fn policies() -> Option<PathBuf> {
    is_on(Path::new(ENABLED)).then(|| POLICIES.into())
}

fn is_on(enabled: &Path) -> bool {
    fs::read(enabled).is_ok_and(|text| text.starts_with(b"Y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_on_where_the_kernel_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("enabled");
        assert!(!is_on(&file));
        for (text, on) in [("Y\n", true), ("N\n", false), ("", false)] {
            fs::write(&file, text).unwrap();
            assert_eq!(is_on(&file), on);
        }
    }
}
