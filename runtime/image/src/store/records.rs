//! What the store remembers: images, their names, and leases. Every change is on disk before the
//! call returns.
//!
//! What can't be read is forgotten, and said to be: an image can be pulled again.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::image::{Image, ImageId};
use crate::manifest::Configuration;
use crate::reference::Name;

use crate::database;

use super::StoreError;
use super::files::{Needed, image_directory};

/// Number of the form that records have; another one is refused, not guessed at.
const FORMAT: u64 = 1;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Image id → [`ImageRecord`], JSON.
const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");
/// Full name with tag or digest → image id.
const NAMES: TableDefinition<&str, &str> = TableDefinition::new("names");
/// (owner, image id).
const LEASES: TableDefinition<(&str, &str), ()> = TableDefinition::new("leases");

/// An image as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) id: ImageId,
    /// The platform's manifest and the configuration, as they came.
    pub(crate) manifest: String,
    pub(crate) manifest_digest: Digest,
    pub(crate) configuration: String,
    /// Diff-IDs, lowest first.
    pub(crate) layers: Vec<Digest>,
    pub(crate) disk: Vec<DiskPiece>,
    /// Manifest, configuration and compressed layers, bytes.
    pub(crate) size: u64,
    pub(crate) pinned: bool,
    /// Removed by name, and kept only for its leases.
    pub(crate) removed: bool,
}

/// A piece of an image's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskPiece {
    /// The layer whose data this is; `None` for the image's metadata.
    pub(crate) layer: Option<Digest>,
    pub(crate) length: u64,
}

/// The database.
#[derive(Debug)]
pub(crate) struct Records {
    database: Database,
}

type Result<T> = std::result::Result<T, StoreError>;

