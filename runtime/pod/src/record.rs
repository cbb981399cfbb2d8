//! What outlives the daemon: one record for each sandbox and container, in `hull.redb`, written
//! before the reply to the call that changed it.
//!
//! A record is JSON with a version. An additional field needs a default; any other change needs
//! a new version and a reader for the old one.

use std::{net::IpAddr, path::Path, path::PathBuf, sync::Arc, time::Duration};

use hull_network::NetworkRecord;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    blocking::blocking,
    cgroup::PodCgroup,
    error::PodError,
    id::{ContainerId, PodId},
    info::{ContainerUser, GuestInfo},
    lifecycle::{container::Exit, sandbox},
    signal::Signal,
    spec::{ContainerSpec, Resources, SandboxSpec},
    storage::{files, images::DeviceDisk},
    vm::process::VmmProcess,
};

const SANDBOXES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sandboxes");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers");
/// The version of both kinds of record.
const VERSION: u32 = 1;

/// Why records can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("open the records in {}", path.display())]
    Open {
        path: PathBuf,
        source: redb::DatabaseError,
    },
    #[error("{action}")]
    Database {
        action: &'static str,
        source: Box<redb::Error>,
    },
    #[error("encode the record of {id}")]
    Encode {
        id: String,
        source: serde_json::Error,
    },
    #[error("decode the record of {id}")]
    Decode {
        id: String,
        source: serde_json::Error,
    },
    #[error("read the record of {id}: it has version {version}, this is {VERSION}")]
    Version { id: String, version: u32 },
}

impl From<RecordError> for PodError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Open {
                source: redb::DatabaseError::DatabaseAlreadyOpen,
                path,
            } => Self::precondition(
                format!("open the records in {}", path.display()),
                "another daemon uses them",
            ),
            other => Self::internal("use the records", other),
        }
    }
}

/// A sandbox on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub id: PodId,
    pub spec: Arc<SandboxSpec>,
    pub state: sandbox::State,
    /// Why it is not ready, for a person.
    #[serde(default)]
    pub message: String,
    pub created_at_ns: i64,
    /// None: nothing of the network is left.
    #[serde(default)]
    pub network: Option<NetworkRecord>,
    /// Addresses of the pod while it has a network.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// What its interface had when `ips` was last settled; none: not known.
    #[serde(default)]
    pub seen_ips: Option<Vec<IpAddr>>,
    /// None: the VMM was not started, or is known to be gone.
    #[serde(default)]
    pub vm: Option<VmRecord>,
    /// None: it has none, or it was removed.
    #[serde(default)]
    pub cgroup: Option<PodCgroup>,
    #[serde(default)]
    pub guest: Option<GuestInfo>,
    /// What the specification says, as it was changed later; none: never.
    #[serde(default)]
    pub resources: Option<Resources>,
    #[serde(default)]
    pub overhead: Option<Resources>,
}

/// A VM on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub process: VmmProcess,
    pub vcpus: u8,
    pub memory_mib: u64,
}

/// A container on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub id: ContainerId,
    pub pod: PodId,
    pub spec: Arc<ContainerSpec>,
    pub image_id: String,
    pub image_ref: String,
    pub state: RecordedState,
    pub created_at_ns: i64,
    #[serde(default)]
    pub started_at_ns: i64,
    /// The device slot of its image.
    #[serde(default)]
    pub image_slot: Option<u8>,
    /// Its image volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeRecord>,
    /// Those of its mounts that the guest keeps.
    #[serde(default)]
    pub locals: Vec<LocalRecord>,
    /// Its block devices of the host.
    #[serde(default)]
    pub devices: Vec<DeviceDisk>,
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// The signal that asks it to end, by number.
    pub stop_signal: Signal,
    /// That it was asked to end; none: it was not.
    #[serde(default)]
    pub stopping: Option<Stopping>,
    #[serde(default)]
    pub user: Option<ContainerUser>,
    /// What the specification says, as it was changed later; none: never.
    #[serde(default)]
    pub resources: Option<Resources>,
}

/// A stop that was begun: written before the signal is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stopping {
    /// When, Unix time in nanoseconds.
    pub at_ns: i64,
    /// How long it may take.
    pub grace_ms: u64,
}

impl Stopping {
    /// How much of the grace is left. A clock that was set makes it neither longer nor endless.
    pub(crate) fn left(&self, now_ns: i64) -> Duration {
        let grace = Duration::from_millis(self.grace_ms);
        let gone = u64::try_from(now_ns.saturating_sub(self.at_ns)).unwrap_or(0);
        grace.saturating_sub(Duration::from_nanos(gone))
    }
}

/// An image volume on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeRecord {
    /// Index in the container's mounts.
    pub mount: usize,
    pub image_id: String,
    /// The device slot of its image.
    #[serde(default)]
    pub slot: Option<u8>,
}

