//! Rights, and programs that Hull calls.

use std::{env, os::unix::fs::PermissionsExt, path::Path};

use nix::unistd::Uid;

use super::finding::Finding;

/// Whether this is root.
pub(super) fn user() -> Finding {
    let user = Uid::effective();
    if user.is_root() {
        Finding::Good("root".to_owned())
    } else {
        Finding::bad(
            format!("uid {user}"),
            "run as root: network namespaces, taps and mounts need it",
        )
    }
}

/// Whether a program is in PATH, or where Debian has programs for root.
pub(super) fn program(name: &str, package: &str) -> Finding {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(Into::into);
    for directory in env::split_paths(&path).chain(sbin) {
        let file = directory.join(name);
        if is_program(&file) {
            return Finding::Good(file.display().to_string());
        }
    }
    Finding::bad(
        format!("there is no {name}"),
        format!("`apt install {package}`"),
    )
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found() {
        assert!(program("sh", "dash").is_good());
        let Finding::Bad { advice, .. } = program("no-such-program", "some-package") else {
            panic!("found a program that isn't there");
        };
        assert_eq!(advice, "`apt install some-package`");
    }
}
