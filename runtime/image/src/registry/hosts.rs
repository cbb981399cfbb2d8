//! Which servers to ask for a registry's images: containerd's `hosts.toml`.
//!
//! `<config_dir>/<registry>/hosts.toml`, else `<config_dir>/_default/hosts.toml`, else the registry
//! itself over https (a loopback address: over http). Mirrors come first, in the order of the
//! file; the registry itself is the last resort. Files are read at every pull, so a change needs
//! no restart.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use reqwest::Url;
use serde::Deserialize;

use crate::config::Registries;
use crate::error::PullError;

/// Where Docker Hub listens.
const HUB: &str = "registry-1.docker.io";

/// A server that may have the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// Scheme, address and path up to and with the API's `/v2`, without a slash at the end.
    pub(crate) base: Url,
    /// May be asked what a tag points at.
    pub(crate) resolve: bool,
    /// May be asked for what has a digest.
    pub(crate) pull: bool,
    /// Whether it stands in for the registry: then it is told which one.
    pub(crate) mirror: bool,
    pub(crate) tls: Tls,
    /// Sent with every request.
    pub(crate) headers: Vec<(String, String)>,
}

/// How the other side proves who it is, and this side.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Tls {
    pub(crate) skip_verify: bool,
    /// Authorities besides the system's, PEM.
    pub(crate) authorities: Vec<Vec<u8>>,
    /// Certificate and key, PEM.
    pub(crate) client: Option<Vec<u8>>,
}

impl Host {
    /// Address for messages.
    pub(crate) fn shown(&self) -> String {
        self.base.origin().ascii_serialization()
    }

    /// Host and port as written in names of images.
    pub(crate) fn authority(&self) -> String {
        authority(&self.base)
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.base.host_str().is_some_and(is_loopback)
    }
}

/// The servers for a registry, in the order to ask them, and whether a file names them.
pub(crate) fn hosts_for(
    registry: &str,
    registries: &Registries,
) -> Result<(Vec<Host>, bool), PullError> {
    let default = registries
        .config_dir
        .as_ref()
        .map(|root| root.join("_default"));
    let of_default = || default.map_or(Ok(None), |directory| in_directory(registry, &directory));
    if let Some(hosts) =
        of_file(registry, registries)?.map_or_else(of_default, |hosts| Ok(Some(hosts)))?
    {
        return Ok((hosts, true));
    }
    let raw = RawHost::default();
    let host = raw
        .host(&origin(registry), Path::new(""))
        .map_err(|reason| PullError::InvalidReference {
            reference: registry.to_owned(),
            reason,
        })?;
    Ok((vec![host], false))
}

/// The servers that a registry's own file names; `None` without a file.
pub(super) fn of_file(
    registry: &str,
    registries: &Registries,
) -> Result<Option<Vec<Host>>, PullError> {
    // The name may be a stranger's; none of a host has these.
    if registry.contains('/') || registry.starts_with('.') {
        return Ok(None);
    }
    for directory in own_directories(registry, registries) {
        if let Some(hosts) = in_directory(registry, &directory)? {
            return Ok(Some(hosts));
        }
    }
    Ok(None)
}

fn in_directory(registry: &str, directory: &Path) -> Result<Option<Vec<Host>>, PullError> {
    let file = directory.join("hosts.toml");
    let broken = |reason: String| PullError::RegistryConfig {
        path: file.clone(),
        reason,
    };
    match fs::read_to_string(&file) {
        Ok(text) => parse(registry, &text, directory).map(Some).map_err(broken),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(broken(e.to_string())),
    }
}

fn own_directories(registry: &str, registries: &Registries) -> Vec<PathBuf> {
    let Some(root) = &registries.config_dir else {
        return Vec::new();
    };
    let mut names = Vec::new();
    // The form for file systems that cannot have colons in names goes first, as in containerd.
    if let Some((host, port)) = registry.split_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.into_iter().map(|name| root.join(name)).collect()
}

