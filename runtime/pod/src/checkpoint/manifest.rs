//! What a checkpoint says of itself: a line of text, then JSON.
//!
//! ```text
//! hull-checkpoint 1 <SHA-256 of all that follows the line>
//! {"id":…
//! ```
//! The version is raised with any change that an earlier program would misunderstand; an additional field needs
//! a default. What is read may have been written by anybody who may write there: the values are looked at by
//! those who use them, as those of a request are.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::Path,
};

use hull_base::beneath::Directory;
use hull_image::ImageId;
use hull_proto_vmm::fs::Owner;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use hull_spec::{
    id::ContainerId,
    info::ContainerUser,
    signal::Signal,
    size::VmSize,
    spec::{ContainerSpec, Resources, SandboxSpec},
};

use super::{class::Class, digest};
use crate::record::{LocalRecord, VolumeRecord};

/// The file's name.
pub(crate) const NAME: &str = "manifest";
/// The version that this program writes and reads.
pub(crate) const VERSION: u32 = 1;
const MAGIC: &str = "hull-checkpoint";
/// The longest manifest, in bytes: records are some KiB for each container.
const MAX: u64 = 16 << 20;

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// The label of the VM's snapshot, of this checkpoint alone.
    pub id: String,
    /// Unix time.
    pub created_at_ns: i64,
    /// How long the pod's VM stood still for it.
    pub paused_us: u64,
    pub class: Class,
    pub size: VmSize,
    /// What is behind the slots of the VM.
    pub devices: Vec<SavedDevice>,
    pub spec: SandboxSpec,
    pub containers: Vec<SavedContainer>,
    /// Containers that had ended, which the guest still has something of.
    pub ended: Vec<EndedContainer>,
    /// The paths of the host that the guest has, if its VM has any.
    #[serde(default)]
    pub owners: Option<Vec<Owner>>,
    pub files: Files,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedDevice {
    pub slot: u8,
    pub kind: SavedKind,
}

/// What it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SavedKind {
    /// What all VMs have, and their memory that comes and goes.
    Own,
    Card,
    Scratch,
    Image(SavedImage),
    /// The paths of the host.
    Shares,
    /// The disk of an emptyDir, by its name in the guest.
    Volume(String),
}

/// The disk of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedImage {
    pub id: ImageId,
    /// A name of it, for a person; empty: it has none.
    pub name: String,
    /// Whether the guest has it as memory.
    pub pmem: bool,
    /// Tells where what is on it, as the guest remembers.
    pub layout: String,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedContainer {
    /// What the guest calls it.
    pub guest_id: ContainerId,
    pub spec: ContainerSpec,
    pub image_id: ImageId,
    pub image_ref: String,
    pub image_slot: Option<u8>,
    pub volumes: Vec<VolumeRecord>,
    /// emptyDirs that the guest keeps.
    #[serde(default)]
    pub locals: Vec<LocalRecord>,
    pub stop_signal: Signal,
    pub user: Option<ContainerUser>,
    /// As they were changed; none: never.
    pub resources: Option<Resources>,
    /// What of its outputs was in its log, in bytes.
    pub stdout: u64,
    pub stderr: u64,
}

/// A container that had ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndedContainer {
    pub guest_id: ContainerId,
    pub image_id: ImageId,
    pub image_slot: Option<u8>,
    pub volumes: Vec<VolumeRecord>,
    #[serde(default)]
    pub locals: Vec<LocalRecord>,
}

/// Digests of the other files ([`digest::of_file`]).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Files {
    pub state: String,
    pub memory: String,
    pub scratch: String,
    #[serde(default)]
    pub shares: Option<String>,
    /// Of the disks of emptyDirs, by their names, which are those of the files.
    #[serde(default)]
    pub volumes: BTreeMap<String, String>,
}

/// Why there is no manifest to go by.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("read its manifest")]
    Read(#[from] io::Error),
    #[error("its manifest is none")]
    Foreign,
    #[error("it has version {0}, and this program knows {VERSION}")]
    Version(u32),
    #[error("its manifest was changed")]
    Changed,
    #[error("its manifest makes no sense in line {line}, column {column}")]
    Malformed { line: usize, column: usize },
}

