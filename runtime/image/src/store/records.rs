//! What the store remembers: images, their names, and leases. Every change is on disk before the
//! call returns.
//!
//! What can't be read is forgotten, and said to be: an image can be pulled again.

use std::collections::HashSet;
use std::path::Path;

use hull_base::faults::{self, Point};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::database;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::{Image, ImageId};
use crate::manifest::Configuration;
use crate::reference::Name;

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
/// (diff-ID of a layer, base address of a server, digest of a blob there): the server had that
/// blob, and it was found to be the layer.
const SOURCES: TableDefinition<(&str, &str, &str), ()> = TableDefinition::new("sources");
/// (image id, name): [`NAMES`] the other way round, so that one image is described without a look
/// at the others. This and the next are made anew at open.
const NAMES_OF: TableDefinition<(&str, &str), ()> = TableDefinition::new("names_of");
/// (image id, owner): [`LEASES`] the other way round.
const OWNERS_OF: TableDefinition<(&str, &str), ()> = TableDefinition::new("owners_of");

const POINTS: database::Points = database::Points {
    write: Point::ImagesWrite,
    sync: Point::ImagesSync,
};

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
    pub(crate) disk: Vec<ExtentRecord>,
    /// Manifest, configuration and compressed layers, bytes.
    pub(crate) size: u64,
    pub(crate) pinned: bool,
    /// Removed by name, and kept only for its leases.
    pub(crate) removed: bool,
}

/// The part of an [`ImageRecord`] that says what it keeps; its documents may be MiB.
#[derive(Debug, Deserialize)]
struct Brief {
    id: ImageId,
    layers: Vec<Digest>,
    removed: bool,
}

/// An extent of an image's disk; they follow each other in the order recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExtentRecord {
    /// The layer whose data this is; `None` for the image's metadata.
    pub(crate) layer: Option<Digest>,
    pub(crate) length: u64,
}

/// The database.
#[derive(Debug)]
pub(crate) struct Records {
    store: database::Store,
}

type Result<T> = std::result::Result<T, StoreError>;

impl Records {
    /// Opens the records and forgets what can't be read of them. Tells what was lost.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<String>)> {
        let action = || format!("open {}", path.display());
        let open = || {
            let opened = database::Store::open(path, POINTS);
            let (store, broken) = opened.map_err(|e| failed(action(), e))?;
            Ok((Self { store }, broken))
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
        records.write(&action(), |tables| tables.turn_round())?;
        for lost in &lost {
            tracing::error!("{lost}");
        }
        Ok((records, lost))
    }

