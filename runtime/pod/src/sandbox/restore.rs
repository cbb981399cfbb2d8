//! A checkpoint that a sandbox goes on from: found to be whole, and to fit this node, before anything is made.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
};

use error_reporter::Report;
use hull_image::{DiskExtent, ImageId};
use hull_proto_vmm::{DeviceConfig, FdIndex, MAX_FDS, fs::Share};
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};

use hull_base::{beneath::Directory, blocking};
use hull_spec::{
    config::ImageDevice,
    error::PodError,
    size::{Room, VmSize},
    spec::SandboxSpec,
};

use crate::{
    checkpoint::{
        aside::{MEMORY, SCRATCH, SHARES, STATE},
        digest,
        image::saved_image,
        manifest::{Manifest, SavedDevice, SavedImage, SavedKind},
    },
    node::Node,
    storage::{
        devices,
        empty_dir::{self, LocalVolume},
        host_device::BlockDevice,
        host_files::SavedFiles,
    },
};

/// What is tried.
pub(crate) const ACTION: &str = "restore a pod";
/// The longest state of a VM, in bytes.
const STATE_MAX: u64 = 64 << 20;

/// A checkpoint that fits this node.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub manifest: Manifest,
    /// A sealed copy.
    state: OwnedFd,
    memory: File,
    /// Whose copies are the scratch disks of pods.
    pub scratch: Arc<File>,
    images: Vec<AttachedImage>,
    /// What the guest knows of the host's files, if it has any.
    pub shares: Option<SavedFiles>,
    /// Where the disks of emptyDirs are for this pod, by slot.
    pub volumes: BTreeMap<u8, LocalVolume>,
    /// The disks of emptyDirs as they were, by name.
    disks: BTreeMap<String, File>,
}

/// The disk of an image, as the guest has it.
#[derive(Debug)]
struct AttachedImage {
    slot: u8,
    id: ImageId,
    device: ImageDevice,
    extents: Vec<DiskExtent>,
}

impl Checkpoint {
    /// Opens the checkpoint in `directory`.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when it is none, was changed, or is not of this node's class, or an image
    /// is missing.
    pub(crate) async fn open(node: &Arc<Node>, directory: &Path) -> Result<Self, PodError> {
        let (of, path) = (Arc::clone(node), directory.to_owned());
        let opened = blocking(move || read(&of, &path)).await;
        let (manifest, files) = opened.map_err(|error| at(directory, &Report::new(error)))?;
        let mut images = Vec::new();
        for SavedDevice { slot, kind } in &manifest.devices {
            if let SavedKind::Image(saved) = kind {
                images.push(attached(node, directory, *slot, saved).await?);
            }
        }
        Ok(Self {
            manifest,
            state: files.state,
            memory: files.memory,
            scratch: Arc::new(files.scratch),
            images,
            shares: files.shares,
            volumes: BTreeMap::new(),
            disks: files.disks,
        })
    }

    /// Makes the disks of emptyDirs, by slot and name. What only containers had that have ended is in a file of
    /// `data` without a name. Blocks.
    ///
    /// # Errors
    /// When one can't be made.
    pub(crate) fn make_volumes(
        &self,
        data: &Path,
    ) -> Result<Vec<(u8, String, BlockDevice)>, PodError> {
        let volumes = self.manifest.volumes();
        let known = volumes.filter_map(|(slot, name)| Some((slot, name, self.disks.get(name)?)));
        let made = known.map(|(slot, name, from)| {
            let device = match self.volumes.get(&slot) {
                Some(volume) => volume.restore(from)?,
                None => empty_dir::restore_unnamed(from, data)?,
            };
            Ok((slot, name.to_owned(), device))
        });
        made.collect()
    }

    /// Has the guest's shares be others, by what they were. It gets no other ones: what is left are those of containers
    /// that have ended, or what a checkpoint says that nobody asked for.
    pub(crate) fn move_shares(&mut self, moved: &[(Share, Share)]) {
        let owners = self.shares.iter_mut().flat_map(|shares| &mut shares.owners);
        for owner in owners {
            owner.shares.retain_mut(|(_, share)| {
                let mut moved = moved.iter();
                let new = moved.find(|(old, _)| old == share).map(|(_, new)| new);
                new.inspect(|new| share.clone_from(new)).is_some()
            });
        }
    }

