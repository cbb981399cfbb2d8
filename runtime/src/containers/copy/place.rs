//! What a person names: a path here, one in a container, or a stream.

use std::{convert::Infallible, path::PathBuf, str::FromStr};

/// Where something is copied from or to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Here(PathBuf),
    In {
        container: String,
        path: InContainer,
    },
    /// Standard input or output, as an archive.
    Standard,
}

/// A path in a container, from its root on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InContainer(String);

impl FromStr for Place {
    type Err = Infallible;

    /// A colon behind the name of a container; one in a path here is written behind `./` or `/`.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.split_once(':') {
            _ if text == "-" => Self::Standard,
            Some((container, path)) if !container.is_empty() && !text.starts_with(['.', '/']) => {
                Self::In {
                    container: container.to_owned(),
                    path: InContainer::new(path),
                }
            }
            _ => Self::Here(text.into()),
        })
    }
}

impl InContainer {
    fn new(path: &str) -> Self {
        Self(format!("/{}", path.trim_start_matches('/')))
    }

    /// As it was named.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it has to be a directory.
    pub(super) fn says_directory(&self) -> bool {
        self.0.ends_with('/') || self.says_content()
    }

    /// Whether what is in it is meant.
    pub(super) fn says_content(&self) -> bool {
        self.0.ends_with("/.") || self.name().is_none()
    }

    /// The directory that it is in, and its name there; none for the root and for what is named by `..`.
    pub(super) fn split(&self) -> Option<(&str, &str)> {
        let (parent, name) = self.0.trim_end_matches('/').rsplit_once('/')?;
        let parent = if parent.is_empty() { "/" } else { parent };
        (!matches!(name, "" | "." | "..")).then_some((parent, name))
    }

    fn name(&self) -> Option<&str> {
        self.split().map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_tells_a_container() {
        let place = |text: &str| text.parse::<Place>().unwrap();
        for (text, container, path) in [
            ("web:/etc", "web", "/etc"),
            ("web:etc", "web", "/etc"),
            ("web:", "web", "/"),
            ("ns/pod/name:/a:b", "ns/pod/name", "/a:b"),
        ] {
            let expected = Place::In {
                container: container.into(),
                path: InContainer(path.into()),
            };
            assert_eq!(place(text), expected, "{text}");
        }
        for here in ["a", "./a:b", "/a:b", "../a:b", ":a"] {
            assert_eq!(place(here), Place::Here(here.into()));
        }
        assert_eq!(place("-"), Place::Standard);
    }

    #[test]
    fn a_path_is_a_name_in_a_directory_or_the_content_of_one() {
        for (path, split, content, directory) in [
            ("/a/b", Some(("/a", "b")), false, false),
            ("/a", Some(("/", "a")), false, false),
            ("/a/", Some(("/", "a")), false, true),
            ("/a/.", None, true, true),
            ("/a/..", None, true, true),
            ("/", None, true, true),
        ] {
            let path = InContainer::new(path);
            assert_eq!(path.split(), split, "{path:?}");
            assert_eq!(
                (path.says_content(), path.says_directory()),
                (content, directory),
                "{path:?}"
            );
        }
    }
}
