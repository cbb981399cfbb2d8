//! What ADD returned, on disk for DEL, CHECK and GC: one file per pod, written as soon as a
//! plugin has answered, so that a crash in the middle of ADD leaves nothing that DEL would not
//! be told of.
//!
//! It is beside the caller's record, not in its place: the record says that there may be an
//! attachment, this file says how far it came. Without a readable file the record does.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use hull_base::{
    blocking,
    faults::{self, Point},
};
use serde::Deserialize;

use crate::record::NetworkRecord;

/// The directory of cached results.
#[derive(Debug, Clone)]
pub(crate) struct Cache(PathBuf);

impl Cache {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Writes a pod's record in one step.
    pub(crate) async fn store(&self, record: &NetworkRecord) -> io::Result<()> {
        let (dir, path) = (self.0.clone(), self.path(&record.pod_id));
        let text = serde_json::to_vec(record)?;
        let write = move || {
            fs::create_dir_all(&dir)?;
            let new = path.with_extension("new");
            let mut file = fs::File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            faults::write(Point::CniWrite)?;
            file.write_all(&text)?;
            drop(file);
            fs::rename(new, path)
        };
        blocking(write).await
    }

    /// Reads a pod's record; none when there is none that can be read.
    pub(crate) async fn load(&self, pod_id: &str) -> Option<NetworkRecord> {
        let path = self.path(pod_id);
        let text = match blocking(move || fs::read(path)).await {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%error, pod = pod_id, "read the cached CNI result");
                return None;
            }
        };
        match serde_json::from_slice::<NetworkRecord>(&text) {
            Ok(record) if record.pod_id == pod_id => Some(record),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, pod = pod_id, "read the cached CNI result");
                None
            }
        }
    }

    /// Removes a pod's record; it is no error when it is gone.
    pub(crate) async fn remove(&self, pod_id: &str) -> io::Result<()> {
        let path = self.path(pod_id);
        let remove = move || {
            // One that could not be finished.
            for path in [path.with_extension("new"), path] {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        };
        blocking(remove).await
    }

    /// Lists the pods that have one.
    pub(crate) async fn pods(&self) -> io::Result<Vec<String>> {
        let dir = self.0.clone();
        let names = blocking(move || names(&dir)).await?;
        let ids = names.iter().filter_map(|name| name.strip_suffix(".json"));
        Ok(ids.map(str::to_owned).collect())
    }

    fn path(&self, pod_id: &str) -> PathBuf {
        self.0.join(format!("{pod_id}.json"))
    }
}

/// A file of libcni's cache, which other runtimes keep.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Foreign {
    container_id: String,
    if_name: String,
    network_name: String,
}

/// The attachments to a network that other runtimes on this node hold, by libcni's cache:
/// container id and interface. GC must not take their addresses. Blocks.
pub(crate) fn foreign(dir: &Path, network: &str) -> io::Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for name in names(dir)? {
        let text = fs::read(dir.join(name))?;
        // Files of other forms come from before 0.4.0 and name no attachment.
        if let Ok(entry) = serde_json::from_slice::<Foreign>(&text)
            && entry.network_name == network
        {
            found.push((entry.container_id, entry.if_name));
        }
    }
    Ok(found)
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names: io::Result<Vec<Option<String>>> = names.collect();
    Ok(names?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_of_other_runtimes_are_found() {
        let dir = tempfile::tempdir().unwrap();
        assert!(foreign(&dir.path().join("absent"), "n").unwrap().is_empty());
        for (network, id) in [("n", "a"), ("m", "b")] {
            let text = serde_json::json!({"kind": "cniCacheV1", "containerId": id,
                "config": "e30=", "ifName": "eth0", "networkName": network});
            let name = dir.path().join(format!("{network}-{id}-eth0"));
            fs::write(name, text.to_string()).unwrap();
        }
        fs::write(dir.path().join("n-c-eth0"), r#"{"ips":[]}"#).unwrap();
        let found = foreign(dir.path(), "n").unwrap();
        assert_eq!(found, [("a".to_owned(), "eth0".to_owned())]);
    }
}