impl Records {
    /// Opens the records and forgets what can't be read of them. Tells what was lost.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<String>)> {
        let action = || format!("open {}", path.display());
        let open = || {
            let (database, broken) = database::open(path).map_err(|e| failed(action(), e))?;
            Ok((Self { database }, broken))
        };
        let (mut records, mut broken) = open()?;
        if let Some(reason) = records.begin(&action())? {
            drop(records);
            let aside = database::set_aside(path, reason);
            broken = Some(aside.map_err(|e| StoreError::io(action(), e))?);
            records = open()?.0;
            records.begin(&action())?;
        }
        let broken = broken.map(|broken| broken.to_string());
        let mut lost: Vec<String> = broken.into_iter().collect();
        lost.extend(records.forget_unreadable()?);
        for lost in &lost {
            tracing::error!("{lost}");
        }
        Ok((records, lost))
    }

    /// Makes the tables. Why these are not ours, if so.
    fn begin(&self, action: &str) -> Result<Option<String>> {
        let run = || -> std::result::Result<_, redb::Error> {
            let transaction = self.database.begin_write()?;
            let mut meta = transaction.open_table(META)?;
            let known = meta.get("format")?.map(|format| format.value());
            if let Some(other) = known.filter(|format| *format != FORMAT) {
                let reason = format!("they have form {other}, and this program knows {FORMAT}");
                return Ok(Some(reason));
            }
            meta.insert("format", FORMAT)?;
            drop(meta);
            transaction.open_table(IMAGES)?;
            transaction.open_table(NAMES)?;
            transaction.open_table(LEASES)?;
            transaction.commit()?;
            Ok(None)
        };
        match run() {
            Err(error @ (redb::Error::TableTypeMismatch { .. } | redb::Error::Corrupted(_))) => {
                Ok(Some(error.to_string()))
            }
            result => result.map_err(|e| failed(action, e)),
        }
    }

    /// Removes images whose record can't be read, with their names.
    fn forget_unreadable(&self) -> Result<Vec<String>> {
        let unreadable = self.read("look through the images", |tables| {
            let mut unreadable = Vec::new();
            for entry in tables.images.iter()? {
                let (id, bytes) = entry?;
                let configuration = parse(bytes.value()).map(|record| record.configuration);
                let is_whole = configuration
                    .is_ok_and(|text| serde_json::from_str::<Configuration>(&text).is_ok());
                if !is_whole {
                    unreadable.push(id.value().to_owned());
                }
            }
            Ok(unreadable)
        })?;
        for id in &unreadable {
            self.write(&format!("forget image {id}"), |tables| {
                tables.names.retain(|_, named| named != id)?;
                tables.images.remove(id.as_str())?;
                Ok(())
            })?;
        }
        let lost = |id| format!("the record of image {id} can't be read; pull it again");
        Ok(unreadable.iter().map(lost).collect())
    }

    /// Adds or replaces an image, and points names at it.
    pub(crate) fn put_image(&self, record: &ImageRecord, names: &[String]) -> Result<()> {
        let action = format!("record image {}", record.id);
        let bytes = serde_json::to_vec(record).map_err(|e| failed(action.clone(), e))?;
        self.write(&action, |tables| {
            tables.images.insert(record.id.as_str(), bytes.as_slice())?;
            for name in names {
                tables.names.insert(name.as_str(), record.id.as_str())?;
            }
            Ok(())
        })
    }

    /// An image, also a removed one that is still leased.
    pub(crate) fn image(&self, id: &ImageId) -> Result<Option<ImageRecord>> {
        self.read("read an image record", |tables| {
            tables
                .images
                .get(id.as_str())?
                .map(|bytes| parse(bytes.value()))
                .transpose()
        })
    }

    /// The image that a name, an id, or the start of an id means.
    pub(crate) fn find(&self, wanted: &str) -> Result<Option<ImageId>> {
        let candidates: Vec<String> = [Name::parse(wanted).ok().map(|name| name.full())]
            .into_iter()
            .flatten()
            .collect();
        self.read("find an image", |tables| {
            let mut found: Option<String> = None;
            if tables.images.get(wanted)?.is_some() {
                found = Some(wanted.to_owned());
            }
            for name in candidates {
                if found.is_none() {
                    found = tables
                        .names
                        .get(name.as_str())?
                        .map(|id| id.value().to_owned());
                }
            }
            if found.is_none()
                && let Some(start) = start_of_id(wanted)
            {
                let mut matching = Vec::new();
                for entry in tables.images.range(start.as_str()..)? {
                    let (id, bytes) = entry?;
                    if !id.value().starts_with(&start) || matching.len() > 1 {
                        break;
                    }
                    if !parse(bytes.value())?.removed {
                        matching.push(id.value().to_owned());
                    }
                }
                if matching.len() == 1 {
                    found = matching.pop();
                }
            }
            let Some(id) = found else { return Ok(None) };
            match tables.images.get(id.as_str())? {
                Some(bytes) => {
                    let record = parse(bytes.value())?;
                    Ok((!record.removed).then_some(record.id))
                }
                None => Ok(None),
            }
        })
    }

    /// What callers see of an image.
    pub(crate) fn describe(&self, id: &ImageId) -> Result<Option<Image>> {
        Ok(self
            .describe_all()?
            .into_iter()
            .find(|image| image.id == *id))
    }

    /// What callers see of all images, also of removed ones that are still leased.
    pub(crate) fn describe_all(&self) -> Result<Vec<Image>> {
        let (records, names, leased) = self.read("list images", |tables| {
            let mut records = Vec::new();
            for entry in tables.images.iter()? {
                records.push(parse(entry?.1.value())?);
            }
            let mut names = Vec::new();
            for entry in tables.names.iter()? {
                let (name, id) = entry?;
                names.push((name.value().to_owned(), id.value().to_owned()));
            }
            let mut leased = Vec::new();
            for entry in tables.leases.iter()? {
                leased.push(entry?.0.value().1.to_owned());
            }
            Ok((records, names, leased))
        })?;
        records
            .into_iter()
            .map(|record| {
                let (repo_digests, repo_tags) = names
                    .iter()
                    .filter(|(_, id)| id == record.id.as_str())
                    .map(|(name, _)| name.clone())
                    .partition(|name| name.contains('@'));
                let configuration: Configuration = serde_json::from_str(&record.configuration)
                    .map_err(|e| failed(format!("read the configuration of {}", record.id), e))?;
                let leases = leased.iter().filter(|id| *id == record.id.as_str());
                Ok(Image {
                    config: configuration.image_config(),
                    leases: leases.count(),
                    id: record.id,
                    repo_tags,
                    repo_digests,
                    size: record.size,
                    pinned: record.pinned,
                    removed: record.removed,
                })
            })
            .collect()
    }

    /// Forgets an image's names, and the image itself unless it is leased.
    pub(crate) fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.write(&format!("remove image {id}"), |tables| {
            tables.names.retain(|_, named| named != id.as_str())?;
            let mut leased = false;
            for entry in tables.leases.iter()? {
                leased |= entry?.0.value().1 == id.as_str();
            }
            if !leased {
                tables.images.remove(id.as_str())?;
                return Ok(());
            }
            let record = tables
                .images
                .get(id.as_str())?
                .map(|bytes| parse(bytes.value()))
                .transpose()?;
            if let Some(mut record) = record {
                record.removed = true;
                tables
                    .images
                    .insert(id.as_str(), encode(&record)?.as_slice())?;
            }
            Ok(())
        })
    }

    /// Keeps an image for an owner. A removed one can only be kept by who keeps it already.
    pub(crate) fn lease(&self, id: &ImageId, owner: &str) -> Result<()> {
        self.write(&format!("lease image {id}"), |tables| {
            if tables.leases.get((owner, id.as_str()))?.is_some() {
                return Ok(Ok(()));
            }
            let record = tables
                .images
                .get(id.as_str())?
                .map(|bytes| parse(bytes.value()))
                .transpose()?;
            if record.is_none_or(|record| record.removed) {
                return Ok(Err(StoreError::NotFound(id.to_string())));
            }
            tables.leases.insert((owner, id.as_str()), ())?;
            Ok(Ok(()))
        })?
    }

    /// Drops an owner's leases; tells whether that freed an image.
    pub(crate) fn release(&self, owner: &str) -> Result<bool> {
        self.write(&format!("release the images of {owner}"), |tables| {
            let mut freed = Vec::new();
            tables.leases.retain(|(holder, id), ()| {
                if holder == owner {
                    freed.push(id.to_owned());
                }
                holder != owner
            })?;
            let mut any = false;
            for id in freed {
                let mut leased = false;
                for entry in tables.leases.iter()? {
                    leased |= entry?.0.value().1 == id;
                }
                let removed = match tables.images.get(id.as_str())? {
                    Some(bytes) => parse(bytes.value())?.removed,
                    None => false,
                };
                if removed && !leased {
                    tables.images.remove(id.as_str())?;
                    any = true;
                }
            }
            Ok(any)
        })
    }

    pub(crate) fn lease_owners(&self) -> Result<Vec<String>> {
        self.read("list leases", |tables| {
            let mut owners = Vec::new();
            for entry in tables.leases.iter()? {
                owners.push(entry?.0.value().0.to_owned());
            }
            owners.dedup();
            Ok(owners)
        })
    }

    /// The directories that the recorded images need.
    pub(crate) fn needed(&self) -> Result<Needed> {
        self.read("list what images need", |tables| {
            let mut needed = Needed::default();
            for entry in tables.images.iter()? {
                let record = parse(entry?.1.value())?;
                needed.images.insert(image_directory(&record.id));
                needed
                    .layers
                    .extend(record.layers.iter().map(Digest::file_name));
            }
            Ok(needed)
        })
    }

    fn read<T>(
        &self,
        action: &str,
        work: impl FnOnce(&ReadTables) -> std::result::Result<T, redb::Error>,
    ) -> Result<T> {
        let run = || {
            let transaction = self.database.begin_read()?;
            work(&ReadTables {
                images: transaction.open_table(IMAGES)?,
                names: transaction.open_table(NAMES)?,
                leases: transaction.open_table(LEASES)?,
            })
        };
        run().map_err(|e| failed(action, e))
    }

    fn write<T>(
        &self,
        action: &str,
        work: impl FnOnce(&mut WriteTables<'_>) -> std::result::Result<T, redb::Error>,
    ) -> Result<T> {
        let run = || {
            let transaction = self.database.begin_write()?;
            let value = work(&mut WriteTables {
                images: transaction.open_table(IMAGES)?,
                names: transaction.open_table(NAMES)?,
                leases: transaction.open_table(LEASES)?,
            })?;
            transaction.commit()?;
            Ok(value)
        };
        run().map_err(|e: redb::Error| failed(action, e))
    }
}