impl ContainerRecord {
    /// Whether a mount that shows a path of the host is kept by the guest.
    pub(crate) fn is_local(&self, mount: usize) -> bool {
        self.locals.iter().any(|local| local.mount == mount)
    }

    /// Whether it has paths of the host.
    pub(crate) fn has_shares(&self) -> bool {
        files::shares(&self.spec, |mount| self.is_local(mount))
            .next()
            .is_some()
    }
}

/// A volume that the guest keeps, on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocalRecord {
    /// Index in the container's mounts.
    pub mount: usize,
    /// kubelet's directory of the volume.
    pub directory: PathBuf,
    /// Its name in the guest.
    pub storage: String,
    /// The device slot of its disk; none: it has none, or not yet.
    #[serde(default)]
    pub slot: Option<u8>,
}

/// Where a container was when it was last written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RecordedState {
    /// The guest may have a part of it; its creation was not answered.
    Creating,
    Created,
    Running,
    Exited(Exit),
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    version: u32,
    #[serde(flatten)]
    record: &'a T,
}

/// The records. Clones share the database.
#[derive(Debug, Clone)]
pub(crate) struct Records(Arc<Database>);

impl Records {
    /// Opens the database, and creates it when absent. Blocks.
    pub(crate) fn open(path: &Path) -> Result<Self, RecordError> {
        let database = Database::create(path).map_err(|source| RecordError::Open {
            path: path.to_owned(),
            source,
        })?;
        let records = Self(Arc::new(database));
        records.write("make the tables", |_, _| Ok(()))?;
        Ok(records)
    }

    pub(crate) async fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), RecordError> {
        let (key, bytes) = encode(record.id.as_str(), record)?;
        self.blocking(move |this| {
            this.write("write a sandbox", |sandboxes, _| {
                sandboxes.insert(key.as_str(), bytes.as_slice()).map(drop)
            })
        })
        .await
    }

    pub(crate) async fn put_container(&self, record: &ContainerRecord) -> Result<(), RecordError> {
        let (key, bytes) = encode(record.id.as_str(), record)?;
        self.blocking(move |this| {
            this.write("write a container", |_, containers| {
                containers.insert(key.as_str(), bytes.as_slice()).map(drop)
            })
        })
        .await
    }

    pub(crate) async fn delete_container(&self, id: &ContainerId) -> Result<(), RecordError> {
        let key = id.to_string();
        self.blocking(move |this| {
            this.write("delete a container", |_, containers| {
                containers.remove(key.as_str()).map(drop)
            })
        })
        .await
    }

    /// Deletes a sandbox and its containers at once.
    pub(crate) async fn delete_sandbox(
        &self,
        id: &PodId,
        of: Vec<ContainerId>,
    ) -> Result<(), RecordError> {
        let key = id.to_string();
        self.blocking(move |this| {
            this.write("delete a sandbox", |sandboxes, containers| {
                for container in &of {
                    containers.remove(container.as_str())?;
                }
                sandboxes.remove(key.as_str()).map(drop)
            })
        })
        .await
    }

    /// All records. Blocks. One that can't be read is an error: its pod would leak.
    pub(crate) fn load(&self) -> Result<(Vec<SandboxRecord>, Vec<ContainerRecord>), RecordError> {
        let failed = |source: redb::Error| RecordError::Database {
            action: "read the records",
            source: Box::new(source),
        };
        let transaction = self.0.begin_read().map_err(|e| failed(e.into()))?;
        let read = |table| -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let table = transaction.open_table::<&str, &[u8]>(table)?;
            table
                .iter()?
                .map(|entry| {
                    let (key, value) = entry?;
                    Ok((key.value().to_owned(), value.value().to_owned()))
                })
                .collect()
        };
        let sandboxes = read(SANDBOXES).map_err(failed)?;
        let containers = read(CONTAINERS).map_err(failed)?;
        Ok((
            sandboxes.iter().map(decode).collect::<Result<_, _>>()?,
            containers.iter().map(decode).collect::<Result<_, _>>()?,
        ))
    }

    fn write(
        &self,
        action: &'static str,
        change: impl FnOnce(&mut Table<'_>, &mut Table<'_>) -> Result<(), redb::StorageError>,
    ) -> Result<(), RecordError> {
        let attempt = || -> Result<(), redb::Error> {
            let transaction = self.0.begin_write()?;
            {
                let mut sandboxes = transaction.open_table(SANDBOXES)?;
                let mut containers = transaction.open_table(CONTAINERS)?;
                change(&mut sandboxes, &mut containers)?;
            }
            transaction.commit()?;
            Ok(())
        };
        attempt().map_err(|source| RecordError::Database {
            action,
            source: Box::new(source),
        })
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, RecordError> + Send + 'static,
    ) -> Result<T, RecordError> {
        let this = self.clone();
        blocking(move || work(&this)).await
    }
}

type Table<'a> = redb::Table<'a, &'static str, &'static [u8]>;