impl Manifest {
    /// The disks of emptyDirs: their slots and names.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = (u8, &str)> {
        let devices = self.devices.iter();
        devices.filter_map(|device| match &device.kind {
            SavedKind::Volume(name) => Some((device.slot, name.as_str())),
            _ => None,
        })
    }

    /// Whether the VM has paths of the host.
    pub(crate) fn has_shares(&self) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|device| device.kind == SavedKind::Shares)
    }

    /// The text of the file.
    ///
    /// # Errors
    /// When it can't be encoded.
    pub(crate) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        // Memory can be read.
        let digest = digest::of(body.as_slice()).unwrap_or_default();
        let mut text = format!("{MAGIC} {VERSION} {digest}\n").into_bytes();
        text.extend(body);
        Ok(text)
    }

    /// Reads the file of the checkpoint in `directory`. Blocks.
    ///
    /// # Errors
    /// [`ManifestError`]
    pub(crate) fn read(directory: &Directory) -> Result<Self, ManifestError> {
        let file = directory.file(Path::new(NAME), OFlags::RDONLY)?;
        let mut text = Vec::new();
        file.take(MAX + 1).read_to_end(&mut text)?;
        Self::decode(&text)
    }

    fn decode(text: &[u8]) -> Result<Self, ManifestError> {
        let end = text.iter().position(|byte| *byte == b'\n');
        let (line, body) = text.split_at(end.ok_or(ManifestError::Foreign)?);
        let body = body.get(1..).unwrap_or_default();
        let line = std::str::from_utf8(line).map_err(|_| ManifestError::Foreign)?;
        let words: Vec<&str> = line.split(' ').collect();
        let [MAGIC, version, told] = words[..] else {
            return Err(ManifestError::Foreign);
        };
        let version = version.parse().map_err(|_| ManifestError::Foreign)?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        if digest::of(body)? != told {
            return Err(ManifestError::Changed);
        }
        serde_json::from_slice(body).map_err(|error| ManifestError::Malformed {
            line: error.line(),
            column: error.column(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_proto_vmm::fs::{Access, Propagation, Share};
    use hull_spec::spec::{ContainerMetadata, SandboxMetadata};

    /// One with a value in each field.
    fn example() -> Manifest {
        let image_id = ImageId::try_from(format!("sha256:{}", "ab".repeat(32))).unwrap();
        let id = |byte: &str| ContainerId::try_from(byte.repeat(32)).unwrap();
        let volumes = vec![VolumeRecord {
            mount: 0,
            image_id: image_id.clone(),
            slot: Some(9),
        }];
        let locals = vec![LocalRecord {
            mount: 1,
            directory: "/k/cache".into(),
            storage: "volume-cache".into(),
            slot: Some(10),
        }];
        let spec = SandboxSpec {
            metadata: SandboxMetadata {
                name: "web".into(),
                uid: "uid".into(),
                namespace: "default".into(),
                attempt: 1,
            },
            ..SandboxSpec::default()
        };
        let container = ContainerSpec {
            metadata: ContainerMetadata {
                name: "main".into(),
                attempt: 2,
            },
            ..ContainerSpec::default()
        };
        Manifest {
            id: "0123".into(),
            created_at_ns: 1,
            paused_us: 2,
            class: Class {
                vmm: "a".into(),
                kernel: "b".into(),
                guest_root: "c".into(),
            },
            size: VmSize {
                vcpus: 1,
                memory_mib: 256,
                pluggable_mib: 1024,
                least_mib: 0,
                most_mib: 512,
            },
            devices: vec![
                SavedDevice {
                    slot: 0,
                    kind: SavedKind::Own,
                },
                SavedDevice {
                    slot: 3,
                    kind: SavedKind::Card,
                },
                SavedDevice {
                    slot: 4,
                    kind: SavedKind::Scratch,
                },
                SavedDevice {
                    slot: 6,
                    kind: SavedKind::Shares,
                },
                SavedDevice {
                    slot: 10,
                    kind: SavedKind::Volume("volume-cache".into()),
                },
                SavedDevice {
                    slot: 8,
                    kind: SavedKind::Image(SavedImage {
                        id: image_id.clone(),
                        name: "registry.test/app:1".into(),
                        pmem: true,
                        layout: "d".into(),
                    }),
                },
            ],
            spec,
            containers: vec![SavedContainer {
                guest_id: id("1f"),
                spec: container,
                image_id: image_id.clone(),
                image_ref: "registry.test/app@sha256:1".into(),
                image_slot: Some(8),
                volumes: volumes.clone(),
                locals: locals.clone(),
                stop_signal: Signal::TERM,
                user: Some(ContainerUser {
                    uid: 1,
                    gid: 2,
                    groups: vec![3],
                }),
                resources: Some(Resources::default()),
                stdout: 5,
                stderr: 6,
            }],
            ended: vec![EndedContainer {
                guest_id: id("2f"),
                image_id,
                image_slot: Some(8),
                volumes,
                locals,
            }],
            owners: Some(vec![Owner {
                name: "1f".into(),
                shares: vec![(
                    0,
                    Share {
                        path: "/srv".into(),
                        access: Access::ReadWrite,
                        propagation: Propagation::Private,
                    },
                )],
                uses: vec!["2f".into()],
                has_ended: false,
            }]),
            files: Files {
                state: "e".into(),
                memory: "f".into(),
                scratch: "g".into(),
                shares: Some("h".into()),
                volumes: BTreeMap::from([("volume-cache".into(), "i".into())]),
            },
        }
    }

    /// Checkpoints outlive the programs that wrote them.
    #[test]
    fn a_manifest_of_this_version_is_read_ever_after() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/manifest-1");
        let written = example().encode().unwrap();
        if std::env::var_os("HULL_WRITE_MANIFEST").is_some() {
            std::fs::write(&path, &written).unwrap();
        }
        let kept = std::fs::read(&path).unwrap();
        assert_eq!(Manifest::decode(&kept).unwrap(), example());
        assert!(
            kept == written,
            "the form of a manifest changed: raise VERSION if earlier programs misunderstand it, and run \
             this test with HULL_WRITE_MANIFEST=1 when what is kept is read all the same"
        );
    }

    #[test]
    fn a_byte_that_was_changed_is_found() {
        let whole = example().encode().unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert!(Manifest::decode(&changed).is_err(), "byte {at}");
        }
        for length in [0, 10, 60, whole.len() - 1] {
            assert!(
                Manifest::decode(&whole[..length]).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_refusal_says_what_is_wrong() {
        let told = |text: &[u8]| Manifest::decode(text).unwrap_err().to_string();
        assert_eq!(told(b"hello\nworld"), "its manifest is none");
        assert_eq!(
            told(b"hull-checkpoint 7 x\n{}"),
            "it has version 7, and this program knows 1"
        );
        assert_eq!(told(b"hull-checkpoint 1 x\n{}"), "its manifest was changed");
        let line = format!("hull-checkpoint 1 {}\n", digest::of(&b"{}"[..]).unwrap());
        let nothing = [line.as_bytes(), b"{}"].concat();
        assert_eq!(
            told(&nothing),
            "its manifest makes no sense in line 1, column 2"
        );
    }
}
