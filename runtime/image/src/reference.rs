//! Image names as people and Kubernetes write them, brought to one full form.

use oci_spec::distribution::Reference;

use crate::digest::Digest;
use crate::error::PullError;

/// A full image name: registry, repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    registry: String,
    repository: String,
    target: Target,
}

/// What a name points with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Tag(String),
    Digest(Digest),
}

/// A registry's host as it is in names of images: Docker Hub has others besides.
#[must_use]
pub fn canonical_registry(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

impl Name {
    /// Parses `busybox`, `quay.io/a/b:tag`, `host:5000/a@sha256:…`; a tag beside a digest is
    /// dropped, as it does not take part in resolving.
    pub(crate) fn parse(text: &str) -> Result<Self, PullError> {
        let invalid = |reason: String| PullError::InvalidReference {
            reference: text.to_owned(),
            reason,
        };
        if text.len() == 64 && text.bytes().all(crate::digest::is_lower_hex) {
            return Err(invalid("64 hex digits are an image id, not a name".into()));
        }
        let reference = Reference::try_from(text).map_err(|e| invalid(e.to_string()))?;
        // The parser takes what stands first for a host, which may have capitals, and finds out too late
        // that it is none.
        if reference.repository().contains(char::is_uppercase) {
            return Err(invalid("a repository has no capital letters".into()));
        }
        let target = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => Target::Digest(
                Digest::try_from(digest.to_owned()).map_err(|e| invalid(e.to_string()))?,
            ),
            (None, tag) => Target::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self {
            registry: reference.registry().to_owned(),
            repository: reference.repository().to_owned(),
            target,
        })
    }

    /// A registry by itself: its host, with a port if it has one.
    pub(crate) fn of_registry(text: &str) -> Result<Self, PullError> {
        let registry = canonical_registry(text);
        // What is no host is taken for a repository of Docker Hub.
        let name = Self::parse(&format!("{registry}/x")).ok();
        let name = name.filter(|name| name.registry == registry);
        let mut name = name.ok_or_else(|| PullError::InvalidReference {
            reference: text.to_owned(),
            reason: "it is no registry: a host, with a port if it has one".into(),
        })?;
        name.repository.clear();
        Ok(name)
    }

    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    pub(crate) fn repository(&self) -> &str {
        &self.repository
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The name with its tag, when it has one.
    pub(crate) fn tagged(&self) -> Option<String> {
        match &self.target {
            Target::Tag(tag) => Some(format!("{}/{}:{tag}", self.registry, self.repository)),
            Target::Digest(_) => None,
        }
    }

    /// The name with a digest in place of its target.
    pub(crate) fn with_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }

    /// The full text of the name.
    pub(crate) fn full(&self) -> String {
        match &self.target {
            Target::Tag(tag) => format!("{}/{}:{tag}", self.registry, self.repository),
            Target::Digest(digest) => self.with_digest(digest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_get_registry_repository_and_tag() {
        let digest = Digest::of(b"").to_string();
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("library/busybox", "docker.io/library/busybox:latest"),
            ("grafana/loki", "docker.io/grafana/loki:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
        ] {
            assert_eq!(Name::parse(short).unwrap().full(), full);
        }
        let both = format!("quay.io/a/b:tag@{digest}");
        let name = Name::parse(&both).unwrap();
        assert_eq!(name.full(), format!("quay.io/a/b@{digest}"));
        assert_eq!(name.tagged(), None);
    }

    #[test]
    fn a_registry_is_a_host() {
        for (text, registry) in [
            ("docker.io", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("quay.io", "quay.io"),
            ("localhost:5000", "localhost:5000"),
            ("127.0.0.1:5000", "127.0.0.1:5000"),
        ] {
            let name = Name::of_registry(text).unwrap();
            assert_eq!((name.registry(), name.repository()), (registry, ""));
        }
        for bad in [
            "",
            "foo",
            "quay.io/a",
            "https://quay.io",
            "a b",
            "quay.io:x",
        ] {
            assert!(Name::of_registry(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_are_none_say_why() {
        let id = "a".repeat(64);
        for bad in [
            "",
            " ",
            "Busybox",
            "Library/busybox",
            "B/a/b:tag",
            "a//b",
            "../etc/passwd",
            "a:b:c",
            "a@sha256:12",
            "a@md5:d41d8cd98f00b204e9800998ecf8427e",
            "http://a/b",
            "a b",
            "a\u{0}",
            &id,
        ] {
            assert!(
                matches!(Name::parse(bad), Err(PullError::InvalidReference { .. })),
                "{bad}"
            );
        }
    }
}
