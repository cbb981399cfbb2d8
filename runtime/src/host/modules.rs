//! Modules of the host's kernel. They are loaded when they are used; here it matters that they are there.

use std::{fs, path::Path};

use nix::sys::utsname::uname;

use super::finding::Finding;

/// What leads frames between a pod's interface and its tap, and makes taps.
const NEEDED: [&str; 4] = ["tun", "sch_ingress", "cls_u32", "act_mirred"];

/// Whether the running kernel has what networks take.
pub(super) fn check() -> Finding {
    let release = uname()
        .map(|name| name.release().to_owned())
        .unwrap_or_default();
    of(
        Path::new("/sys/module"),
        &Path::new("/lib/modules").join(release),
    )
}

fn of(loaded: &Path, directory: &Path) -> Finding {
    let read = |name| fs::read_to_string(directory.join(name)).ok();
    let (Some(modules), Some(built_in)) = (read("modules.dep"), read("modules.builtin")) else {
        return Finding::Good(format!("not known, {} is not there", directory.display()));
    };
    let listed = |name: &str| {
        let file = format!("/{name}.ko");
        let mut lines = modules.lines().chain(built_in.lines());
        lines.any(|line| {
            line.split(':')
                .next()
                .is_some_and(|path| path.contains(&file))
        })
    };
    let missing = NEEDED
        .into_iter()
        .find(|name| !loaded.join(name).exists() && !listed(name));
    match missing {
        None => Finding::Good(NEEDED.join(", ")),
        Some(name) => Finding::bad(
            format!("the kernel has no module {name}"),
            "boot a kernel that has it (Debian: `apt install linux-image-amd64`, also for clouds)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_loaded_built_in_or_to_be_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let (loaded, modules) = (dir.path().join("sys"), dir.path().join("lib"));
        assert!(of(&loaded, &modules).is_good());
        fs::create_dir_all(loaded.join("tun")).unwrap();
        fs::create_dir(&modules).unwrap();
        fs::write(
            modules.join("modules.builtin"),
            "kernel/net/sched/sch_ingress.ko\n",
        )
        .unwrap();
        let dep = "kernel/net/sched/cls_u32.ko.xz:\nkernel/x.ko: kernel/net/sched/act_mirred.ko\n";
        fs::write(modules.join("modules.dep"), dep).unwrap();
        let Finding::Bad { detail, .. } = of(&loaded, &modules) else {
            panic!("what only another module needs is not there");
        };
        assert_eq!(detail, "the kernel has no module act_mirred");
        fs::write(
            modules.join("modules.dep"),
            "a/cls_u32.ko:\na/act_mirred.ko.zst: b\n",
        )
        .unwrap();
        assert!(of(&loaded, &modules).is_good());
    }
}