    /// Makes the tables. Why these are not ours, if so.
    fn begin(&self, action: &str) -> Result<Option<String>> {
        let run = |database: &Database| -> std::result::Result<_, redb::Error> {
            let transaction = database.begin_write()?;
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
            transaction.open_table(NAMES_OF)?;
            transaction.open_table(OWNERS_OF)?;
            transaction.open_table(SOURCES)?;
            transaction.commit()?;
            Ok(None)
        };
        match self.store.with(run) {
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
                let configuration =
                    parse::<ImageRecord>(bytes.value()).map(|record| record.configuration);
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
                let (name, id) = (name.as_str(), record.id.as_str());
                let before = tables.names.insert(name, id)?;
                let before = before.map(|id| id.value().to_owned());
                if let Some(before) = before {
                    tables.names_of.remove((before.as_str(), name))?;
                }
                tables.names_of.insert((id, name), ())?;
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
        self.read("find an image", |tables| tables.find(wanted))
    }

    /// What callers see of an image.
    pub(crate) fn describe(&self, id: &ImageId) -> Result<Option<Image>> {
        let found = self.read("describe an image", |tables| {
            let bytes = tables.images.get(id.as_str())?;
            let found = bytes.map(|bytes| tables.described(bytes.value()));
            found.transpose()
        });
        found?.map(image).transpose()
    }

    /// What callers see of the image that a name, an id, or the start of an id means.
    pub(crate) fn describe_named(&self, wanted: &str) -> Result<Option<Image>> {
        let found = self.read("find an image", |tables| {
            let Some(id) = tables.find(wanted)? else {
                return Ok(None);
            };
            let bytes = tables.images.get(id.as_str())?;
            let found = bytes.map(|bytes| tables.described(bytes.value()));
            found.transpose()
        });
        found?.map(image).transpose()
    }

    /// What callers see of all images, also of removed ones that are still leased.
    pub(crate) fn describe_all(&self) -> Result<Vec<Image>> {
        let found = self.read("list images", |tables| {
            let mut found = Vec::new();
            for entry in tables.images.iter()? {
                found.push(tables.described(entry?.1.value())?);
            }
            Ok(found)
        });
        found?.into_iter().map(image).collect()
    }

    /// Forgets an image's names, and the image itself unless it is leased.
    pub(crate) fn remove_image(&self, id: &ImageId) -> Result<()> {
        self.write(&format!("remove image {id}"), |tables| {
            for name in seconds(&tables.names_of, id.as_str())? {
                tables.names.remove(name.as_str())?;
                tables.names_of.remove((id.as_str(), name.as_str()))?;
            }
            if seconds(&tables.owners_of, id.as_str())?.is_empty() {
                tables.images.remove(id.as_str())?;
                return Ok(());
            }
            let record = tables
                .images
                .get(id.as_str())?
                .map(|bytes| parse::<ImageRecord>(bytes.value()))
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
            let record = tables.images.get(id.as_str())?;
            let record = record.map(|bytes| parse::<Brief>(bytes.value()));
            if record.transpose()?.is_none_or(|record| record.removed) {
                return Ok(Err(StoreError::NotFound(id.to_string())));
            }
            tables.leases.insert((owner, id.as_str()), ())?;
            tables.owners_of.insert((id.as_str(), owner), ())?;
            Ok(Ok(()))
        })?
    }

    /// Drops an owner's leases; tells whether that freed an image.
    pub(crate) fn release(&self, owner: &str) -> Result<bool> {
        self.write(&format!("release the images of {owner}"), |tables| {
            let mut any = false;
            for id in seconds(&tables.leases, owner)? {
                tables.leases.remove((owner, id.as_str()))?;
                tables.owners_of.remove((id.as_str(), owner))?;
                let leased = !seconds(&tables.owners_of, &id)?.is_empty();
                let removed = match tables.images.get(id.as_str())? {
                    Some(bytes) => parse::<Brief>(bytes.value())?.removed,
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

    /// Remembers that a server had a blob that is a layer.
    pub(crate) fn add_source(&self, layer: &Digest, server: &str, blob: &Digest) -> Result<()> {
        self.write(&format!("record a source of layer {layer}"), |tables| {
            let source = (layer.as_str(), server, blob.as_str());
            tables.sources.insert(source, ())?;
            Ok(())
        })
    }

    /// Whether a server is known to have had a blob that is a layer.
    pub(crate) fn has_source(&self, layer: &Digest, server: &str, blob: &Digest) -> Result<bool> {
        self.read("find a source of a layer", |tables| {
            let source = (layer.as_str(), server, blob.as_str());
            Ok(tables.sources.get(source)?.is_some())
        })
    }

    /// Forgets the sources of layers that are gone.
    pub(crate) fn forget_sources(&self, gone: &HashSet<String>) -> Result<()> {
        self.write("forget sources of layers", |tables| {
            let kept = |(layer, _, _): (&str, &str, &str), ()| !gone.contains(layer);
            tables.sources.retain(kept)?;
            Ok(())
        })
    }

    /// The directories that the recorded images need.
    pub(crate) fn needed(&self) -> Result<Needed> {
        self.read("list what images need", |tables| {
            let mut needed = Needed::default();
            for entry in tables.images.iter()? {
                let record: Brief = parse(entry?.1.value())?;
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
        let run = |database: &Database| {
            let transaction = database.begin_read()?;
            work(&ReadTables {
                images: transaction.open_table(IMAGES)?,
                names: transaction.open_table(NAMES)?,
                names_of: transaction.open_table(NAMES_OF)?,
                owners_of: transaction.open_table(OWNERS_OF)?,
                leases: transaction.open_table(LEASES)?,
                sources: transaction.open_table(SOURCES)?,
            })
        };
        self.store.with(run).map_err(|e| failed(action, e))
    }

    fn write<T>(
        &self,
        action: &str,
        work: impl FnOnce(&mut WriteTables<'_>) -> std::result::Result<T, redb::Error>,
    ) -> Result<T> {
        let run = |database: &Database| {
            let transaction = database.begin_write()?;
            let value = work(&mut WriteTables {
                images: transaction.open_table(IMAGES)?,
                names: transaction.open_table(NAMES)?,
                leases: transaction.open_table(LEASES)?,
                names_of: transaction.open_table(NAMES_OF)?,
                owners_of: transaction.open_table(OWNERS_OF)?,
                sources: transaction.open_table(SOURCES)?,
            })?;
            transaction.commit()?;
            faults::point(Point::ImageRecorded);
            Ok(value)
        };
        self.store.with(run).map_err(|e| failed(action, e))
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
    names_of: redb::ReadOnlyTable<(&'static str, &'static str), ()>,
    owners_of: redb::ReadOnlyTable<(&'static str, &'static str), ()>,
    sources: redb::ReadOnlyTable<(&'static str, &'static str, &'static str), ()>,
}

/// An image's record, its names, and how many leases it has.
type Described = (ImageRecord, Vec<String>, usize);

impl ReadTables {
    fn find(&self, wanted: &str) -> std::result::Result<Option<ImageId>, redb::Error> {
        let mut found = self.images.get(wanted)?.map(|_| wanted.to_owned());
        if found.is_none()
            && let Ok(name) = Name::parse(wanted)
        {
            let id = self.names.get(name.full().as_str())?;
            found = id.map(|id| id.value().to_owned());
        }
        if found.is_none()
            && let Some(start) = start_of_id(wanted)
        {
            let mut matching = Vec::new();
            for entry in self.images.range(start.as_str()..)? {
                let (id, bytes) = entry?;
                if !id.value().starts_with(&start) || matching.len() > 1 {
                    break;
                }
                if !parse::<Brief>(bytes.value())?.removed {
                    matching.push(id.value().to_owned());
                }
            }
            if matching.len() == 1 {
                found = matching.pop();
            }
        }
        let Some(id) = found else { return Ok(None) };
        let record = self.images.get(id.as_str())?;
        let record = record
            .map(|bytes| parse::<Brief>(bytes.value()))
            .transpose()?;
        Ok(record
            .filter(|record| !record.removed)
            .map(|record| record.id))
    }

    fn described(&self, record: &[u8]) -> std::result::Result<Described, redb::Error> {
        let record: ImageRecord = parse(record)?;
        let names = seconds(&self.names_of, record.id.as_str())?;
        let leases = seconds(&self.owners_of, record.id.as_str())?.len();
        Ok((record, names, leases))
    }
}

fn image((record, names, leases): Described) -> Result<Image> {
    let (repo_digests, repo_tags) = names.into_iter().partition(|name| name.contains('@'));
    let configuration: Configuration = serde_json::from_str(&record.configuration)
        .map_err(|e| failed(format!("read the configuration of {}", record.id), e))?;
    Ok(Image {
        config: configuration.image_config(),
        leases,
        id: record.id,
        repo_tags,
        repo_digests,
        size: record.size,
        pinned: record.pinned,
        removed: record.removed,
    })
}

/// The second halves of the keys whose first half is this.
fn seconds(
    table: &impl ReadableTable<(&'static str, &'static str), ()>,
    first: &str,
) -> std::result::Result<Vec<String>, redb::Error> {
    let mut seconds = Vec::new();
    for entry in table.range((first, "")..)? {
        let entry = entry?;
        let key = entry.0.value();
        if key.0 != first {
            break;
        }
        seconds.push(key.1.to_owned());
    }
    Ok(seconds)
}

struct WriteTables<'t> {
    images: redb::Table<'t, &'static str, &'static [u8]>,
    names: redb::Table<'t, &'static str, &'static str>,
    leases: redb::Table<'t, (&'static str, &'static str), ()>,
    names_of: redb::Table<'t, (&'static str, &'static str), ()>,
    owners_of: redb::Table<'t, (&'static str, &'static str), ()>,
    sources: redb::Table<'t, (&'static str, &'static str, &'static str), ()>,
}

impl WriteTables<'_> {
    /// Makes the tables anew that are others the other way round.
    fn turn_round(&mut self) -> std::result::Result<(), redb::Error> {
        self.names_of.retain(|_, ()| false)?;
        for entry in self.names.iter()? {
            let (name, id) = entry?;
            self.names_of.insert((id.value(), name.value()), ())?;
        }
        self.owners_of.retain(|_, ()| false)?;
        for entry in self.leases.iter()? {
            let entry = entry?;
            let (owner, id) = entry.0.value();
            self.owners_of.insert((id, owner), ())?;
        }
        Ok(())
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, redb::Error> {
    #[cfg(test)]
    tests::PARSED.with(|parsed| parsed.set(parsed.get() + 1));
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
mod tests;