/// The text as the start of an id, if it can be meant as one. Short ones without their algorithm
/// are not: `cafe` is somebody's repository.
fn start_of_id(text: &str) -> Option<String> {
    const SHORTEST: usize = 8;
    let (digits, shortest) = match text.strip_prefix("sha256:") {
        Some(digits) => (digits, 1),
        None => (text, SHORTEST),
    };
    let fits = digits.len() >= shortest && digits.bytes().all(crate::digest::is_lower_hex);
    fits.then(|| format!("sha256:{digits}"))
}

struct ReadTables {
    images: redb::ReadOnlyTable<&'static str, &'static [u8]>,
    names: redb::ReadOnlyTable<&'static str, &'static str>,
    leases: redb::ReadOnlyTable<(&'static str, &'static str), ()>,
}

struct WriteTables<'t> {
    images: redb::Table<'t, &'static str, &'static [u8]>,
    names: redb::Table<'t, &'static str, &'static str>,
    leases: redb::Table<'t, (&'static str, &'static str), ()>,
}

fn parse(bytes: &[u8]) -> std::result::Result<ImageRecord, redb::Error> {
    serde_json::from_slice(bytes).map_err(|e| redb::Error::Corrupted(format!("image record: {e}")))
}

fn encode(record: &ImageRecord) -> std::result::Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(record).map_err(|e| redb::Error::Corrupted(format!("image record: {e}")))
}

