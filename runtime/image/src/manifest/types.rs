//! Media types of manifests, indexes, configurations and layers, OCI's and Docker's.

/// What is asked for, in the form of an `Accept` header.
pub(crate) const MANIFEST_TYPES: &str = concat!(
    "application/vnd.oci.image.index.v1+json, ",
    "application/vnd.oci.image.manifest.v1+json, ",
    "application/vnd.docker.distribution.manifest.list.v2+json, ",
    "application/vnd.docker.distribution.manifest.v2+json"
);

pub(super) const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
pub(super) const IMAGE_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
pub(super) const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
pub(super) const LAYER_TYPES: [&str; 9] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

// Those that are written; any of those above are read.
pub(crate) const OCI_MANIFEST: &str = IMAGE_TYPES[0];
pub(crate) const DOCKER_MANIFEST: &str = IMAGE_TYPES[1];
pub(crate) const OCI_CONFIG: &str = CONFIG_TYPES[0];
pub(crate) const DOCKER_CONFIG: &str = CONFIG_TYPES[1];
pub(crate) const OCI_LAYER: &str = LAYER_TYPES[0];
pub(crate) const DOCKER_LAYER: &str = LAYER_TYPES[6];
pub(crate) const OCI_INDEX: &str = INDEX_TYPES[0];
