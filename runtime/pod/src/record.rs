//! What outlives the daemon: one record for each sandbox and container, in `hull.redb`, written
//! before the reply to the call that changed it. A store that can't be used is set aside, and what
//! was in it comes back from [`Copies`].
//!
//! A record is JSON with a version. An additional field needs a default; any other change needs
//! a new version and a reader for the old one.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    path::Path,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hull_image::ImageId;
use hull_image::database;
use hull_network::NetworkRecord;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use hull_base::{
    blocking, clock,
    faults::{self, Point},
};
use hull_spec::{
    error::PodError,
    id::{ContainerId, PodId},
    info::{ContainerUser, GuestInfo},
    signal::Signal,
    size::VmSize,
    spec::{ContainerSpec, MountSource, Resources, SandboxMetadata, SandboxSpec},
};
use hull_vm::{cgroup::PodCgroup, identity::Identity};

use crate::{
    copies::{Copies, Kind},
    lifecycle::{container::Exit, sandbox},
};

const SANDBOXES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sandboxes");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers");
const POINTS: database::Points = database::Points {
    write: Point::StoreWrite,
    sync: Point::StoreSync,
};
/// The version of both kinds of record.
pub(crate) const VERSION: u32 = 1;

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
    #[error("use {} for copies of the records", path.display())]
    Copies { path: PathBuf, source: io::Error },
    #[error("rename the records in {}, which are broken", path.display())]
    SetAside { path: PathBuf, source: io::Error },
}

/// Why a record can't be read. It does not say what is in it: that may be a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("it makes no sense in line {line}, column {column}")]
    Malformed { line: usize, column: usize },
    #[error("it has version {0}, and this program knows {VERSION}")]
    Version(u32),
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
    /// As whom its VMM runs. 0: as root, as an earlier daemon started it, or not known.
    #[serde(default)]
    pub user: u32,
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
    /// Where a checkpoint of it is being written; none: there is none on its way.
    #[serde(default)]
    pub checkpoint: Option<PathBuf>,
}

/// A VM on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub process: Identity,
    #[serde(flatten)]
    pub size: VmSize,
}

/// A container on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub id: ContainerId,
    /// What the guest calls it; none: by its id.
    #[serde(default)]
    pub guest_id: Option<ContainerId>,
    pub pod: PodId,
    pub spec: Arc<ContainerSpec>,
    pub image_id: ImageId,
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
    pub devices: Vec<DeviceRecord>,
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
    /// One that begins now.
    pub(crate) fn now(grace: Duration) -> Self {
        Self {
            at_ns: clock::now_ns(),
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        }
    }

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
    pub image_id: ImageId,
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
        let mut mounts = self.spec.mounts.iter().enumerate();
        mounts.any(|(index, mount)| {
            matches!(mount.source, MountSource::Host(_))
                && !self.is_local(index)
                && mount.of_devices().is_none()
        })
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

/// A block device of the host in a VM, on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceRecord {
    /// Its name in the guest.
    pub storage: String,
    /// Its device slot.
    pub slot: u8,
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
pub(crate) struct Records {
    store: Arc<database::Store>,
    copies: Arc<Copies>,
    /// How many records of sandboxes and of containers a new store has from their copies.
    restored: Arc<Mutex<Option<(usize, usize)>>>,
}

/// All records, and what was wrong with them.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Loaded {
    pub sandboxes: Vec<SandboxRecord>,
    pub containers: Vec<ContainerRecord>,
    /// Those of the sandboxes whose record can't be read: what could be told of them stands in for
    /// it, until they are stopped.
    pub unread: HashSet<PodId>,
    /// Containers whose record can't be read, with their pod if that can be told.
    pub unread_containers: Vec<(ContainerId, Option<PodId>)>,
    /// What was lost or restored, for a person.
    pub faults: Vec<String>,
}

/// A key and a value as they are in the store.
type Raw = (String, Vec<u8>);

