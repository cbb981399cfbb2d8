//! Tells the host when the kernel kills processes of a container for lack of
//! memory.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use hull_proto_agent::agent::{Oom, event::Kind};
use tokio::io::Interest;
use tracing::debug;

use super::{
    cgroup::{Cgroup, value},
    process::Ended,
};
use crate::{events::Events, ident::Id, sys, time};

/// Watches `cgroup` until the container ended.
pub(crate) fn watch(id: Id, cgroup: &Cgroup, mut ended: Ended, events: Arc<Events>) {
    let path = cgroup.path().join("memory.events");
    tokio::spawn(async move {
        let watching = async {
            let file = File::open(path)?;
            // The kernel marks the file as exceptional when it changed (poll(2)).
            let changes = sys::register(file.try_clone()?.into(), Interest::PRIORITY)?;
            let mut known = count(&file)?;
            loop {
                changes.ready(Interest::PRIORITY).await?.clear_ready();
                let kills = count(&file)?;
                for _ in known..kills {
                    events.publish(Kind::Oom(Oom {
                        container_id: id.to_string(),
                        at_ns: time::real_ns(),
                        ..Oom::default()
                    }));
                }
                known = known.max(kills);
            }
        };
        let result: io::Result<()> = tokio::select! {
            result = watching => result,
            _ = ended.wait_for(Option::is_some) => Ok(()),
        };
        if let Err(error) = result {
            debug!(%error, "watch memory events");
        }
    });
}

fn count(file: &File) -> io::Result<u64> {
    let mut text = [0; 1024];
    let length = file.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text[..length]);
    Ok(value(&text, "oom_kill").unwrap_or(0))
}
