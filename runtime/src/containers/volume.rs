//! Paths of the host on the command line (`-v`).

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use anyhow::{Context, Result, bail};
use hull_proto_cri::RESTORE_MOUNT;

/// A path of the host in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Absolute.
    pub(crate) host: PathBuf,
    pub(crate) container: String,
    pub(crate) readonly: bool,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let form = || format!("{text:?} is not HOST:CONTAINER[:ro]");
        let mut parts = text.split(':');
        let (Some(host), Some(container)) = (parts.next(), parts.next()) else {
            return Err(form());
        };
        let readonly = match (parts.next(), parts.next()) {
            (None, _) | (Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(form()),
        };
        if !container.starts_with('/') {
            return Err(format!("{container:?} is not an absolute path"));
        }
        // To docker that is the name of a volume, which there are none of.
        if !host.starts_with(['/', '.']) {
            return Err(format!("{host:?} is no path: it begins with / or ."));
        }
        let host = std::path::absolute(host).map_err(|error| error.to_string())?;
        Ok(Self {
            host,
            container: container.to_owned(),
            readonly,
        })
    }
}

/// Paths of the host for a pod that had some: no checkpoint says by itself what of the host a pod gets.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PathsGiven {
    /// What its containers get where they have a path of the host; read-only if it was
    #[arg(short, long, value_name = "HOST:CONTAINER")]
    volume: Vec<Volume>,
}

impl PathsGiven {
    /// As options of `RestorePod`.
    pub(crate) fn options(&self) -> Result<BTreeMap<String, String>> {
        let options = self.volume.iter().map(|volume| {
            let (host, inside) = (&volume.host, &volume.container);
            if volume.readonly {
                bail!("{inside} stays read-only if it was, and can't be made so: leave :ro out");
            }
            let host = host
                .to_str()
                .with_context(|| format!("{} is not UTF-8", host.display()))?;
            Ok((format!("{RESTORE_MOUNT}{inside}"), host.to_owned()))
        });
        options.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_paths_of_both_sides() {
        let volume = |text: &str| {
            let volume = text.parse::<Volume>();
            volume.map(|v| (v.host, v.container, v.readonly))
        };
        let here = std::env::current_dir().unwrap();
        let data = || "/data".to_owned();
        assert_eq!(volume("/a:/data"), Ok(("/a".into(), data(), false)));
        assert_eq!(volume("/a:/data:rw"), Ok(("/a".into(), data(), false)));
        assert_eq!(volume("/a:/data:ro"), Ok(("/a".into(), data(), true)));
        assert_eq!(volume("./a:/data"), Ok((here.join("a"), data(), false)));
        for bad in [
            "",
            "/a",
            "/a:",
            "/a:data",
            "a:/data",
            "/a:/b:rx",
            "/a:/b:ro:",
            ":/b",
        ] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_of_a_restored_pod_are_options() {
        let options = |texts: &[&str]| {
            let volume = texts.iter().map(|text| text.parse().unwrap()).collect();
            PathsGiven { volume }.options()
        };
        let expected = BTreeMap::from([("mount:/data".to_owned(), "/a".to_owned())]);
        assert_eq!(options(&["/a:/data"]).unwrap(), expected);
        assert_eq!(options(&[]).unwrap(), BTreeMap::new());
        assert!(options(&["/a:/data:ro"]).is_err());
    }
}