impl Records {
    /// Opens the database, and creates it when absent; one that is broken is set aside, which is
    /// told. Blocks.
    pub(crate) fn open(
        path: &Path,
        copies: &Path,
    ) -> Result<(Self, Option<database::Broken>), RecordError> {
        let copies = Copies::open(copies.to_owned()).map_err(|source| RecordError::Copies {
            path: copies.to_owned(),
            source,
        })?;
        let copies = Arc::new(copies);
        let open = || {
            let opened = database::Store::open(path, POINTS);
            let (store, broken) = opened.map_err(|source| RecordError::Open {
                path: path.to_owned(),
                source,
            })?;
            let records = Self {
                store: Arc::new(store),
                copies: Arc::clone(&copies),
                restored: Arc::default(),
            };
            let made = records.make_tables();
            Ok::<_, RecordError>((records, broken, made))
        };
        let (records, broken, made) = open()?;
        match made {
            Ok(()) => Ok((records, broken)),
            Err(RecordError::Database { source, .. }) if is_foreign(&source) => {
                drop(records);
                let broken = database::set_aside(path, source.to_string());
                let broken = broken.map_err(|source| RecordError::SetAside {
                    path: path.to_owned(),
                    source,
                })?;
                let (records, _, made) = open()?;
                made?;
                Ok((records, Some(broken)))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the tables of a new store, with what there are copies of: one that had records and has none
    /// any more has its tables, and what is a copy only was deleted.
    fn make_tables(&self) -> Result<(), RecordError> {
        let is_new = |database: &Database| {
            let transaction = database.begin_read()?;
            match transaction.open_table(SANDBOXES) {
                Ok(_) => Ok(false),
                Err(TableError::TableDoesNotExist(_)) => Ok(true),
                Err(error) => Err(error.into()),
            }
        };
        let action = "make the tables";
        let is_new = self.store.with(is_new);
        let is_new = is_new.map_err(|source| RecordError::Database {
            action,
            source: Box::new(source),
        })?;
        let (mut sandboxes, mut containers) = (Vec::new(), Vec::new());
        if is_new {
            sandboxes = self.copied(Kind::Sandbox);
            containers = self.copied(Kind::Container);
        }
        self.write(Point::StoreOpened, action, |to_sandboxes, to_containers| {
            for (key, bytes) in &sandboxes {
                to_sandboxes.insert(key.as_str(), bytes.as_slice())?;
            }
            for (key, bytes) in &containers {
                to_containers.insert(key.as_str(), bytes.as_slice())?;
            }
            Ok(())
        })?;
        if !sandboxes.is_empty() {
            *self.restored() = Some((sandboxes.len(), containers.len()));
        }
        Ok(())
    }

    pub(crate) async fn put_sandbox(&self, record: &SandboxRecord) -> Result<(), RecordError> {
        let (key, bytes) = encode(record.id.as_str(), record)?;
        self.blocking(move |this| {
            this.write(Point::SandboxRecorded, "write a sandbox", |sandboxes, _| {
                sandboxes.insert(key.as_str(), bytes.as_slice()).map(drop)
            })?;
            this.copies.put(Kind::Sandbox, &key, &bytes);
            Ok(())
        })
        .await
    }

    pub(crate) async fn put_container(&self, record: &ContainerRecord) -> Result<(), RecordError> {
        let (key, bytes) = encode(record.id.as_str(), record)?;
        self.blocking(move |this| {
            this.write(
                Point::ContainerRecorded,
                "write a container",
                |_, containers| containers.insert(key.as_str(), bytes.as_slice()).map(drop),
            )?;
            this.copies.put(Kind::Container, &key, &bytes);
            Ok(())
        })
        .await
    }

    pub(crate) async fn delete_container(&self, id: &ContainerId) -> Result<(), RecordError> {
        let key = id.to_string();
        self.blocking(move |this| {
            this.write(
                Point::ContainerForgotten,
                "delete a container",
                |_, containers| containers.remove(key.as_str()).map(drop),
            )?;
            this.copies.remove(Kind::Container, &key);
            Ok(())
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
            this.write(
                Point::SandboxForgotten,
                "delete a sandbox",
                |sandboxes, containers| {
                    for container in &of {
                        containers.remove(container.as_str())?;
                    }
                    sandboxes.remove(key.as_str()).map(drop)
                },
            )?;
            for container in &of {
                this.copies.remove(Kind::Container, container.as_str());
            }
            this.copies.remove(Kind::Sandbox, &key);
            Ok(())
        })
        .await
    }

    /// All records, at the daemon's start. One that can't be read is taken from its copy, and left
    /// as it is when that can't be read either: another version of this program may. Blocks.
    pub(crate) fn load(&self) -> Result<Loaded, RecordError> {
        let (mut sandboxes, mut containers) = self.raw()?;
        let mut loaded = Loaded::default();
        if let Some((sandboxes, containers)) = self.restored().take() {
            loaded.faults.push(format!(
                "the store had no records; {sandboxes} of sandboxes and {containers} of containers \
                 were restored from their copies"
            ));
        }
        for (key, bytes) in &mut sandboxes {
            match self.read(Kind::Sandbox, key, bytes, &mut loaded.faults) {
                Ok(record) => loaded.sandboxes.push(record),
                Err(reason) => {
                    let Ok(id) = PodId::try_from(key.clone()) else {
                        continue;
                    };
                    loaded.unread.insert(id.clone());
                    loaded.sandboxes.push(stand_in(id, bytes, &reason));
                }
            }
        }
        for (key, bytes) in &mut containers {
            match self.read(Kind::Container, key, bytes, &mut loaded.faults) {
                Ok(record) => loaded.containers.push(record),
                Err(_) => {
                    if let Ok(id) = ContainerId::try_from(key.clone()) {
                        loaded.unread_containers.push((id, part(bytes, "pod")));
                    }
                }
            }
        }
        if !loaded.faults.is_empty() {
            self.restore(&sandboxes, &containers)?;
        }
        self.renew_copies(Kind::Sandbox, &sandboxes);
        self.renew_copies(Kind::Container, &containers);
        Ok(loaded)
    }

    /// What is recorded of one pod, as far as it can be read. Blocks.
    pub(crate) fn of_pod(
        &self,
        id: &PodId,
    ) -> Result<(Option<SandboxRecord>, Vec<ContainerRecord>), RecordError> {
        let (sandboxes, containers) = self.raw()?;
        let sandbox = sandboxes.iter().find(|(key, _)| key == id.as_str());
        let sandbox = sandbox.map(|(_, bytes)| {
            decode(bytes).unwrap_or_else(|reason| stand_in(id.clone(), bytes, &reason))
        });
        let containers = containers
            .iter()
            .filter_map(|(_, bytes)| decode(bytes).ok())
            .filter(|container: &ContainerRecord| container.pod == *id)
            .collect();
        Ok((sandbox, containers))
    }

    fn raw(&self) -> Result<(Vec<Raw>, Vec<Raw>), RecordError> {
        let failed = |source: redb::Error| RecordError::Database {
            action: "read the records",
            source: Box::new(source),
        };
        let read = |database: &Database| {
            let transaction = database.begin_read()?;
            let read = |table| -> Result<Vec<Raw>, redb::Error> {
                let table = transaction.open_table::<&str, &[u8]>(table)?;
                table
                    .iter()?
                    .map(|entry| {
                        let (key, value) = entry?;
                        Ok((key.value().to_owned(), value.value().to_owned()))
                    })
                    .collect()
            };
            Ok((read(SANDBOXES)?, read(CONTAINERS)?))
        };
        self.store.with(read).map_err(failed)
    }

    fn restored(&self) -> MutexGuard<'_, Option<(usize, usize)>> {
        self.restored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copied(&self, kind: Kind) -> Vec<Raw> {
        let ids = self.copies.ids(kind).into_iter();
        ids.filter_map(|id| Some((id.clone(), self.copies.get(kind, &id)?)))
            .collect()
    }

    /// Reads a record; takes its copy when that can be read and the record can't.
    fn read<T: DeserializeOwned>(
        &self,
        kind: Kind,
        key: &str,
        bytes: &mut Vec<u8>,
        faults: &mut Vec<String>,
    ) -> Result<T, Unreadable> {
        let reason = match decode(bytes) {
            Ok(record) => return Ok(record),
            Err(reason) => reason,
        };
        let what = match kind {
            Kind::Sandbox => "sandbox",
            Kind::Container => "container",
        };
        let copy = self.copies.get(kind, key);
        if let Some((record, copy)) = copy.and_then(|copy| Some((decode(&copy).ok()?, copy))) {
            faults.push(format!(
                "the record of {what} {key} can't be read ({reason}); its copy is used"
            ));
            *bytes = copy;
            return Ok(record);
        }
        faults.push(format!(
            "the record of {what} {key} can't be read: {reason}"
        ));
        Err(reason)
    }

    /// Writes to the store what came from copies.
    fn restore(&self, sandboxes: &[Raw], containers: &[Raw]) -> Result<(), RecordError> {
        self.write(
            Point::SandboxRecorded,
            "write the records",
            |to_sandboxes, to_containers| {
                for (key, bytes) in sandboxes {
                    to_sandboxes.insert(key.as_str(), bytes.as_slice())?;
                }
                for (key, bytes) in containers {
                    to_containers.insert(key.as_str(), bytes.as_slice())?;
                }
                Ok(())
            },
        )
    }

    /// Makes the copies those of what is in the store.
    fn renew_copies(&self, kind: Kind, records: &[Raw]) {
        for (key, bytes) in records {
            self.copies.put(kind, key, bytes);
        }
        let known: HashSet<&str> = records.iter().map(|(key, _)| key.as_str()).collect();
        for id in self.copies.ids(kind) {
            if !known.contains(id.as_str()) {
                self.copies.remove(kind, &id);
            }
        }
    }

    fn write(
        &self,
        point: Point,
        action: &'static str,
        change: impl FnOnce(&mut Table<'_>, &mut Table<'_>) -> Result<(), redb::StorageError>,
    ) -> Result<(), RecordError> {
        let attempt = |database: &Database| {
            let transaction = database.begin_write()?;
            {
                let mut sandboxes = transaction.open_table(SANDBOXES)?;
                let mut containers = transaction.open_table(CONTAINERS)?;
                change(&mut sandboxes, &mut containers)?;
            }
            transaction.commit()?;
            Ok(())
        };
        self.store
            .with(attempt)
            .map_err(|source| RecordError::Database {
                action,
                source: Box::new(source),
            })?;
        faults::point(point);
        Ok(())
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

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let wrong = |error: serde_json::Error| Unreadable::Malformed {
        line: error.line(),
        column: error.column(),
    };
    let Version { version } = serde_json::from_slice(bytes).map_err(wrong)?;
    if version != VERSION {
        return Err(Unreadable::Version(version));
    }
    serde_json::from_slice(bytes).map_err(wrong)
}

/// A part of a record that can't be read as a whole.
fn part<T: DeserializeOwned>(bytes: &[u8], key: &str) -> Option<T> {
    let mut record: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let value = record.get_mut(key)?.take();
    serde_json::from_value(value).ok()
}

/// A sandbox whose record can't be read: not ready, and as much as can be told of what belongs to
/// it. Nothing of that is touched before somebody asks for its stop.
fn stand_in(id: PodId, bytes: &[u8], reason: &Unreadable) -> SandboxRecord {
    let spec = part(bytes, "spec").unwrap_or_else(|| {
        let spec: serde_json::Value = part(bytes, "spec").unwrap_or_default();
        let spec = spec.to_string();
        SandboxSpec {
            metadata: part(spec.as_bytes(), "metadata").unwrap_or_else(|| SandboxMetadata {
                name: id.to_string(),
                ..SandboxMetadata::default()
            }),
            labels: part(spec.as_bytes(), "labels").unwrap_or_default(),
            annotations: part(spec.as_bytes(), "annotations").unwrap_or_default(),
            ..SandboxSpec::default()
        }
    });
    SandboxRecord {
        user: part(bytes, "user").unwrap_or_default(),
        spec: Arc::new(spec),
        state: sandbox::State::Broken,
        message: format!("its record can't be read: {reason}"),
        created_at_ns: part(bytes, "created_at_ns").unwrap_or_default(),
        network: part(bytes, "network"),
        ips: Vec::new(),
        seen_ips: None,
        vm: part(bytes, "vm"),
        cgroup: part(bytes, "cgroup"),
        guest: None,
        resources: None,
        overhead: None,
        checkpoint: part(bytes, "checkpoint"),
        id,
    }
}

/// Whether the tables in the store are not ours.
fn is_foreign(error: &redb::Error) -> bool {
    use redb::Error as E;
    matches!(
        error,
        E::TableTypeMismatch { .. }
            | E::TableIsMultimap(_)
            | E::TypeDefinitionChanged { .. }
            | E::Corrupted(_)
    )
}

#[cfg(test)]
mod tests;
