//! Names and passwords for registries, in the file that docker, nerdctl and others keep them in:
//! `~/.docker/config.json`, or in the directory that `$DOCKER_CONFIG` names. What else is there stays.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use hull_proto_images::v1::PullRequest;
use serde_json::{Map, Value, json};

use crate::socket::private_directory;

/// How docker calls Docker Hub in this file.
const HUB: &str = "https://index.docker.io/v1/";
/// The objects by registry.
const AUTHS: &str = "auths";

/// The file, which may not be there yet.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
}

/// Gives a pull what is kept for its registry. A file that makes no sense is told of, and the image may do
/// without.
pub(crate) fn complete(request: &mut PullRequest) {
    let found = File::find().and_then(|file| match file {
        // What is wrong with a name is told by who pulls it.
        Some(file) => match hull_image::registry_of(&request.image) {
            Ok(registry) => Ok(file.get(&registry)?.map(|kept| (registry, kept))),
            Err(_) => Ok(None),
        },
        None => Ok(None),
    });
    match found {
        Ok(Some((registry, kept))) => {
            request.username = kept.username;
            request.password = kept.password;
            request.identity_token = kept.identity_token;
            request.registry_token = kept.registry_token;
            request.server_address = registry;
        }
        Ok(None) => {}
        Err(error) => eprintln!("hull: {error:#}; pulling without it"),
    }
}

/// What is kept for a registry.
#[derive(Clone, Default, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
struct Kept {
    username: String,
    password: String,
    identity_token: String,
    registry_token: String,
}