fn failed(
    action: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> StoreError {
    let (action, source) = (action.into(), source.into());
    match source.downcast::<redb::Error>() {
        Ok(error) => match *error {
            redb::Error::Io(e) => StoreError::io(action, e),
            other => StoreError::Records {
                action,
                source: Box::new(other),
            },
        },
        Err(source) => StoreError::Records { action, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str, configuration: &str) -> ImageRecord {
        let id = ImageId::try_from(format!("sha256:{}", text.repeat(64))).unwrap();
        ImageRecord {
            manifest_digest: Digest::try_from(id.to_string()).unwrap(),
            id,
            manifest: "{}".into(),
            configuration: configuration.into(),
            layers: Vec::new(),
            disk: Vec::new(),
            size: 1,
            pinned: false,
            removed: false,
        }
    }

    #[test]
    fn an_image_that_cannot_be_read_is_forgotten_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let (records, lost) = Records::open(&path).unwrap();
        assert!(lost.is_empty());
        let configuration = r#"{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":[]}}"#;
        for (id, name, text) in [("a", "x/a:1", configuration), ("b", "x/b:1", "{")] {
            let record = record(id, text);
            records.put_image(&record, &[name.to_owned()]).unwrap();
        }
        let broken = record("c", configuration).id;
        let put = records.write("break a record", |tables| {
            tables.images.insert(broken.as_str(), b"{".as_slice())?;
            tables.names.insert("x/c:1", broken.as_str())?;
            Ok(())
        });
        put.unwrap();
        drop(records);
        let (records, lost) = Records::open(&path).unwrap();
        assert_eq!(lost.len(), 2, "{lost:?}");
        let names: Vec<_> = records.describe_all().unwrap();
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].repo_tags, ["x/a:1"]);
        for gone in ["x/b:1", "x/c:1"] {
            assert_eq!(records.find(gone).unwrap(), None);
        }
    }

    #[test]
    fn records_of_another_form_are_kept_beside_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images.redb");
        let (records, _) = Records::open(&path).unwrap();
        let transaction = records.database.begin_write().unwrap();
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert("format", FORMAT + 1).unwrap();
        drop(meta);
        transaction.commit().unwrap();
        drop(records);
        let (records, lost) = Records::open(&path).unwrap();
        assert!(lost[0].contains("form 2"), "{lost:?}");
        assert!(records.describe_all().unwrap().is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
