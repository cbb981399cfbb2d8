//! Two images, whose disks are one file of zeros.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use hull_image::{DiskExtent, Image, ImageConfig, ImageId, StoreError};
use hull_pod::PodImages;

/// The name of the image of containers.
pub const IMAGE: &str = "registry.test/app:1";
/// The name of another one.
pub const VOLUME: &str = "registry.test/data:1";

#[derive(Debug)]
pub struct FakeImages {
    pub disk: PathBuf,
    /// Size of the disk, bytes.
    pub length: AtomicU64,
    leases: Mutex<BTreeSet<String>>,
    /// There are none.
    pub missing: AtomicBool,
    /// There is no space for another lease.
    pub full: AtomicBool,
    /// The next lease panics.
    pub panic: AtomicBool,
}

impl FakeImages {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        let disk = dir.join("disk");
        fs::write(&disk, vec![0; 8192]).unwrap();
        Self {
            disk,
            length: AtomicU64::new(8192),
            leases: Mutex::default(),
            missing: AtomicBool::new(false),
            full: AtomicBool::new(false),
            panic: AtomicBool::new(false),
        }
    }

    pub fn leases(&self) -> BTreeSet<String> {
        self.leases.lock().unwrap().clone()
    }

    pub fn add_lease(&self, owner: &str) {
        self.leases.lock().unwrap().insert(owner.into());
    }
}

#[async_trait]
impl PodImages for FakeImages {
    async fn get(&self, name_or_id: &str) -> Result<Option<Image>, StoreError> {
        let id = |byte: &str| ImageId::try_from(format!("sha256:{}", byte.repeat(32))).unwrap();
        let mut all = [(IMAGE, id("1f")), (VOLUME, id("2f"))].into_iter();
        let is_meant =
            |(name, id): &(&str, ImageId)| name_or_id == *name || name_or_id == id.as_str();
        let Some((name, id)) = all.find(is_meant) else {
            return Ok(None);
        };
        if self.missing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (repository, _) = name.rsplit_once(':').unwrap();
        Ok(Some(Image {
            repo_tags: vec![name.into()],
            repo_digests: vec![format!("{repository}@{id}")],
            id,
            size: 1,
            config: ImageConfig {
                stop_signal: "SIGTERM".into(),
                ..ImageConfig::default()
            },
            pinned: false,
            leases: 0,
            removed: false,
        }))
    }

    async fn disk(&self, _: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        Ok(vec![DiskExtent {
            path: self.disk.clone(),
            offset: 0,
            length: self.length.load(Ordering::Relaxed),
        }])
    }

    async fn lease(&self, _: &ImageId, owner: &str) -> Result<(), StoreError> {
        if self.full.load(Ordering::Relaxed) {
            return Err(StoreError::NoSpace {
                action: "lease an image".into(),
            });
        }
        self.add_lease(owner);
        assert!(
            !self.panic.swap(false, Ordering::Relaxed),
            "as the test says"
        );
        Ok(())
    }

    async fn release(&self, owner: &str) -> Result<(), StoreError> {
        self.leases.lock().unwrap().remove(owner);
        Ok(())
    }

    async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.leases().into_iter().collect())
    }
}