/// Where a registry itself listens.
fn origin(registry: &str) -> String {
    match registry {
        "docker.io" => format!("https://{HUB}"),
        _ => {
            let host = registry.split(':').next().unwrap_or_default();
            let secure = !is_loopback(host) || registry.ends_with(":443");
            format!("{}://{registry}", if secure { "https" } else { "http" })
        }
    }
}

/// Host and port of a URL, the port only when it is not the usual one.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[derive(Debug, Default, Deserialize)]
struct RawFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    root: RawHost,
}

#[derive(Debug, Default, Deserialize)]
struct RawHost {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<RawClient>,
    skip_verify: Option<bool>,
    override_path: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// One file with certificate and key, or pairs of files.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum RawClient {
    File(String),
    Files(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

impl OneOrMany {
    fn iter(&self) -> impl Iterator<Item = &String> {
        match self {
            Self::One(one) => std::slice::from_ref(one).iter(),
            Self::Many(many) => many.iter(),
        }
    }
}

pub(crate) fn parse(registry: &str, text: &str, directory: &Path) -> Result<Vec<Host>, String> {
    let file: RawFile = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    let mut hosts = Vec::new();
    for (address, table) in file.host {
        let raw: RawHost = table
            .try_into()
            .map_err(|e: toml::de::Error| format!("host {address:?}: {}", e.message()))?;
        hosts.push(
            raw.host(&address, directory)
                .map_err(|e| format!("host {address:?}: {e}"))?,
        );
    }
    let server = file.server.unwrap_or_else(|| origin(registry));
    hosts.push(
        file.root
            .host(&server, directory)
            .map_err(|e| format!("server {server:?}: {e}"))?,
    );
    let own = origin(registry);
    for host in &mut hosts {
        host.mirror = Url::parse(&own).is_ok_and(|own| own.origin() != host.base.origin());
    }
    Ok(hosts)
}

impl RawHost {
    fn host(&self, address: &str, directory: &Path) -> Result<Host, String> {
        let address = if address.contains("://") {
            address.to_owned()
        } else {
            format!("https://{address}")
        };
        let mut base = Url::parse(&address).map_err(|e| e.to_string())?;
        if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
            return Err("must be an http or https address".into());
        }
        // What people call Docker Hub answers to people alone.
        if matches!(base.host_str(), Some("docker.io" | "index.docker.io")) {
            base.set_host(Some(HUB)).map_err(|e| e.to_string())?;
        }
        base.set_query(None);
        base.set_fragment(None);
        let path = base.path().trim_end_matches('/').to_owned();
        if self.override_path == Some(true) || path.ends_with("/v2") {
            base.set_path(&path);
        } else {
            base.set_path(&format!("{path}/v2"));
        }
        let can = |what: &str| {
            self.capabilities
                .as_ref()
                .is_none_or(|list| list.iter().any(|capability| capability == what))
        };
        let mut headers = Vec::new();
        for (name, values) in &self.header {
            headers.extend(values.iter().map(|value| (name.clone(), value.clone())));
        }
        Ok(Host {
            base,
            resolve: can("resolve"),
            pull: can("pull"),
            mirror: false,
            tls: self.tls(directory)?,
            headers,
        })
    }

    fn tls(&self, directory: &Path) -> Result<Tls, String> {
        let read = |path: &String| {
            let path = directory.join(path);
            fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))
        };
        let authorities = self
            .ca
            .iter()
            .flat_map(OneOrMany::iter)
            .map(read)
            .collect::<Result<Vec<_>, _>>()?;
        let client_files: Vec<&String> = match &self.client {
            None => Vec::new(),
            Some(RawClient::File(file)) => vec![file],
            Some(RawClient::Files(files)) => files.iter().collect(),
            Some(RawClient::Pairs(pairs)) => pairs.iter().take(1).flatten().collect(),
        };
        let mut client = Vec::new();
        for file in client_files {
            client.extend(read(file)?);
            client.push(b'\n');
        }
        Ok(Tls {
            skip_verify: self.skip_verify.unwrap_or(false),
            authorities,
            client: (!client.is_empty()).then_some(client),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        for (registry, url) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("quay.io", "https://quay.io/v2"),
            ("quay.io:8443", "https://quay.io:8443/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1", "http://127.0.0.1/v2"),
        ] {
            let (hosts, from_file) = hosts_for(registry, &Registries::default()).unwrap();
            assert_eq!(urls(&hosts), [url]);
            assert!(!from_file);
            assert!(hosts[0].pull && hosts[0].resolve && !hosts[0].mirror);
        }
    }

