//! Images that the kubelet's garbage collection must leave alone.

use crate::reference::Name;

/// Names of images to pin: whole ones, or starts of full names that end with `*`.
///
/// A pin keeps the kubelet from choosing the image for removal (`Image.pinned` of CRI). It is no
/// lock: who removes the image by name gets what they ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PinnedImages {
    names: Vec<String>,
    starts: Vec<String>,
}

/// The text is neither an image name nor the start of one.
#[derive(Debug, thiserror::Error)]
#[error("parse pinned image {pattern:?}: {reason}")]
pub struct InvalidPin {
    pattern: String,
    reason: String,
}

impl PinnedImages {
    /// Reads names such as `busybox`, `registry.k8s.io/pause:3.10` and `registry.k8s.io/*`.
    ///
    /// # Errors
    /// When one is no image name, or has a `*` elsewhere than at its end.
    pub fn parse(patterns: &[String]) -> Result<Self, InvalidPin> {
        let mut pinned = Self::default();
        for pattern in patterns {
            let invalid = |reason: String| InvalidPin {
                pattern: pattern.clone(),
                reason,
            };
            match pattern.strip_suffix('*') {
                Some(start) if start.is_empty() || start.contains(['*', '?', '[']) => {
                    return Err(invalid("a * stands at the end of a name only".into()));
                }
                Some(start) => pinned.starts.push(start.to_owned()),
                None => {
                    let name = Name::parse(pattern).map_err(|e| invalid(e.to_string()))?;
                    pinned.names.push(name.full());
                }
            }
        }
        Ok(pinned)
    }

    /// Whether a full name is pinned.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.names.iter().any(|pinned| pinned == name)
            || self.starts.iter().any(|start| name.starts_with(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned(patterns: &[&str]) -> Result<PinnedImages, InvalidPin> {
        PinnedImages::parse(&patterns.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn names_are_whole_or_start_so() {
        let pinned = pinned(&["busybox", "registry.k8s.io/*", "quay.io/a/b:v*"]).unwrap();
        for name in [
            "docker.io/library/busybox:latest",
            "registry.k8s.io/pause:3.10",
            "quay.io/a/b:v1",
        ] {
            assert!(pinned.has(name), "{name}");
        }
        for name in [
            "docker.io/library/busybox:1",
            "quay.io/a/b:latest",
            "xregistry.k8s.io/pause:3.10",
        ] {
            assert!(!pinned.has(name), "{name}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["", "*", "*pause*", "UPPER", "a b"] {
            assert!(pinned(&[bad]).is_err(), "{bad}");
        }
    }
}
