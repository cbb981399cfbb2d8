//! Plugins that are installed on the node, and started with the daemon: `INDEX-NAME` in their directory, with
//! `INDEX-NAME.conf` or `NAME.conf` as their configuration. Each finds its connection as its standard input.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use tokio::{net::UnixStream, process::Command};
use tracing::warn;

use crate::{
    node::Config,
    plugin::{Launched, Name},
};

/// The longest configuration of a plugin that is read, bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// A plugin in the directory.
#[derive(Debug)]
pub(crate) struct Installed {
    path: PathBuf,
    name: Name,
    config: String,
}

/// The plugins in the directory, by name. Blocks.
pub(crate) fn installed(config: &Config) -> Vec<Installed> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(&config.plugins) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(%error, directory = %config.plugins.display(), "look for NRI plugins");
            }
            return found;
        }
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(name) = runnable(&path) else {
            continue;
        };
        let parsed = name.split_once('-');
        match parsed.map_or(Err("its name is not INDEX-NAME"), |(i, b)| {
            Name::parse(i, b)
        }) {
            Ok(name) => match configuration(&config.configs, &name) {
                Ok(config) => found.push(Installed { path, name, config }),
                Err(error) => warn!(%error, plugin = name.whole(), "read its configuration"),
            },
            Err(reason) => warn!(reason, path = %path.display(), "this is no NRI plugin"),
        }
    }
    found.sort_by_key(|it| it.name.whole());
    found
}

/// The name of a file that can be executed.
fn runnable(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let is_it = meta.is_file() && meta.permissions().mode() & 0o111 != 0;
    is_it.then(|| path.file_name()?.to_str().map(str::to_owned))?
}

/// Of the files that may hold it, the first that is there counts.
fn configuration(directory: &Path, name: &Name) -> io::Result<String> {
    for file in [name.whole(), name.base.clone()] {
        let path = directory.join(format!("{file}.conf"));
        match fs::metadata(&path) {
            Ok(meta) if meta.len() > CONFIG_MAX => {
                return Err(io::Error::other(format!("{} is too long", path.display())));
            }
            Ok(_) => return fs::read_to_string(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(String::new())
}

/// Starts it.
///
/// # Errors
/// When it can't be executed.
pub(crate) fn launch(plugin: Installed) -> io::Result<(UnixStream, Launched)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let process = Command::new(&plugin.path)
        .env_clear()
        .env("NRI_PLUGIN_NAME", &plugin.name.base)
        .env("NRI_PLUGIN_IDX", &plugin.name.index)
        .env("NRI_PLUGIN_SOCKET", "0")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let launched = Launched {
        name: plugin.name,
        config: plugin.config,
        process,
    };
    Ok((UnixStream::from_std(ours)?, launched))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_is_found_in_order_with_its_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join(name);
        let config = Config {
            plugins: of("plugins"),
            configs: of("conf.d"),
            ..Config::default()
        };
        assert!(installed(&config).is_empty());
        fs::create_dir(of("plugins")).unwrap();
        fs::create_dir(of("conf.d")).unwrap();
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o755),
            ("x", 0o755),
            ("30-c", 0o644),
        ] {
            let path = config.plugins.join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::write(config.configs.join("a.conf"), "all a").unwrap();
        fs::write(config.configs.join("20-b.conf"), "this b").unwrap();
        fs::write(config.configs.join("b.conf"), "all b").unwrap();
        let found = installed(&config);
        let found: Vec<_> = found
            .iter()
            .map(|it| (it.name.whole(), it.config.as_str()))
            .collect();
        assert_eq!(
            found,
            [("10-a".to_owned(), "all a"), ("20-b".to_owned(), "this b")]
        );
    }
}
