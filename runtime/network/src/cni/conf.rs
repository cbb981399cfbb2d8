//! Finds and reads the network configuration of the node (CNI spec section 1).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Why there is no network configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    /// The directory has no `.conflist`, `.conf` or `.json` file.
    #[error("no CNI network configuration in {0}")]
    None(PathBuf),
    /// It can't be read.
    #[error("read CNI configuration {path}")]
    Read {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It isn't what the spec asks for.
    #[error("CNI configuration {path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A network: a chain of plugins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// Its name.
    pub name: String,
    /// The spec version that its plugins are asked to speak.
    pub cni_version: String,
    /// The plugins, in the order of ADD.
    pub plugins: Vec<Plugin>,
}

/// One plugin of a chain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plugin {
    /// The name of its program.
    pub kind: String,
    /// The capabilities that it declares.
    pub capabilities: Vec<String>,
    /// Its configuration as it stands in the file.
    pub conf: Value,
}

/// Reads the first configuration file of `dir` in name order, as kubelet's
/// runtimes have always chosen it.
///
/// # Errors
/// When there is none, or the first one is broken: a later one is not taken
/// instead, because that would move pods to another network.
pub fn load(dir: &Path) -> Result<NetworkList, ConfError> {
    let unreadable = |source| ConfError::Read {
        path: dir.to_owned(),
        source,
    };
    let mut files: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|entry| entry.map(|e| e.path()))
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(unreadable(error)),
    };
    files.retain(|path| {
        path.extension()
            .is_some_and(|e| e == "conflist" || e == "conf" || e == "json")
    });
    files.sort();
    let Some(path) = files.first() else {
        return Err(ConfError::None(dir.to_owned()));
    };
    let text = fs::read(path).map_err(|source| ConfError::Read {
        path: path.clone(),
        source,
    })?;
    parse(&text).map_err(|reason| ConfError::Invalid {
        path: path.clone(),
        reason,
    })
}

fn parse(text: &[u8]) -> Result<NetworkList, String> {
    let value: Value = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let name = field(&value, "name")?;
    let cni_version = value
        .get("cniVersion")
        .and_then(Value::as_str)
        .unwrap_or("0.2.0")
        .to_owned();
    let plugins = match value.get("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => {
            plugins.iter().map(plugin).collect::<Result<_, _>>()?
        }
        Some(_) => return Err("plugins is not a list with an entry".into()),
        // A single plugin (`.conf`): the file is its configuration.
        None => vec![plugin(&value)?],
    };
    Ok(NetworkList {
        name,
        cni_version,
        plugins,
    })
}

fn plugin(conf: &Value) -> Result<Plugin, String> {
    let kind = field(conf, "type")?;
    if kind.contains('/') {
        return Err(format!("plugin type {kind:?} is a path"));
    }
    let capabilities = conf.get("capabilities").and_then(Value::as_object);
    let capabilities = capabilities.into_iter().flatten();
    Ok(Plugin {
        kind,
        capabilities: capabilities
            .filter(|(_, on)| on.as_bool() == Some(true))
            .map(|(name, _)| name.clone())
            .collect(),
        conf: conf.clone(),
    })
}

fn field(value: &Value, name: &str) -> Result<String, String> {
    match value.get(name).and_then(Value::as_str) {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("{name} is missing or not a text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_file_in_name_order_counts() {
        let dir = tempfile::tempdir().unwrap();
        let list = r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge"},
            {"type":"portmap","capabilities":{"portMappings":true,"bandwidth":false}}]}"#;
        fs::write(dir.path().join("10-a.conflist"), list).unwrap();
        fs::write(dir.path().join("20-b.conf"), r#"{"name":"b","type":"ptp"}"#).unwrap();
        fs::write(dir.path().join("00-notes.txt"), "not a conf").unwrap();
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded.name, "a");
        assert_eq!(loaded.plugins[1].capabilities, ["portMappings"]);
    }

    #[test]
    fn a_single_plugin_file_is_a_list_of_one() {
        let list = parse(br#"{"name":"b","type":"ptp"}"#).unwrap();
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.cni_version, "0.2.0");
    }

    #[test]
    fn none_and_broken_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(ConfError::None(_))));
        assert!(matches!(
            load(&dir.path().join("absent")),
            Err(ConfError::None(_))
        ));
        for text in [
            "{",
            r#"{"name":"x"}"#,
            r#"{"name":"x","plugins":[]}"#,
            r#"{"name":"x","type":"../evil"}"#,
            r#"{"type":"bridge"}"#,
        ] {
            fs::write(dir.path().join("a.conf"), text).unwrap();
            let error = load(dir.path()).unwrap_err();
            assert!(matches!(error, ConfError::Invalid { .. }), "{text}");
        }
    }
}
