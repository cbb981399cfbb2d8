//! What this host offers. Each check looks at one thing and says in plain words
//! what is there, or what is missing and what to do.

mod apparmor;
mod assets;
mod cgroup;
mod devices;
mod disk;
mod finding;
mod modules;
mod network;
mod probe;
mod tools;

use std::path::Path;

use crate::config::Settings;

pub(crate) use self::{
    apparmor::policies as apparmor_policies,
    finding::{Finding, HostIncomplete},
    probe::Probe,
};

/// What is checked of the network, which a cluster brings later than the rest.
pub(crate) const OF_NETWORK: [&str; 2] = ["CNI configuration", "CNI plugins"];

/// Runs all checks, in an order in which a person would mend things.
pub(crate) async fn check(settings: &Settings) -> Vec<(&'static str, Finding)> {
    let [configuration, plugins] = OF_NETWORK;
    vec![
        ("user", tools::user()),
        ("kvm device", devices::kvm(Path::new("/dev/kvm"))),
        ("hull-vmm", assets::program(&settings.pods.vmm)),
        ("hull-fs", assets::program(&settings.pods.file_server)),
        ("guest kernel", assets::kernel(&settings.pods.kernel)),
        ("guest root", assets::guest_root(&settings.pods.guest_root)),
        ("microVM", probe::run(&settings.pods.vmm).await),
        ("cgroups", cgroup::check(Path::new("/sys/fs/cgroup"))),
        ("tun device", devices::tun(Path::new("/dev/net/tun"))),
        ("kernel modules", modules::check()),
        (configuration, network::configuration(&settings.network)),
        (plugins, network::plugins(&settings.network)),
        ("mkfs.ext4", tools::program("mkfs.ext4", "e2fsprogs")),
        ("disk", disk::check(&settings.root)),
    ]
}