fn encode<T: Serialize>(id: &str, record: &T) -> Result<(String, Vec<u8>), RecordError> {
    let envelope = Envelope {
        version: VERSION,
        record,
    };
    let bytes = serde_json::to_vec(&envelope).map_err(|source| RecordError::Encode {
        id: id.to_owned(),
        source,
    })?;
    Ok((id.to_owned(), bytes))
}

fn decode<T: DeserializeOwned>((id, bytes): &(String, Vec<u8>)) -> Result<T, RecordError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let wrong = |source| RecordError::Decode {
        id: id.clone(),
        source,
    };
    let Version { version } = serde_json::from_slice(bytes).map_err(wrong)?;
    if version != VERSION {
        return Err(RecordError::Version {
            id: id.clone(),
            version,
        });
    }
    serde_json::from_slice(bytes).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::container::Reason;

    fn sandbox() -> SandboxRecord {
        SandboxRecord {
            id: PodId::try_from("a".repeat(64)).unwrap(),
            spec: Arc::new(SandboxSpec::default()),
            state: sandbox::State::Ready,
            message: String::new(),
            created_at_ns: 5,
            network: None,
            ips: vec!["10.88.0.5".parse().unwrap()],
            seen_ips: None,
            vm: None,
            cgroup: None,
            guest: None,
            resources: None,
            overhead: None,
        }
    }

    fn container() -> ContainerRecord {
        ContainerRecord {
            id: ContainerId::try_from("b".repeat(64)).unwrap(),
            pod: sandbox().id,
            spec: Arc::new(ContainerSpec::default()),
            image_id: "sha256:0".into(),
            image_ref: "x".into(),
            state: RecordedState::Exited(Exit {
                code: 137,
                reason: Reason::OomKilled,
                message: String::new(),
                at_ns: 9,
            }),
            created_at_ns: 6,
            started_at_ns: 7,
            image_slot: Some(5),
            volumes: Vec::new(),
            locals: Vec::new(),
            devices: Vec::new(),
            log_path: None,
            stop_signal: Signal::TERM,
            stopping: None,
            user: None,
            resources: None,
        }
    }

    #[tokio::test]
    async fn records_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hull.redb");
        let records = Records::open(&path).unwrap();
        records.put_sandbox(&sandbox()).await.unwrap();
        let container = ContainerRecord {
            volumes: vec![VolumeRecord {
                mount: 1,
                image_id: "sha256:v".into(),
                slot: Some(6),
            }],
            locals: vec![LocalRecord {
                mount: 2,
                directory: "/k".into(),
                storage: "volume-k".into(),
                slot: Some(8),
            }],
            devices: vec![DeviceDisk {
                storage: "device-0".into(),
                slot: 7,
            }],
            ..container()
        };
        records.put_container(&container).await.unwrap();
        assert!(matches!(
            Records::open(&path).map_err(PodError::from),
            Err(PodError::FailedPrecondition { .. })
        ));
        drop(records);

        let records = Records::open(&path).unwrap();
        let expected = (vec![sandbox()], vec![container.clone()]);
        assert_eq!(records.load().unwrap(), expected);
        let containers = vec![container.id];
        records
            .delete_sandbox(&sandbox().id, containers)
            .await
            .unwrap();
        assert_eq!(records.load().unwrap(), (vec![], vec![]));
    }

    /// Fails when the form on disk changes: give new fields a default, or raise the version.
    #[test]
    fn the_form_on_disk_is_this() {
        let old = br#"{"version":1,
            "id":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
            "pod":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "spec":{},"image_id":"sha256:0","image_ref":"x",
            "state":{"exited":{"code":137,"reason":"oom_killed","message":"","at_ns":9}},
            "created_at_ns":6,"started_at_ns":7,"image_slot":5,"stop_signal":15}"#;
        let record: ContainerRecord = decode(&(String::new(), old.to_vec())).unwrap();
        assert_eq!(record, container());

        let old = br#"{"version":1,
            "id":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "spec":{},"state":"ready","created_at_ns":5,"ips":["10.88.0.5"]}"#;
        let record: SandboxRecord = decode(&(String::new(), old.to_vec())).unwrap();
        assert_eq!(record, sandbox());
    }

    #[test]
    fn a_grace_goes_on_where_it_was() {
        let stopping = Stopping {
            at_ns: 1_000_000_000,
            grace_ms: 5000,
        };
        assert_eq!(stopping.left(3_000_000_000), Duration::from_secs(3));
        assert_eq!(stopping.left(30_000_000_000), Duration::ZERO);
        assert_eq!(stopping.left(0), Duration::from_secs(5));
    }

    #[test]
    fn another_version_is_not_misread() {
        let newer = (String::from("x"), br#"{"version":2}"#.to_vec());
        let result: Result<SandboxRecord, _> = decode(&newer);
        assert!(matches!(
            result,
            Err(RecordError::Version { version: 2, .. })
        ));
    }
}
