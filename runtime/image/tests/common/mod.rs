//! What the tests share: images made on the spot, a real registry, and one that misbehaves.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(dead_code, reason = "each test program uses its own part")]
#![allow(
    clippy::allow_attributes,
    reason = "as above: what is unused differs between programs"
)]

pub mod certificates;
pub mod faulty;
pub mod registry;
pub mod worker;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use hull_image::{ImageStore, Limits, Registries};
use sha2::{Digest, Sha256};

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    format!("sha256:{hex}")
}

/// How a layer is stored at the registry.
#[derive(Debug, Clone, Copy)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// The media types that an image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    Oci,
    Docker,
}

/// A blob and what a manifest says about it.
#[derive(Debug, Clone)]
pub struct Blob {
    pub bytes: Vec<u8>,
    pub media_type: String,
}

impl Blob {
    pub fn digest(&self) -> String {
        digest(&self.bytes)
    }

    pub fn descriptor(&self) -> serde_json::Value {
        serde_json::json!({
            "mediaType": self.media_type, "digest": self.digest(), "size": self.bytes.len(),
        })
    }
}

/// An image as a registry has it.
#[derive(Debug, Clone)]
pub struct TestImage {
    pub config: Blob,
    pub layers: Vec<Blob>,
    pub manifest: Blob,
}

impl TestImage {
    /// An image of plain tar layers, packed as told.
    pub fn new(flavor: Flavor, layers: &[(Vec<u8>, Packing)]) -> Self {
        Self::with_config(
            flavor,
            layers,
            &serde_json::json!({"Cmd": ["/bin/sh"], "Env": ["A=b"]}),
        )
    }

    pub fn with_config(
        flavor: Flavor,
        layers: &[(Vec<u8>, Packing)],
        config: &serde_json::Value,
    ) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|(tar, _)| digest(tar)).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let layers = layers
            .iter()
            .map(|(tar, packing)| pack(flavor, tar, *packing))
            .collect();
        Self::from_parts(flavor, config.to_string().into_bytes(), layers)
    }

    pub fn from_parts(flavor: Flavor, config: Vec<u8>, layers: Vec<Blob>) -> Self {
        let (manifest_type, config_type) = match flavor {
            Flavor::Oci => (
                "application/vnd.oci.image.manifest.v1+json",
                "application/vnd.oci.image.config.v1+json",
            ),
            Flavor::Docker => (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.container.image.v1+json",
            ),
        };
        let config = Blob {
            bytes: config,
            media_type: config_type.into(),
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": config.descriptor(),
            "layers": layers.iter().map(Blob::descriptor).collect::<Vec<_>>(),
        });
        let manifest = Blob {
            bytes: manifest.to_string().into_bytes(),
            media_type: manifest_type.into(),
        };
        Self {
            config,
            layers,
            manifest,
        }
    }

    /// The id that a store gives the image.
    pub fn id(&self) -> String {
        self.config.digest()
    }

    /// An index with this image for linux/amd64 and something else for arm64.
    pub fn index(&self, flavor: Flavor) -> Blob {
        let media_type = match flavor {
            Flavor::Oci => "application/vnd.oci.image.index.v1+json",
            Flavor::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        };
        let mut own = self.manifest.descriptor();
        own["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": media_type, "manifests": [own],
        });
        Blob {
            bytes: index.to_string().into_bytes(),
            media_type: media_type.into(),
        }
    }
}

fn pack(flavor: Flavor, tar: &[u8], packing: Packing) -> Blob {
    let (bytes, suffix) = match packing {
        Packing::Plain => (tar.to_vec(), ""),
        Packing::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(tar).unwrap();
            (gzip.finish().unwrap(), "gzip")
        }
        Packing::Zstd => (zstd::encode_all(tar, 1).unwrap(), "zstd"),
    };
    let media_type = match (flavor, suffix) {
        (Flavor::Oci, "") => "application/vnd.oci.image.layer.v1.tar".to_owned(),
        (Flavor::Oci, suffix) => format!("application/vnd.oci.image.layer.v1.tar+{suffix}"),
        (Flavor::Docker, "") => "application/vnd.docker.image.rootfs.diff.tar".to_owned(),
        (Flavor::Docker, suffix) => {
            format!("application/vnd.docker.image.rootfs.diff.tar.{suffix}")
        }
    };
    Blob { bytes, media_type }
}

/// A small layer with these files.
pub fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, path, *contents).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Bytes that do not compress.
pub fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    (0..length)
        .map(|_| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        })
        .collect()
}

/// A store in a directory of its own.
pub struct TestStore {
    pub directory: tempfile::TempDir,
    pub store: ImageStore,
}

impl TestStore {
    pub async fn open() -> Self {
        Self::with(None, |_| {}).await
    }

    pub async fn with(config_dir: Option<PathBuf>, change: impl FnOnce(&mut Limits)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = worker::store(directory.path().join("images"));
        config.registries = Registries { config_dir };
        change(&mut config.limits);
        let store = ImageStore::open(config).await.unwrap();
        Self { directory, store }
    }

    /// Closes the store and opens it again, as a new daemon does.
    pub async fn reopen(self) -> Self {
        let Self { directory, store } = self;
        drop(store);
        let config = worker::store(directory.path().join("images"));
        let store = ImageStore::open(config).await.unwrap();
        Self { directory, store }
    }

    /// Everything in the store's directories, without the database.
    pub fn leftovers(&self) -> Vec<String> {
        let root = self.directory.path().join("images");
        let mut found = Vec::new();
        for directory in ["layers", "images", "tmp"] {
            for entry in fs::read_dir(root.join(directory)).unwrap() {
                found.push(format!(
                    "{directory}/{}",
                    entry.unwrap().file_name().to_string_lossy()
                ));
            }
        }
        found.sort();
        found
    }

    pub fn count(&self, directory: &str) -> usize {
        self.leftovers()
            .iter()
            .filter(|name| name.starts_with(directory))
            .count()
    }

    /// The image's device as one file.
    pub async fn device(&self, name: &str, to: &Path) {
        let image = self.store.get(name).await.unwrap().unwrap();
        let mut out = fs::File::create(to).unwrap();
        for extent in self.store.disk(&image.id).await.unwrap() {
            assert_eq!((extent.offset % 4096, extent.length % 4096), (0, 0));
            assert_eq!(fs::metadata(&extent.path).unwrap().len(), extent.length);
            std::io::copy(&mut fs::File::open(&extent.path).unwrap(), &mut out).unwrap();
        }
        out.flush().unwrap();
    }
}