    #[test]
    fn mirrors_go_first_in_the_order_of_the_file() {
        let text = r#"
            server = "https://registry.k8s.io"
            [host."http://zz.example:5000"]
              capabilities = ["pull"]
              skip_verify = true
            [host."https://aa.example/proxy/v2/k8s"]
              override_path = true
              [host."https://aa.example/proxy/v2/k8s".header]
                x-team = ["a", "b"]
            [host."https://bb.example/deep"]
              capabilities = ["pull", "resolve", "push"]
        "#;
        let hosts = parse("registry.k8s.io", text, Path::new("/")).unwrap();
        assert_eq!(
            urls(&hosts),
            [
                "http://zz.example:5000/v2",
                "https://aa.example/proxy/v2/k8s",
                "https://bb.example/deep/v2",
                "https://registry.k8s.io/v2"
            ]
        );
        assert!(hosts[0].pull && !hosts[0].resolve && hosts[0].mirror && hosts[0].tls.skip_verify);
        assert_eq!(hosts[1].headers.len(), 2);
        assert!(!hosts[3].mirror);
    }

    #[test]
    fn files_are_found_by_host_with_port_and_by_default() {
        let root = tempfile::tempdir().unwrap();
        let registries = Registries {
            config_dir: Some(root.path().to_owned()),
        };
        for (directory, server) in [
            ("_default", "http://any"),
            ("a.b:1", "http://colon"),
            ("c.d_2_", "http://underscore"),
        ] {
            fs::create_dir(root.path().join(directory)).unwrap();
            let text = format!("server = \"{server}\"");
            fs::write(root.path().join(directory).join("hosts.toml"), text).unwrap();
        }
        for (registry, url) in [
            ("a.b:1", "http://colon/v2"),
            ("c.d:2", "http://underscore/v2"),
            ("docker.io", "http://any/v2"),
        ] {
            let (hosts, from_file) = hosts_for(registry, &registries).unwrap();
            assert_eq!(urls(&hosts), [url]);
            assert!(from_file);
        }
    }

    #[test]
    fn certificates_are_read_from_beside_the_file() {
        let root = tempfile::tempdir().unwrap();
        for name in ["one", "two", "key"] {
            fs::write(root.path().join(name), name).unwrap();
        }
        let text = r#"
            server = "https://own"
            ca = "one"
            [host."https://mirror"]
              ca = ["one", "two"]
              client = [["one", "key"]]
        "#;
        let hosts = parse("a.b", text, root.path()).unwrap();
        assert_eq!(hosts[0].tls.authorities, [b"one", b"two"]);
        assert_eq!(hosts[0].tls.client.as_deref(), Some(&b"one\nkey\n"[..]));
        assert_eq!(hosts[1].tls.authorities, [b"one"]);
    }

    #[test]
    fn broken_files_say_what_is_wrong() {
        for (text, expected) in [
            ("server = 1", "string"),
            ("[host.\"ftp://a\"]", "http"),
            ("[host.\"http://a\"]\nskip_verify = \"yes\"", "boolean"),
            (
                "[host.\"http://a\"]\nca = \"/no/such/file\"",
                "/no/such/file",
            ),
            ("x", "key"),
        ] {
            let error = parse("a.b", text, Path::new("/")).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
