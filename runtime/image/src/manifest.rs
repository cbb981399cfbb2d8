//! Manifests, indexes and configurations of OCI images and of Docker's schema 2, as far as a pull
//! needs them.

pub(crate) mod types;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::PullError;
use crate::image::ImageConfig;
use crate::shown::{json_error, line};

use types::{CONFIG_TYPES, IMAGE_TYPES, INDEX_TYPES, LAYER_TYPES};

/// Largest image configuration, bytes; as for other runtimes.
pub(crate) const MAX_CONFIGURATION: u64 = 4 << 20;
/// Most characters of a document's text in a message.
const MAX_SHOWN: usize = 100;

/// A manifest or index as it came.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
    pub(crate) content_type: String,
}

/// A blob or manifest that a document names.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: String,
}

/// What a name points at.
#[derive(Debug)]
pub(crate) enum Manifest {
    /// Goes on at the manifest for this node's platform.
    Index(Descriptor),
    Image {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u64,
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Manifest {
    pub(crate) fn parse(document: &Document) -> Result<Self, PullError> {
        let unusable = |reason: String| PullError::Unsupported {
            what: format!("manifest {}", document.digest),
            reason,
        };
        let raw: RawManifest = serde_json::from_slice(&document.bytes)
            .map_err(|e| unusable(format!("is not a manifest: {}", json_error(&e))))?;
        if raw.schema_version != 2 {
            return Err(unusable(format!(
                "has schema version {}",
                raw.schema_version
            )));
        }
        let header = document
            .content_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim();
        // The document's own word counts; some servers send a general type in the header.
        let media_type = match &raw.media_type {
            Some(media_type) => media_type.as_str(),
            None if INDEX_TYPES.contains(&header) || IMAGE_TYPES.contains(&header) => header,
            None if raw.manifests.is_some() => INDEX_TYPES[0],
            None => IMAGE_TYPES[0],
        };
        if INDEX_TYPES.contains(&media_type) {
            let manifests = raw.manifests.unwrap_or_default();
            return choose(manifests)
                .map(Self::Index)
                .ok_or_else(|| unusable("has no image for linux/amd64".into()));
        }
        if !IMAGE_TYPES.contains(&media_type) {
            return Err(unusable(format!(
                "has the media type {:?}, which is no image's",
                line(media_type, MAX_SHOWN)
            )));
        }
        let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
            return Err(unusable("has no configuration or no layers".into()));
        };
        if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
            return Err(unusable(format!(
                "has a configuration of the type {:?}: not a container image",
                line(&config.media_type, MAX_SHOWN)
            )));
        }
        for layer in &layers {
            if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
                return Err(unusable(format!(
                    "has a layer of the unknown type {:?}",
                    line(&layer.media_type, MAX_SHOWN)
                )));
            }
        }
        Ok(Self::Image { config, layers })
    }
}

/// The entry for linux/amd64; the least demanding variant of it; else one that names no platform.
pub(crate) fn choose(manifests: Vec<Descriptor>) -> Option<Descriptor> {
    let rank = |entry: &Descriptor| match &entry.platform {
        None => Some("~".to_owned()),
        Some(platform) if platform.os == "linux" && platform.architecture == "amd64" => {
            Some(platform.variant.clone())
        }
        Some(_) => None,
    };
    manifests
        .into_iter()
        .filter_map(|entry| Some((rank(&entry)?, entry)))
        .min_by(|(a, _), (b, _)| a.cmp(b))
        .map(|(_, entry)| entry)
}

/// The configuration blob.
#[derive(Debug, Deserialize)]
pub(crate) struct Configuration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    pub(crate) rootfs: RootFs,
    #[serde(default)]
    config: Option<RawConfig>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Option<Vec<Digest>>,
}

/// `null` stands for "nothing" wherever Go wrote an empty list or map.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    labels: Option<BTreeMap<String, Option<String>>>,
}