impl File {
    /// None without a home.
    pub(super) fn find() -> Result<Option<Self>> {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let directory = set("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| Some(Path::new(&set("HOME")?).join(".docker")));
        Ok(directory.map(|directory| Self::at(directory.join("config.json"))))
    }

    fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All of it; empty when it is not there.
    pub(super) fn read(&self) -> Result<Map<String, Value>> {
        let about = || format!("read {}", self.path.display());
        let text = match fs::read_to_string(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
            text => text.with_context(about)?,
        };
        match serde_json::from_str(&text).with_context(about)? {
            Value::Object(all) if all.get(AUTHS).is_none_or(Value::is_object) => Ok(all),
            _ => Err(anyhow::anyhow!("it is no configuration of docker's")).with_context(about),
        }
    }

    /// What is kept for a registry.
    fn get(&self, registry: &str) -> Result<Option<Kept>> {
        let all = self.read()?;
        let auths = all.get(AUTHS).and_then(Value::as_object);
        let mut auths = auths.into_iter().flatten();
        let entry = auths.find(|(key, _)| registry_of(key) == registry);
        let Some((_, entry)) = entry else {
            return Ok(None);
        };
        let text = |key| {
            entry
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let mut kept = Kept {
            username: text("username"),
            password: text("password"),
            identity_token: text("identitytoken"),
            registry_token: text("registrytoken"),
        };
        let auth = text("auth");
        if !auth.is_empty() {
            let decoded = BASE64_STANDARD.decode(auth).ok();
            let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
            let Some((username, password)) = pair else {
                bail!(
                    "read {}: what is kept for {registry} makes no sense",
                    self.path.display()
                );
            };
            kept.username = username.to_owned();
            // Docker once ended it like this.
            kept.password = password.trim_end_matches('\0').to_owned();
        }
        // Of an entry without any, the password is in a helper of docker's.
        Ok((kept != Kept::default()).then_some(kept))
    }

    /// Keeps a name and a password.
    pub(super) fn put(&self, registry: &str, username: &str, password: &str) -> Result<()> {
        let mut all = self.read()?;
        let auths = all.entry(AUTHS).or_insert_with(|| json!({}));
        if let Some(auths) = auths.as_object_mut() {
            auths.retain(|key, _| registry_of(key) != registry);
            let key = if registry == "docker.io" {
                HUB
            } else {
                registry
            };
            let auth = BASE64_STANDARD.encode(format!("{username}:{password}"));
            auths.insert(key.to_owned(), json!({ "auth": auth }));
        }
        self.write(&all)
    }

    /// Forgets what is kept for a registry; returns whether there was anything.
    pub(super) fn remove(&self, registry: &str) -> Result<bool> {
        let mut all = self.read()?;
        let Some(auths) = all.get_mut(AUTHS).and_then(Value::as_object_mut) else {
            return Ok(false);
        };
        let before = auths.len();
        auths.retain(|key, _| registry_of(key) != registry);
        if auths.len() == before {
            return Ok(false);
        }
        self.write(&all)?;
        Ok(true)
    }

    /// Writes it anew, for its owner alone (mode 0600), at once or not at all.
    fn write(&self, all: &Map<String, Value>) -> Result<()> {
        let about = || format!("write {}", self.path.display());
        // What a link leads to is replaced, not the link.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let directory = path.parent().unwrap_or_else(|| Path::new("."));
        if !directory.exists() {
            private_directory(directory).with_context(about)?;
        }
        let mut file = tempfile::NamedTempFile::new_in(directory).with_context(about)?;
        let text = serde_json::to_string_pretty(all).with_context(about)? + "\n";
        file.write_all(text.as_bytes()).with_context(about)?;
        file.as_file().sync_all().with_context(about)?;
        file.persist(&path).with_context(about)?;
        Ok(())
    }
}

/// The registry that a key means: a host, or an address as docker writes it.
fn registry_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    let whole = rest.trim_end_matches('/');
    let host = whole
        .strip_suffix("/v1")
        .or_else(|| whole.strip_suffix("/v2"));
    hull_image::canonical_registry(host.unwrap_or(whole))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn kept(username: &str, password: &str) -> Option<Kept> {
        Some(Kept {
            username: username.into(),
            password: password.into(),
            ..Kept::default()
        })
    }

    #[test]
    fn what_docker_wrote_is_understood() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::at(directory.path().join("config.json"));
        assert_eq!(file.get("quay.io").unwrap(), None);
        let auth = |text: &str| BASE64_STANDARD.encode(text);
        let text = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": auth("me:a:b")},
            "quay.io": {"auth": auth("you:pw\0"), "identitytoken": "token"},
            "r.example:5000": {"username": "u", "password": "p"},
            "helped.example": {},
            "odd.example": {"auth": "%"},
        }});
        fs::write(file.path(), text.to_string()).unwrap();
        let get = |registry: &str| file.get(registry).unwrap();
        assert_eq!(get("docker.io"), kept("me", "a:b"));
        let quay = get("quay.io").unwrap();
        assert_eq!(
            (quay.password.as_str(), quay.identity_token.as_str()),
            ("pw", "token")
        );
        assert_eq!(get("r.example:5000"), kept("u", "p"));
        for without in ["helped.example", "r.example", "other.example"] {
            assert_eq!(get(without), None, "{without}");
        }
        let odd = format!("{:#}", file.get("odd.example").unwrap_err());
        assert!(
            odd.contains("odd.example") && odd.contains("config.json"),
            "{odd}"
        );
        for broken in ["", "[]", "{\"auths\": 1}"] {
            fs::write(file.path(), broken).unwrap();
            assert!(file.get("quay.io").is_err(), "{broken}");
            assert!(file.put("quay.io", "a", "b").is_err(), "{broken}");
            assert_eq!(fs::read_to_string(file.path()).unwrap(), broken);
        }
    }

    #[test]
    fn what_is_kept_is_its_owners_alone_and_leaves_the_rest_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real.json");
        fs::write(
            &real,
            r#"{"credsStore": "x", "auths": {"quay.io": {"auth": "eDp5"}}}"#,
        )
        .unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o644)).unwrap();
        let link = directory.path().join("config.json");
        symlink("real.json", &link).unwrap();
        let file = File::at(link);
        file.put("docker.io", "me", "pw").unwrap();
        file.put("docker.io", "me", "new").unwrap();
        assert_eq!(file.get("docker.io").unwrap(), kept("me", "new"));
        assert_eq!(file.get("quay.io").unwrap(), kept("x", "y"));
        assert_eq!(file.read().unwrap()["credsStore"], "x");
        assert!(file.read().unwrap()[AUTHS].get(HUB).is_some());
        assert!(file.path().is_symlink());
        let mode = fs::metadata(&real).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(file.remove("docker.io").unwrap() && !file.remove("docker.io").unwrap());
        assert_eq!(file.get("quay.io").unwrap(), kept("x", "y"));

        let fresh = File::at(directory.path().join("new/config.json"));
        assert!(!fresh.remove("quay.io").unwrap());
        fresh.put("quay.io", "a", "b").unwrap();
        let mode = fs::metadata(fresh.path().parent().unwrap())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
