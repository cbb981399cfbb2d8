//! Finds and reads the network configuration of the node (CNI spec section 1).

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::version::SpecVersion;

/// The most that is read of a file: far above any honest configuration.
const MAX_FILE: u64 = 1 << 20;

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
    pub cni_version: SpecVersion,
    /// All versions that it may be used with; the newest last.
    #[serde(default)]
    pub versions: Vec<SpecVersion>,
    /// CHECK must not be used.
    #[serde(default)]
    pub disable_check: bool,
    /// GC must not be used.
    #[serde(default)]
    pub disable_gc: bool,
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
/// runtimes have always chosen it. Every call reads anew, so a file that
/// changed counts from the next pod on.
///
/// # Errors
/// When there is none, or the first one is broken: a later one is not taken
/// instead, because that would move pods to another network.
pub fn load(dir: &Path) -> Result<NetworkList, ConfError> {
    let files = files(dir, &["conflist", "conf", "json"])?;
    let Some(path) = files.first() else {
        return Err(ConfError::None(dir.to_owned()));
    };
    let invalid = |reason| ConfError::Invalid {
        path: path.clone(),
        reason,
    };
    let value = read(path)?;
    let mut list = parse(&value).map_err(invalid)?;
    // Spec 1.1: plugins may be added by files in a directory with the network's name.
    let more = dir.join(&list.name);
    let inlined_only = flag(&value, "loadOnlyInlinedPlugins").map_err(invalid)?;
    if value.get("type").is_none() && !inlined_only && more.is_dir() {
        for path in self::files(&more, &["conf"])? {
            let added = plugin(&read(&path)?);
            list.plugins
                .push(added.map_err(|reason| ConfError::Invalid { path, reason })?);
        }
    }
    if list.plugins.is_empty() {
        return Err(invalid("it has no plugins".into()));
    }
    Ok(list)
}

/// The files of a directory with one of these extensions, in name order; none without it.
fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, ConfError> {
    let unreadable = |source| ConfError::Read {
        path: dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let paths = entries.map(|entry| entry.map(|e| e.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<Result<_, _>>().map_err(unreadable)?;
    paths.retain(|path| {
        let extension = path.extension().and_then(|e| e.to_str());
        extension.is_some_and(|e| extensions.contains(&e)) && !path.is_dir()
    });
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Value, ConfError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let file = fs::File::open(path)?;
        file.take(MAX_FILE + 1).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| ConfError::Read {
        path: path.to_owned(),
        source,
    })?;
    let invalid = |reason| ConfError::Invalid {
        path: path.to_owned(),
        reason,
    };
    if text.len() as u64 > MAX_FILE {
        return Err(invalid(format!("it is larger than {MAX_FILE} bytes")));
    }
    serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))
}

pub(crate) fn parse(value: &Value) -> Result<NetworkList, String> {
    let name = field(value, "name")?;
    // Plugins make directories of it (libcni has the same rule).
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    {
        return Err(format!("{name:?} is no name of a network"));
    }
    let versions = versions(value)?;
    let plugins = match value.get("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => {
            plugins.iter().map(plugin).collect::<Result<_, _>>()?
        }
        Some(_) => return Err("plugins is not a list with an entry".into()),
        // A single plugin (`.conf`): the file is its configuration.
        None if value.get("type").is_some() => vec![plugin(value)?],
        // All are in files of their own.
        None => Vec::new(),
    };
    Ok(NetworkList {
        name,
        cni_version: versions.last().copied().unwrap_or(SpecVersion::V0_1_0),
        versions,
        disable_check: flag(value, "disableCheck")?,
        disable_gc: flag(value, "disableGC")?,
        plugins,
    })
}

/// The versions that a configuration names and that are known here, the newest last.
fn versions(value: &Value) -> Result<Vec<SpecVersion>, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err("cniVersion is not a text".to_owned()),
    };
    let mut named = Vec::new();
    if let Some(one) = value.get("cniVersion") {
        named.push(text(one)?);
    }
    match value.get("cniVersions") {
        Some(Value::Array(several)) => {
            for one in several {
                named.push(text(one)?);
            }
        }
        Some(_) => return Err("cniVersions is not a list".into()),
        None => {}
    }
    named.retain(|version| !version.is_empty());
    if named.is_empty() {
        return Ok(vec![SpecVersion::V0_1_0]);
    }
    let known = named.iter().filter_map(|version| version.parse().ok());
    let mut known: Vec<SpecVersion> = known.collect();
    known.sort();
    known.dedup();
    if known.is_empty() {
        let newest = SpecVersion::V1_1_0;
        let named = named.join(", ");
        return Err(format!(
            "its CNI version is {named}; versions up to {newest} are known"
        ));
    }
    Ok(known)
}