impl Configuration {
    pub(crate) fn parse(digest: &Digest, bytes: &[u8]) -> Result<Self, PullError> {
        let unusable = |reason: String| PullError::Unsupported {
            what: format!("image configuration {digest}"),
            reason,
        };
        let configuration: Self =
            serde_json::from_slice(bytes).map_err(|e| unusable(json_error(&e)))?;
        let linux = matches!(configuration.os.as_str(), "linux" | "");
        let amd64 = matches!(configuration.architecture.as_str(), "amd64" | "x86_64" | "");
        if !linux || !amd64 {
            return Err(unusable(format!(
                "is for {}/{}, and this node is linux/amd64",
                line(&configuration.os, MAX_SHOWN),
                line(&configuration.architecture, MAX_SHOWN)
            )));
        }
        Ok(configuration)
    }

    /// What containers of the image want.
    pub(crate) fn image_config(&self) -> ImageConfig {
        let Some(raw) = &self.config else {
            return ImageConfig::default();
        };
        ImageConfig {
            user: raw.user.clone().unwrap_or_default(),
            env: raw.env.clone().unwrap_or_default(),
            entrypoint: raw.entrypoint.clone().unwrap_or_default(),
            cmd: raw.cmd.clone().unwrap_or_default(),
            working_dir: raw.working_dir.clone().unwrap_or_default(),
            stop_signal: raw.stop_signal.clone().unwrap_or_default(),
            volumes: raw
                .volumes
                .iter()
                .flatten()
                .map(|(path, _)| path.clone())
                .collect(),
            exposed_ports: raw
                .exposed_ports
                .iter()
                .flatten()
                .map(|(port, _)| port.clone())
                .collect(),
            labels: raw
                .labels
                .iter()
                .flatten()
                .map(|(name, value)| (name.clone(), value.clone().unwrap_or_default()))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Manifest, PullError> {
        Manifest::parse(&Document {
            bytes: text.to_owned().into(),
            digest: Digest::of(text.as_bytes()),
            content_type: String::new(),
        })
    }

    fn entry(number: u8, platform: &str) -> String {
        let digest = Digest::of(&[number]);
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1{platform}}}"#
        )
    }

    #[test]
    fn an_index_leads_to_linux_amd64() {
        let platform = |os: &str, arch: &str, variant: &str| {
            format!(r#","platform":{{"os":"{os}","architecture":"{arch}","variant":"{variant}"}}"#)
        };
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{},{}]}}"#,
            entry(0, &platform("unknown", "unknown", "")),
            entry(1, &platform("linux", "arm64", "v8")),
            entry(2, &platform("linux", "amd64", "v3")),
            entry(3, &platform("linux", "amd64", "")),
            entry(4, ""),
        );
        let Manifest::Index(chosen) = parse(&text).unwrap() else {
            panic!("not an index")
        };
        assert_eq!(chosen.digest, Digest::of(&[3]));
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            entry(1, &platform("linux", "arm64", ""))
        );
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("linux/amd64"), "{error}");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        for (text, expected) in [
            ("", "not a manifest"),
            ("[]", "not a manifest"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema version 1"),
            (r#"{"schemaVersion":2}"#, "no configuration"),
            (
                r#"{"schemaVersion":2,"mediaType":"application/x-helm"}"#,
                "x-helm",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn nulls_and_absence_mean_nothing() {
        let digest = Digest::of(b"");
        for text in [
            r#"{"rootfs":{"diff_ids":null}}"#,
            r#"{"os":"linux","architecture":"amd64","config":null,"rootfs":{"type":"layers","diff_ids":[]}}"#,
            r#"{"config":{"Env":null,"Cmd":null,"Entrypoint":null,"Volumes":null,"Labels":null},"rootfs":{}}"#,
        ] {
            let configuration = Configuration::parse(&digest, text.as_bytes()).unwrap();
            assert_eq!(configuration.image_config(), ImageConfig::default());
        }
        let text = r#"{"os":"linux","architecture":"arm64","rootfs":{}}"#;
        assert!(
            Configuration::parse(&digest, text.as_bytes())
                .unwrap_err()
                .to_string()
                .contains("linux/arm64")
        );
    }
}
