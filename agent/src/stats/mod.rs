//! What containers, the pod and its disks use.
//!
//! Read in this order: [`cgroup`] (most numbers), [`process`] (what only /proc
//! tells), [`processes`] (which there are), [`pressure`] and [`io`] (files with a form of their own), [`network`],
//! [`disk`] (writable layers, which cost a walk and are measured beside the
//! requests).

mod cgroup;
mod disk;
mod io;
mod network;
mod pressure;
mod process;
mod processes;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use hull_proto_agent::agent::{ContainerStats, StatsResponse};
use protobuf::MessageField;

use self::disk::Disks;
pub(crate) use self::processes::processes;
use crate::{
    container::{Made, cgroup::Cgroup},
    ident::Id,
    time,
};

/// What is kept between two requests.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    disks: Arc<Disks>,
    /// The most huge pages that were seen in use, by the file that counts them.
    hugetlb: Mutex<HashMap<PathBuf, u64>>,
}

impl Stats {
    /// Reads all counters of `wanted`. `all` are the containers that there are, so
    /// that what is kept of others can be forgotten.
    ///
    /// It reads many files, so call it beside the event loop.
    pub(crate) fn collect(
        &self,
        wanted: &[(Id, Made)],
        all: &[(Id, Made)],
        pod_cgroup: &Path,
        scratch: Option<&Path>,
    ) -> StatsResponse {
        let owns = all.iter().filter_map(|(_, made)| made.own.clone());
        self.disks.keep_only(&owns.collect::<Vec<_>>());
        let owns = wanted.iter().filter_map(|(_, made)| made.own.as_deref());
        self.disks.refresh(&owns.collect::<Vec<_>>());
        let containers: Vec<_> = wanted.iter().map(|c| self.container(c)).collect();
        let mut sandbox = cgroup::read(pod_cgroup);
        // What they have open is counted per container; once is enough.
        let pod = Cgroup::at(pod_cgroup.to_owned());
        sandbox.processes = pod.processes().unwrap_or_default().len() as u64;
        self.note_hugetlb(pod_cgroup, &mut sandbox);
        self.hugetlb().retain(|file, _| file.exists());
        StatsResponse {
            at_ns: time::real_ns(),
            containers,
            sandbox: MessageField::some(sandbox),
            interfaces: network::interfaces(&cgroup::text(Path::new("/proc/net/dev"))),
            scratch: scratch.and_then(disk::filesystem).into(),
            ..StatsResponse::default()
        }
    }

    fn container(&self, (id, made): &(Id, Made)) -> ContainerStats {
        let path = made.cgroup.path();
        let mut stats = cgroup::read(path);
        process::count(&made.cgroup, &mut stats);
        self.note_hugetlb(path, &mut stats);
        ContainerStats {
            container_id: id.to_string(),
            cgroup: MessageField::some(stats),
            writable: made
                .own
                .as_deref()
                .and_then(|own| self.disks.usage(own))
                .into(),
            ulimits: process::ulimits(&made.init),
            ..ContainerStats::default()
        }
    }

    /// The kernel of cgroup v2 keeps no maximum of huge pages.
    fn note_hugetlb(&self, path: &Path, stats: &mut hull_proto_agent::agent::CgroupStats) {
        let mut seen = self.hugetlb();
        for pages in &mut stats.hugetlb {
            let most = seen
                .entry(path.join(cgroup::hugetlb_file(&pages.page_size)))
                .or_default();
            *most = pages.usage_bytes.max(*most);
            pages.max_usage_bytes = *most;
        }
    }

    fn hugetlb(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, u64>> {
        self.hugetlb.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