fn plugin(conf: &Value) -> Result<Plugin, String> {
    let kind = field(conf, "type")?;
    if kind.contains('/') || kind == "." || kind == ".." {
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

/// A flag, which some write as a text.
fn flag(value: &Value, name: &str) -> Result<bool, String> {
    match value.get(name) {
        None => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(format!("{name} is neither true nor false")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_file_in_name_order_counts() {
        let dir = tempfile::tempdir().unwrap();
        let list = r#"{"name":"a","cniVersion":"1.0.0","disableCheck":"True","plugins":[
            {"type":"bridge"},
            {"type":"portmap","capabilities":{"portMappings":true,"bandwidth":false}}]}"#;
        fs::write(dir.path().join("10-a.conflist"), list).unwrap();
        fs::write(dir.path().join("20-b.conf"), r#"{"name":"b","type":"ptp"}"#).unwrap();
        fs::write(dir.path().join("00-notes.txt"), "not a conf").unwrap();
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded.name, "a");
        assert!(loaded.disable_check && !loaded.disable_gc);
        assert_eq!(loaded.plugins[1].capabilities, ["portMappings"]);
        fs::remove_file(dir.path().join("10-a.conflist")).unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "b");
    }

    #[test]
    fn a_single_plugin_file_is_a_list_of_one() {
        let list = parse(&json!({"name": "b", "type": "ptp"})).unwrap();
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.cni_version, SpecVersion::V0_1_0);
    }

    #[test]
    fn plugins_may_be_in_files_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("10-a.conflist");
        fs::write(&file, r#"{"name":"a","cniVersion":"1.1.0"}"#).unwrap();
        assert!(matches!(load(dir.path()), Err(ConfError::Invalid { .. })));
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/1.conf"), r#"{"type":"ptp"}"#).unwrap();
        assert_eq!(load(dir.path()).unwrap().plugins[0].kind, "ptp");
        let list = r#"{"name":"a","plugins":[{"type":"bridge"}]}"#;
        fs::write(&file, list).unwrap();
        assert_eq!(load(dir.path()).unwrap().plugins.len(), 2);
        let list = list.replace("\"plugins\"", "\"loadOnlyInlinedPlugins\":true,\"plugins\"");
        fs::write(&file, list).unwrap();
        assert_eq!(load(dir.path()).unwrap().plugins.len(), 1);
    }

    #[test]
    fn the_newest_known_version_is_taken() {
        let with = |one: Value, several: Value| {
            versions(&json!({"cniVersion": one, "cniVersions": several}))
        };
        let all = with(json!("1.0.0"), json!(["0.4.0", "1.1.0", "1.9.0"])).unwrap();
        assert_eq!(all.last(), Some(&SpecVersion::V1_1_0));
        assert_eq!(all.len(), 3);
        let old = with(json!("0.4.0"), json!(["2.0.0"])).unwrap();
        assert_eq!(old, [SpecVersion::V0_4_0]);
        let error = with(json!("2.0.0"), json!([])).unwrap_err();
        assert!(error.contains("2.0.0"), "{error}");
        assert!(with(json!(1), json!([])).is_err());
        assert!(with(json!("1.0.0"), json!("1.0.0")).is_err());
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
            "[]",
            r#"{"name":"x"}"#,
            r#"{"name":"x","plugins":[]}"#,
            r#"{"name":"x","type":"../evil"}"#,
            r#"{"name":"x","type":".."}"#,
            r#"{"name":"../x","type":"bridge"}"#,
            r#"{"name":"x","type":"bridge","disableGC":1}"#,
            r#"{"type":"bridge"}"#,
        ] {
            fs::write(dir.path().join("a.conf"), text).unwrap();
            let error = load(dir.path()).unwrap_err();
            assert!(matches!(error, ConfError::Invalid { .. }), "{text}");
        }
        let huge = format!("{{\"name\":\"{}\"}}", "x".repeat(1 << 20));
        fs::write(dir.path().join("a.conf"), huge).unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("larger"), "{error}");
    }
}
