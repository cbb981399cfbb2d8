//! Where an image comes from.

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::archive::Archive;
use crate::digest::Digest;
use crate::error::PullError;
use crate::layer::source::Chunk;
use crate::manifest::{Descriptor, Document};
use crate::registry::Registry;

/// Who has an image's documents and blobs.
#[derive(Debug)]
pub(super) enum Source {
    Registry(Box<Registry>),
    Archive(Archive),
}

impl Source {
    pub(super) async fn manifest(&self, digest: &Digest) -> Result<Document, PullError> {
        match self {
            Self::Registry(registry) => registry.manifest(digest).await,
            Self::Archive(archive) => archive.manifest(digest),
        }
    }

    pub(super) async fn small_blob(
        &self,
        blob: &Descriptor,
        limit: u64,
    ) -> Result<Bytes, PullError> {
        match self {
            Self::Registry(registry) => registry.small_blob(blob, limit).await,
            Self::Archive(archive) => archive.small_blob(blob, limit),
        }
    }

    /// Sends a blob's bytes down a channel; the receiver verifies them. Returns the one server that
    /// they came from.
    pub(super) async fn blob(
        &self,
        blob: &Descriptor,
        chunks: &mpsc::Sender<Chunk>,
        received: impl FnMut(u64),
    ) -> Result<Option<String>, PullError> {
        match self {
            Self::Registry(registry) => registry.blob(blob, chunks, received).await,
            Self::Archive(archive) => {
                archive.blob(blob, chunks, received).await?;
                Ok(None)
            }
        }
    }
}