    /// Returns the files for a VMM: state, memory.
    ///
    /// # Errors
    /// When the daemon has no more descriptors.
    pub(crate) fn files(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.state.try_clone()?, self.memory.try_clone()?.into()])
    }

    /// The specification of a sandbox that goes on from it: what is asked for, but for what the guest has of its
    /// own; without one that of the sandbox that was saved.
    ///
    /// # Errors
    /// When a user namespace is asked for.
    pub(crate) fn spec(&self, asked: Option<SandboxSpec>) -> Result<SandboxSpec, PodError> {
        let saved = &self.manifest.spec;
        let Some(asked) = asked else {
            return Ok(saved.clone());
        };
        if asked.namespaces.user_namespace.is_some() {
            let reason = "it has no user namespace, and can't get one";
            return Err(PodError::precondition(ACTION, reason));
        }
        let mut sysctls = saved.sysctls.clone();
        sysctls.extend(asked.sysctls.clone());
        Ok(SandboxSpec {
            namespaces: saved.namespaces.clone(),
            security: saved.security.clone(),
            sysctls,
            ..asked
        })
    }

    /// The size of its VM, which can't be another one but for how much memory it may get beside that of its start.
    ///
    /// # Errors
    /// When there is no room for it.
    pub(crate) fn size(&self, room: Room) -> Result<VmSize, PodError> {
        let mut size = self.manifest.size;
        let most = room.of_guest();
        if most < size.memory_mib {
            let (memory, room) = (size.memory_mib, most);
            return Err(PodError::precondition(
                ACTION,
                format!("its VM has {memory} MiB of memory, and its cgroup has room for {room}"),
            ));
        }
        size.most_mib = size.most_mib.min(most - size.memory_mib);
        size.least_mib = size.least_mib.min(size.most_mib);
        Ok(size)
    }

    /// Slots of the cards that the guest had, which it is to let go of.
    pub(crate) fn cards(&self) -> impl Iterator<Item = u8> {
        let devices = self.manifest.devices.iter();
        let cards = devices.filter(|device| device.kind == SavedKind::Card);
        cards.map(|device| device.slot)
    }

    /// Devices that the guest has but for those of all VMs: cards without a cable, and images. `send` puts a
    /// descriptor among those that go with them.
    ///
    /// # Errors
    /// When a disk can't be opened, or there are too many.
    pub(crate) fn devices(
        &self,
        send: &mut impl FnMut(OwnedFd) -> FdIndex,
    ) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
        let card = |slot| {
            let unplugged = DeviceConfig::Net {
                taps: Vec::new(),
                mac: [0; 6],
                mtu: None,
            };
            (slot, unplugged)
        };
        let mut all: Vec<_> = self.cards().map(card).collect();
        let mut sent = 0;
        for image in &self.images {
            let (device, fds) = devices::device(&image.id, &image.extents, image.device)?;
            sent += fds.len();
            if sent > MAX_FDS / 2 {
                return Err(PodError::precondition(
                    ACTION,
                    "its images are made of too many files",
                ));
            }
            all.push((image.slot, sent_with(device, fds, send)));
        }
        Ok(all)
    }
}

/// A disk whose files are sent with it: they are named by where `send` puts them.
pub(super) fn sent_with(
    mut device: DeviceConfig,
    fds: Vec<OwnedFd>,
    send: &mut impl FnMut(OwnedFd) -> FdIndex,
) -> DeviceConfig {
    let indices: Vec<FdIndex> = fds.into_iter().map(send).collect();
    if let DeviceConfig::Block { extents, .. } | DeviceConfig::Pmem { extents } = &mut device {
        for extent in extents {
            // It names one of those that came with it.
            if let Some(index) = indices.get(extent.file.0 as usize) {
                extent.file = *index;
            }
        }
    }
    device
}

