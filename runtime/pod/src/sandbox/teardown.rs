//! The end of what a sandbox has of the host, once its VM is gone: network, cgroup, files. Each may be
//! repeated.

use std::path::Path;

use hull_base::{
    beneath, blocking,
    faults::{self, Point},
};
use hull_spec::error::PodError;
use hull_vm::rundir::{DataDir, RunDir};

use crate::{node::Node, ports::network_error, record::SandboxRecord};

/// Whether the record of a sandbox tells all that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    All,
    /// The record can't be read: what stands in for it may lack something.
    Part,
}

/// Gives the sandbox's network, cgroup and data back, as much as can be, and notes in the record what is
/// gone.
///
/// # Errors
/// The first that failed.
pub(crate) async fn release(
    node: &Node,
    record: &mut SandboxRecord,
    known: Known,
) -> Result<(), PodError> {
    let mut result = Ok(());
    if let Some(network) = &record.network {
        match node.network.teardown(network).await {
            Ok(()) => {
                record.network = None;
                record.ips.clear();
                record.seen_ips = None;
            }
            Err(error) => result = Err(network_error(error)),
        }
    } else if known == Known::Part {
        let removed = node.network.remove_orphan(record.id.as_str()).await;
        result = removed.map_err(network_error);
    }
    if let Some(cgroup) = &record.cgroup {
        match cgroup.remove().await {
            Ok(()) => record.cgroup = None,
            Err(error) => result = result.and(Err(error)),
        }
    }
    // Nobody can use the disk any more, and it may be large.
    let data = DataDir::of(&node.config, &record.id);
    result.and(remove(data.path()).await)
}

/// Removes a pod's directories.
///
/// # Errors
/// When one of them can't be removed; both are tried.
pub(crate) async fn directories(run: &RunDir, data: &DataDir) -> Result<(), PodError> {
    let (run, data) = (remove(run.path()).await, remove(data.path()).await);
    faults::point(Point::DirectoriesRemoved);
    run.and(data)
}

/// Removes a directory with what is in it, beside the asynchronous tasks: there may be gigabytes.
async fn remove(path: &Path) -> Result<(), PodError> {
    let directory = path.to_owned();
    let removed = blocking(move || beneath::remove_dir(&directory)).await;
    removed.map_err(|e| PodError::internal(format!("remove {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hull_spec::{config::PodsConfig, id::PodId};

    use super::*;

    /// On one thread, as all pods' tasks are when the others are busy.
    #[tokio::test]
    async fn removing_much_stops_no_other_task() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodsConfig::new(dir.path(), dir.path().join("run"), dir.path());
        let pod = PodId::random();
        let (run, data) = (RunDir::of(&config, &pod), DataDir::of(&config, &pod));
        for number in 0..2000 {
            let directory = data.path().join(number.to_string());
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("file"), "x").unwrap();
        }
        let (mut turns, mut ticks) = (0, tokio::time::interval(Duration::from_micros(100)));
        let removal = directories(&run, &data);
        tokio::pin!(removal);
        loop {
            tokio::select! {
                biased;
                removed = &mut removal => break removed.unwrap(),
                _ = ticks.tick() => turns += 1,
            }
        }
        assert!(turns > 0, "nothing else ran meanwhile");
        assert!(!data.path().exists());
        // It may be repeated.
        directories(&run, &data).await.unwrap();
    }
}
