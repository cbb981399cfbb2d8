//! The files of the configuration, one over the other: `/etc/hull/config.toml`, then those of
//! `/etc/hull/config.d` by their names. A value replaces that of an earlier file, whole.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::{Table, Value};

use super::{error::ConfigError, file::File, keys};

/// What the files say together.
#[derive(Debug, Default)]
pub(super) struct Layers {
    table: Table,
    origins: BTreeMap<String, PathBuf>,
}

impl Layers {
    /// Reads the file, unless it may be absent and is, and then those of the directory.
    pub(super) fn read(
        file: &Path,
        may_be_absent: bool,
        directory: Option<&Path>,
    ) -> Result<Self, ConfigError> {
        let mut layers = Self::default();
        match fs::read_to_string(file) {
            Ok(text) => layers.add(file, &text)?,
            Err(error) if may_be_absent && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(unreadable(file, source)),
        }
        for path in directory.map_or_else(|| Ok(Vec::new()), listed)? {
            let text = fs::read_to_string(&path).map_err(|source| unreadable(&path, source))?;
            layers.add(&path, &text)?;
        }
        Ok(layers)
    }

    /// Puts a file over the others.
    fn add(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let parse = |error: &toml::de::Error| {
            let before = &text[..error.span().map_or(0, |span| span.start)];
            ConfigError::Parse {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                reason: error.message().replace('\n', ", "),
            }
        };
        let table: Table = toml::from_str(text).map_err(|error| parse(&error))?;
        for (key, _) in leaves(&table) {
            if !keys::is_known(&key) {
                return Err(ConfigError::Unknown {
                    path: path.to_owned(),
                    nearest: keys::nearest(&key),
                    key,
                });
            }
        }
        // By itself, since only its own text says in which line a value is of the wrong type.
        let _: File = toml::from_str(text).map_err(|error| parse(&error))?;
        for (key, _) in leaves(&table) {
            self.origins.insert(key, path.to_owned());
        }
        put(&mut self.table, table);
        Ok(())
    }

    /// All of it.
    pub(super) fn file(&self) -> Result<File, ConfigError> {
        let value = Value::Table(self.table.clone());
        File::deserialize(value).map_err(|error| ConfigError::Invalid {
            key: "configuration".to_owned(),
            reason: error.message().to_owned(),
            path: None,
        })
    }

    /// The value of a key and the file that it comes from.
    pub(super) fn value(&self, key: &str) -> Option<(String, &Path)> {
        let (_, value) = leaves(&self.table)
            .into_iter()
            .find(|(name, _)| name == key)?;
        Some((value.to_string(), self.origin(key)?))
    }

    /// The file that says what counts of a key.
    pub(super) fn origin(&self, key: &str) -> Option<&Path> {
        self.origins.get(key).map(PathBuf::as_path)
    }

    /// All keys that are set.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.origins.keys().map(String::as_str)
    }
}

fn unreadable(path: &Path, source: io::Error) -> ConfigError {
    ConfigError::Read {
        path: path.to_owned(),
        source,
    }
}

/// The `.toml` files of a directory by their names; none, when it is not there.
fn listed(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        entries.map(|entry| Ok(entry?.path())).collect()
    };
    let mut paths = read().map_err(|source| unreadable(directory, source))?;
    // What editors and dpkg leave beside a file has other names.
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "toml")
    });
    paths.sort();
    Ok(paths)
}

/// All values that are no tables, with their keys; a table without any counts as one.
fn leaves(table: &Table) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                let inner = leaves(inner).into_iter();
                found.extend(inner.map(|(rest, value)| (format!("{name}.{rest}"), value)));
            }
            _ => found.push((name.clone(), value)),
        }
    }
    found
}

fn put(below: &mut Table, above: Table) {
    for (name, value) in above {
        match (below.get_mut(&name), value) {
            (Some(Value::Table(below)), Value::Table(above)) => put(below, above),
            (_, value) => {
                below.insert(name, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<Layers, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let read = Layers::read(
            &dir.path().join("config.toml"),
            true,
            Some(&dir.path().join("config.d")),
        );
        let prefix = format!("{}/", dir.path().display());
        read.map_err(|error| error.to_string().replace(&prefix, ""))
    }

    #[test]
    fn later_files_replace_single_values() {
        let layers = read(&[
            (
                "config.toml",
                "log = 'warn'\n[vm]\nvcpus = 2\nmemory_mib = 100",
            ),
            ("config.d/20-b.toml", "[vm]\nvcpus = 8"),
            (
                "config.d/10-a.toml",
                "[vm]\nvcpus = 4\n[handlers.x]\nvcpus = 1",
            ),
            ("config.d/10-a.toml.dpkg-old", "log = 'off'"),
        ])
        .unwrap();
        let value = |key| {
            let (value, path) = layers.value(key).unwrap();
            (
                value,
                path.file_name().unwrap().to_owned().into_string().unwrap(),
            )
        };
        assert_eq!(value("vm.vcpus"), ("8".into(), "20-b.toml".into()));
        assert_eq!(value("vm.memory_mib"), ("100".into(), "config.toml".into()));
        assert_eq!(value("log"), ("\"warn\"".into(), "config.toml".into()));
        assert_eq!(value("handlers.x.vcpus").1, "10-a.toml");
        assert_eq!(layers.keys().count(), 4);
        let file = layers.file().unwrap();
        assert_eq!((file.vm.vcpus, file.vm.memory_mib), (Some(8), Some(100)));
    }

    #[test]
    fn no_files_say_nothing() {
        assert_eq!(read(&[]).unwrap().keys().count(), 0);
    }

    #[test]
    fn what_is_wrong_is_told_in_one_line_with_its_place() {
        for (text, said) in [
            (
                "\n[vm]\nmemory_mb = 1",
                "config.d/a.toml: there is no key vm.memory_mb; did you mean vm.memory_mib?",
            ),
            (
                "zzzz = 1",
                "config.d/a.toml: there is no key zzzz; `hull config default` lists all",
            ),
            (
                "[vn]",
                "config.d/a.toml: there is no key vn; `hull config default` lists all",
            ),
            (
                "root = '/a'\nlog = 3",
                "config.d/a.toml: line 2: invalid type: integer `3`, expected a string",
            ),
        ] {
            assert_eq!(
                read(&[("config.d/a.toml", text)]).unwrap_err(),
                said,
                "{text}"
            );
        }
        let error = read(&[("config.toml", "root = '/a'\nlog = ")]).unwrap_err();
        assert!(error.starts_with("config.toml: line 2: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