/// Why a checkpoint can't be used.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Manifest(#[from] crate::checkpoint::manifest::ManifestError),
    #[error(transparent)]
    Class(#[from] crate::checkpoint::class::Other),
    #[error(transparent)]
    Node(#[from] PodError),
    #[error("read its file {0:?}")]
    File(String, #[source] io::Error),
    #[error("its file {0:?} was changed")]
    Changed(String),
    #[error("it does not say what its emptyDirs are")]
    Volumes,
    #[error("it does not say what paths of the host its guest has")]
    Shares,
    #[error("open it")]
    Open(#[source] io::Error),
}

/// What is in the files beside the manifest.
struct Contents {
    state: OwnedFd,
    memory: File,
    scratch: File,
    disks: BTreeMap<String, File>,
    shares: Option<SavedFiles>,
}

/// Reads and checks all that is in a checkpoint. Blocks.
fn read(node: &Node, directory: &Path) -> Result<(Manifest, Contents), ReadError> {
    let at = Directory::open(directory).map_err(ReadError::Open)?;
    let manifest = Manifest::read(&at)?;
    node.classes.of(&node.config)?.accepts(&manifest.class)?;
    let failed = |name: &str| {
        let name = name.to_owned();
        move |e| ReadError::File(name, e)
    };
    let open = |name: &str| {
        at.file(Path::new(name), OFlags::RDONLY)
            .map_err(failed(name))
    };
    let check = |name: &str, file: &File, told: &str| {
        let digest = digest::of_file(file).map_err(failed(name))?;
        (digest == told)
            .then_some(())
            .ok_or_else(|| ReadError::Changed(name.to_owned()))
    };
    let files = &manifest.files;
    // The VMM reads a copy that stays what was looked at.
    let state = sealed(&open(STATE)?).map_err(failed(STATE))?;
    let (memory, scratch) = (open(MEMORY)?, open(SCRATCH)?);
    check(STATE, &state, &files.state)?;
    check(MEMORY, &memory, &files.memory)?;
    check(SCRATCH, &scratch, &files.scratch)?;
    let mut disks = BTreeMap::new();
    for (_, name) in manifest.volumes() {
        let told = files.volumes.get(name);
        let told = told.filter(|_| empty_dir::is_storage(name));
        let told = told.ok_or(ReadError::Volumes)?;
        let disk = open(name)?;
        check(name, &disk, told)?;
        disks.insert(name.to_owned(), disk);
    }
    let shares = match (&manifest.owners, &files.shares) {
        (Some(owners), Some(told)) if manifest.has_shares() => {
            let mut file = sealed(&open(SHARES)?).map_err(failed(SHARES))?;
            check(SHARES, &file, told)?;
            let mut state = Vec::new();
            // To look for holes moves it.
            let read = file.rewind().and_then(|()| file.read_to_end(&mut state));
            read.map_err(failed(SHARES))?;
            let owners = owners.clone();
            Some(SavedFiles { owners, state })
        }
        (None, None) if !manifest.has_shares() => None,
        _ => return Err(ReadError::Shares),
    };
    let contents = Contents {
        state: state.into(),
        memory,
        scratch,
        disks,
        shares,
    };
    Ok((manifest, contents))
}

/// A copy of a file that nobody can change.
fn sealed(file: &File) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy = File::from(memfd_create("checkpoint-state", flags)?);
    io::copy(&mut file.take(STATE_MAX), &mut copy)?;
    copy.flush()?;
    copy.rewind()?;
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&copy, all)?;
    Ok(copy)
}

/// Finds the disk of an image, as it was.
async fn attached(
    node: &Node,
    directory: &Path,
    slot: u8,
    saved: &SavedImage,
) -> Result<AttachedImage, PodError> {
    let SavedImage { id, name, pmem, .. } = saved;
    let known = node.images.get(id.as_str()).await;
    let known = known.map_err(|e| PodError::internal("look for the image", e))?;
    if known.is_none() {
        let reason = format!("its image {name:?} ({id}) is not on this node: pull it");
        return Err(at(directory, &reason));
    }
    let here = saved_image(&*node.images, id, *pmem).await?;
    if here.layout != saved.layout {
        let reason = format!("the disk of its image {name:?} ({id}) is another one on this node");
        return Err(at(directory, &reason));
    }
    let extents = node.images.disk(id).await;
    Ok(AttachedImage {
        slot,
        id: id.clone(),
        device: if *pmem {
            ImageDevice::Pmem
        } else {
            ImageDevice::Block
        },
        extents: extents.map_err(|e| PodError::internal("find the image's disk", e))?,
    })
}

fn at(directory: &Path, reason: &dyn std::fmt::Display) -> PodError {
    PodError::precondition(ACTION, format!("{}: {reason}", directory.display()))
}
