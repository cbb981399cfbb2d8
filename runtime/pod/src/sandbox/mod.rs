//! What a sandbox has of the host: how it comes, and how it goes.

use std::{fs, io, os::unix::fs::DirBuilderExt, path::Path, time::Duration};

use hull_spec::config::PodsConfig;

pub(crate) mod bringup;
pub(crate) mod restore;
pub(crate) mod teardown;
mod template;

/// The guest's kernel command line, added to the VMM's own.
///
/// Memory that is added is for what can be moved, so that it can be taken away, up to three times as much as the rest.
const CMDLINE: &str =
    "root=/dev/vda rootfstype=erofs ro init=/init memory_hotplug.online_policy=auto-movable";
/// Added where the host has AppArmor on: so has the guest. The module's denials are kernel messages of the guest.
const WITH_APPARMOR: &str = "lsm=landlock,apparmor";
/// Added elsewhere: nothing of the audit subsystem, which is there for AppArmor, is started.
const WITHOUT_APPARMOR: &str = "audit=0";
/// How long a VMM process may take to listen.
const SPAWN: Duration = Duration::from_secs(30);

fn cmdline(config: &PodsConfig) -> String {
    let apparmor = match config.apparmor {
        Some(_) => WITH_APPARMOR,
        None => WITHOUT_APPARMOR,
    };
    format!("{CMDLINE} {apparmor}")
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}
