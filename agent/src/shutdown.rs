//! The end of the guest.

use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};
use tracing::{error, warn};

use crate::{
    blocking::blocking,
    container::{Containers, cgroup::Cgroup},
    layout::Layout,
    storage::Storages,
};

/// How long containers may take to go.
const LIMIT: Duration = Duration::from_secs(15);
/// Time for the last answer to reach the host.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(50);

/// Ends all containers and brings their data to the disks.
pub(crate) async fn prepare(layout: &Layout, containers: &Containers, storages: &Storages) {
    containers.shutdown(LIMIT).await;
    let pod = Cgroup::at(layout.pod_cgroup());
    if let Err(error) = pod.kill() {
        warn!(%error, "kill what is left in the pod");
    }
    pod.empty().await;
    blocking(nix::unistd::sync).await;
    storages.shutdown().await;
}

/// Stops the machine. Its VMM takes a reset for the end (`reboot=t` makes the
/// kernel cause a triple fault).
pub(crate) fn stop() {
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    error!(%errno, "reset the machine");
}
