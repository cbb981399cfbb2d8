//! Settings: the file `/etc/hull/config.toml` and those of `/etc/hull/config.d`, overridden by the
//! environment and by flags, checked once into [`Settings`].
//!
//! All keys are in [`keys`], the files and their order in [`layers`].

mod error;
mod file;
pub(crate) mod keys;
mod layers;
mod streaming;

use std::{
    collections::BTreeMap,
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use error_reporter::Report;
use hull_image::{PinnedImages, Registries, StoreConfig};
use hull_network::NetworkConfig;
use hull_spec::config::{ImageDevice, PodsConfig, TemplateScope, UserRange};
use tonic::transport::Endpoint;
use tracing_subscriber::EnvFilter;

pub(crate) use self::error::ConfigError;
use self::error::{absolute, invalid};
use self::file::{Cni, File, HandlerTable, RegistriesTable, Vm};
use self::layers::Layers;

/// Sockets of the node's daemon.
const DEFAULT_STATE: &str = "/run/hull";
/// Read when it exists and no other file was named, and so are those of the directory.
const DEFAULT_FILE: &str = "/etc/hull/config.toml";
const DEFAULT_DIRECTORY: &str = "/etc/hull/config.d";

/// What the command line says; it wins over the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Flags {
    /// Configuration file [default: /etc/hull/config.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Directory of images and records [default: /var/lib/hull]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Directory of sockets, emptied by a reboot [default: /run/hull]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// CRI socket [default: hull.sock in the state directory]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(crate) listen: Option<PathBuf>,
    /// Directory of hull-vmm, hull-fs, vmlinux and root.erofs [default: $HULL_ASSETS or /usr/lib/hull]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) assets: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or directives as of tracing's EnvFilter
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// Write each guest's console to console.log in its run directory
    #[arg(long, global = true)]
    pub(crate) debug_console: bool,
}

/// All settings, checked. Each component gets its own part.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Persistent directory.
    pub(crate) root: PathBuf,
    /// Volatile directory.
    pub(crate) state: PathBuf,
    /// The CRI socket.
    pub(crate) listen: PathBuf,
    /// What to log; none: the subcommand's default.
    pub(crate) log: Option<String>,
    /// Runtime handlers.
    pub(crate) handlers: Handlers,
    /// For `hull-network`.
    pub(crate) network: NetworkConfig,
    /// For `hull-image`.
    pub(crate) images: StoreConfig,
    /// Where metrics are served; none: nowhere.
    pub(crate) metrics: Option<SocketAddr>,
    /// Who gets traces; none: nobody.
    pub(crate) traces: Option<Endpoint>,
    /// The socket of NRI plugins; none: there are no plugins.
    pub(crate) nri: Option<PathBuf>,
    /// For `hull-streaming`.
    pub(crate) streaming: hull_streaming::Config,
    /// For `hull-pod`.
    pub(crate) pods: PodsConfig,
}

/// The runtime handlers of a node. The default one is always there, by the empty name and one that a RuntimeClass
/// can have.
#[derive(Debug, Clone)]
pub(crate) struct Handlers {
    by_name: BTreeMap<String, Handler>,
    /// The one for pods that ask for namespaces of the host.
    host_pods: Option<String>,
}

/// The default handler's name, where there has to be one.
const NAMED: &str = "hull";

/// What a runtime handler changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Handler {
    /// Memory for the containers of a pod that names no limit, in MiB.
    pub(crate) memory_mib: Option<u32>,
    /// vCPUs of a pod that names no quota.
    pub(crate) vcpus: Option<u8>,
    /// The CRI socket of the runtime that has its pods; none: they are VMs.
    pub(crate) delegate: Option<PathBuf>,
}

impl Default for Handlers {
    fn default() -> Self {
        let names = ["", NAMED].map(|name| (name.to_owned(), Handler::default()));
        Self {
            by_name: BTreeMap::from(names),
            host_pods: None,
        }
    }
}

impl Handlers {
    /// Finds a handler; the empty name is the default one's.
    pub(crate) fn get(&self, name: &str) -> Option<&Handler> {
        self.by_name.get(name)
    }

    /// The socket of the runtime that has a handler's pods, and the handler's name there; none: they are VMs, or there
    /// is no such handler. One that is not configured is the other runtime's that has pods without a handler.
    pub(crate) fn leads_to<'a>(&'a self, name: &'a str) -> Option<(&'a Path, &'a str)> {
        match self.get(name) {
            Some(handler) => Some((handler.delegate.as_deref()?, "")),
            None => Some((self.get("")?.delegate.as_deref()?, name)),
        }
    }

    /// All names, sorted; the empty one first.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The socket of the runtime that has pods with namespaces of the host, if there is one.
    pub(crate) fn host_pods(&self) -> Option<&Path> {
        self.get(self.host_pods.as_ref()?)?.delegate.as_deref()
    }

    /// The sockets of other runtimes, each with the name of a handler.
    pub(crate) fn delegates(&self) -> BTreeMap<&Path, &str> {
        // The first name counts, and any is better than none.
        let named = self.by_name.iter().rev();
        named
            .filter_map(|(name, handler)| Some((handler.delegate.as_deref()?, name)))
            .fold(BTreeMap::new(), |mut all, (socket, name)| {
                if !name.is_empty() || !all.contains_key(socket) {
                    all.insert(socket, name.as_str());
                }
                all
            })
    }
}

impl Settings {
    /// Reads the files and puts environment and flags over them.
    pub(crate) fn load(flags: &Flags) -> Result<Self, ConfigError> {
        Self::read(flags).map(|(settings, _)| settings)
    }

    /// As [`Settings::load`], and the values of all keys as they are shown.
    pub(crate) fn load_with_values(
        flags: &Flags,
    ) -> Result<(Self, BTreeMap<String, String>), ConfigError> {
        let (settings, layers) = Self::read(flags)?;
        let rows = settings.rows(&layers, flags).into_iter();
        let values = rows.map(|(key, value, _)| (key, value)).collect();
        Ok((settings, values))
    }

    /// Reads the files once; returns them too.
    fn read(flags: &Flags) -> Result<(Self, Layers), ConfigError> {
        let layers = Self::layers(flags)?;
        let settings = Self::merge(layers.file()?, assets_of_environment(), flags)
            .map_err(|error| error.found_in(|key| layers.origin(key)))?;
        Ok((settings, layers))
    }

    /// A file that is named is all of it.
    fn layers(flags: &Flags) -> Result<Layers, ConfigError> {
        match &flags.config {
            Some(path) => Layers::read(path, false, None),
            None => Layers::read(
                Path::new(DEFAULT_FILE),
                true,
                Some(Path::new(DEFAULT_DIRECTORY)),
            ),
        }
    }

    /// What is to be logged, `default` if nothing is said.
    pub(crate) fn log_filter(&self, default: &str) -> EnvFilter {
        // It was checked when it was read.
        EnvFilter::new(self.log.as_deref().unwrap_or(default))
    }

    /// All that counts, a line for each key, with where it comes from.
    pub(crate) fn show(flags: &Flags) -> Result<String, ConfigError> {
        let (settings, layers) = Self::read(flags)?;
        let rows = settings.rows(&layers, flags);
        let rows: Vec<(String, String)> = rows
            .into_iter()
            .map(|(key, value, from)| (format!("{key} = {value}"), from))
            .collect();
        let width = rows
            .iter()
            .map(|(row, _)| row.len())
            .max()
            .unwrap_or_default();
        let line = |(row, from): &(String, String)| format!("{row:width$}  # {from}\n");
        Ok(rows.iter().map(line).collect())
    }

    /// All keys, their values, and where these come from.
    fn rows(&self, layers: &Layers, flags: &Flags) -> Vec<(String, String, String)> {
        let quoted = |path: &Path| format!("{:?}", path.display().to_string());
        let elsewhere = |key: &str| match key {
            "root" => flags.root.as_ref().map(|path| (quoted(path), "--root")),
            "state" => flags.state.as_ref().map(|path| (quoted(path), "--state")),
            "listen" => flags.listen.as_ref().map(|path| (quoted(path), "--listen")),
            "assets" => match (&flags.assets, assets_of_environment()) {
                (Some(path), _) => Some((quoted(path), "--assets")),
                (None, path) => path.map(|path| (quoted(&path), "$HULL_ASSETS")),
            },
            "log" => flags.log.as_ref().map(|log| (format!("{log:?}"), "--log")),
            "debug_console" => flags
                .debug_console
                .then(|| ("true".to_owned(), "--debug-console")),
            _ => None,
        };
        let default = |key: &keys::Key| match (key.name, key.default) {
            ("listen", _) => quoted(&self.listen),
            ("cni.netns_dir", _) => quoted(&self.network.netns_dir),
            (_, keys::Unset::Is(value)) => value.to_owned(),
            (_, keys::Unset::Says(words, _)) => format!("# not set: {words}"),
        };
        let plain = keys::KEYS.iter().filter(|key| !key.is_example());
        let mut rows: Vec<(String, String, String)> = plain
            .map(|key| {
                let (value, from) = match (elsewhere(key.name), layers.value(key.name)) {
                    (Some((value, from)), _) => (value, from.to_owned()),
                    (None, Some((value, path))) => (value, path.display().to_string()),
                    (None, None) => (default(key), "default".to_owned()),
                };
                (key.name.to_owned(), value, from)
            })
            .collect();
        for key in layers.keys().filter(|key| key.starts_with("handlers.")) {
            if let Some((value, path)) = layers.value(key) {
                rows.push((key.to_owned(), value, path.display().to_string()));
            }
        }
        rows
    }

    fn merge(file: File, assets: Option<PathBuf>, flags: &Flags) -> Result<Self, ConfigError> {
        let path = |key, flag: &Option<PathBuf>, file: Option<PathBuf>, default: PathBuf| {
            absolute(key, flag.clone().or(file).unwrap_or(default))
        };
        let root = path("root", &flags.root, file.root, "/var/lib/hull".into())?;
        let state = path("state", &flags.state, file.state, DEFAULT_STATE.into())?;
        // A flag for the state directory takes the socket along.
        let listen = file.listen.filter(|_| flags.state.is_none());
        let listen = path("listen", &flags.listen, listen, state.join("hull.sock"))?;
        let assets = path(
            "assets",
            &flags.assets,
            assets.or(file.assets),
            "/usr/lib/hull".into(),
        )?;
        if listen.as_os_str().len() > 100 {
            return Err(invalid("listen", "a socket's path has at most 100 bytes"));
        }
        let log = flags.log.clone().or(file.log);
        if let Some(Err(error)) = log.as_ref().map(EnvFilter::try_new) {
            return Err(invalid("log", &error.to_string()));
        }
        let mut pods = PodsConfig::new(&root, &state, &assets);
        if file.vm.debug {
            pods.guest_root = assets.join("root-debug.erofs");
        }
        pods.serial_console = file.debug_console || flags.debug_console;
        pods.seccomp_default = file.seccomp_default.unwrap_or(pods.seccomp_default);
        if let Some(volumes) = &file.image_volumes {
            pods.image_volumes = match volumes.as_str() {
                "bind" => true,
                "ignore" => false,
                _ => {
                    return Err(invalid(
                        "image_volumes",
                        "it must be \"bind\" or \"ignore\"",
                    ));
                }
            };
        }
        size(&mut pods, &file.vm)?;
        let mut images = StoreConfig::new(root.join("images"), registries(file.registries)?);
        images.workers.user = pods.users.images();
        images.pinned = PinnedImages::parse(&file.images.pinned)
            .map_err(|error| invalid("images.pinned", &error.to_string()))?;
        Ok(Self {
            handlers: handlers(
                file.handlers,
                file.default_handler,
                file.delegate_host_pods,
                &listen,
            )?,
            network: network(file.cni, &root, &state)?,
            metrics: file.metrics.address,
            traces: file.traces.endpoint.map(collector).transpose()?,
            nri: file.nri.socket,
            streaming: file.streaming.check()?,
            images,
            pods,
            root,
            state,
            listen,
            log,
        })
    }
}

/// The collector of traces.
fn collector(address: String) -> Result<Endpoint, ConfigError> {
    const KEY: &str = "traces.endpoint";
    // Of a socket, the endpoint has a host that stands for it.
    let socket = address
        .strip_prefix("unix:")
        .map(|path| path.strip_prefix("//").unwrap_or(path).starts_with('/'));
    let endpoint =
        Endpoint::from_shared(address).map_err(|e| invalid(KEY, &Report::new(e).to_string()))?;
    let uri = endpoint.uri();
    let is_host = || {
        uri.scheme_str() == Some("http")
            && uri
                .authority()
                .is_some_and(|host| !host.as_str().contains('@'))
            && matches!(uri.path(), "" | "/")
    };
    if socket.unwrap_or_else(is_host) {
        return Ok(endpoint);
    }
    // Without TLS: it is for a collector of the node's own, which passes them on.
    Err(invalid(KEY, "it must be http://HOST:PORT or unix:/PATH"))
}

fn assets_of_environment() -> Option<PathBuf> {
    let assets = env::var_os("HULL_ASSETS").filter(|value| !value.is_empty());
    assets.map(Into::into)
}

fn size(pods: &mut PodsConfig, vm: &Vm) -> Result<(), ConfigError> {
    if let Some(memory_mib) = vm.memory_mib {
        pods.memory_mib = memory("vm.memory_mib", memory_mib)?.into();
    }
    pods.max_memory_mib = match vm.max_memory_mib {
        Some(max_memory_mib) => memory("vm.max_memory_mib", max_memory_mib)?.into(),
        None => hull_base::host::total_mib().unwrap_or(0),
    };
    if let Some(overhead_mib) = vm.overhead_mib {
        pods.guest_overhead_mib = memory("vm.overhead_mib", overhead_mib)?.into();
    }
    if let Some(vcpus) = vm.vcpus {
        pods.vcpus = cpus("vm.vcpus", vcpus)?;
    }
    if let Some(scratch_mib) = vm.scratch_mib {
        if !(64..=1 << 24).contains(&scratch_mib) {
            return Err(invalid("vm.scratch_mib", "it must be 64 to 16777216"));
        }
        pods.scratch_bytes = scratch_mib << 20;
    }
    if let Some(guest_volumes) = vm.guest_volumes {
        pods.guest_volumes = guest_volumes;
    }
    if let Some(device) = &vm.image_device {
        pods.image_device = match device.as_str() {
            "pmem" => ImageDevice::Pmem,
            "blk" => ImageDevice::Block,
            _ => return Err(invalid("vm.image_device", "it must be \"pmem\" or \"blk\"")),
        };
    }
    let scope = match vm.template_scope.as_deref() {
        None | Some("node") => TemplateScope::Node,
        Some("namespace") => TemplateScope::Namespace,
        Some("off") => TemplateScope::Off,
        Some(_) => {
            let why = "it must be \"node\", \"namespace\" or \"off\"";
            return Err(invalid("vm.template_scope", why));
        }
    };
    if vm.template == Some(true) {
        pods.template = scope;
    }
    if vm.first_user.is_some() || vm.users.is_some() {
        let (first, count) = (vm.first_user, vm.users);
        let range = UserRange::new(
            first.unwrap_or(UserRange::FIRST),
            count.unwrap_or(UserRange::COUNT),
        );
        let why = "there must be at least two users, root not among them, and all below 4294967295";
        pods.users = range.ok_or_else(|| invalid("vm.first_user, vm.users", why))?;
    }
    if let Some(seconds) = vm.boot_timeout_seconds {
        if !(1..=3600).contains(&seconds) {
            return Err(invalid("vm.boot_timeout_seconds", "it must be 1 to 3600"));
        }
        pods.boot_timeout = Duration::from_secs(seconds);
    }
    Ok(())
}

fn network(cni: Cni, root: &Path, state: &Path) -> Result<NetworkConfig, ConfigError> {
    let mut network = NetworkConfig {
        cache_dir: root.join("cni"),
        ..NetworkConfig::default()
    };
    // A daemon removes namespaces that it has no record of: a second daemon needs a place of
    // its own for them.
    if state != Path::new(DEFAULT_STATE) {
        network.netns_dir = state.join("netns");
    }
    if let Some(conf_dir) = cni.conf_dir {
        network.conf_dir = absolute("cni.conf_dir", conf_dir)?;
    }
    if let Some(bin_dirs) = cni.bin_dirs {
        network.bin_dirs = bin_dirs
            .into_iter()
            .map(|dir| absolute("cni.bin_dirs", dir))
            .collect::<Result<_, _>>()?;
    }
    if let Some(netns_dir) = cni.netns_dir {
        network.netns_dir = absolute("cni.netns_dir", netns_dir)?;
    }
    Ok(network)
}

fn registries(table: RegistriesTable) -> Result<Registries, ConfigError> {
    let config_dir = table
        .config_dir
        .unwrap_or_else(|| "/etc/hull/certs.d".into());
    Ok(Registries {
        config_dir: Some(absolute("registries.config_dir", config_dir)?),
    })
}

fn handlers(
    tables: BTreeMap<String, HandlerTable>,
    default: Option<String>,
    host_pods: Option<String>,
    listen: &Path,
) -> Result<Handlers, ConfigError> {
    let mut handlers = Handlers::default();
    for (name, table) in tables {
        let key = |field: &str| format!("handlers.{name}.{field}");
        // The form that Kubernetes demands of RuntimeClass handlers (a DNS label).
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 63 || !name.chars().all(label) {
            return Err(invalid(
                &format!("handlers.{name:?}"),
                "a handler's name is 1 to 63 lower-case letters, digits and dashes",
            ));
        }
        let HandlerTable {
            memory_mib,
            vcpus,
            delegate,
        } = table;
        let delegate = match delegate {
            Some(_) if memory_mib.is_some() || vcpus.is_some() => {
                return Err(invalid(&key("delegate"), "its pods are no VMs with sizes"));
            }
            Some(socket) if socket == listen => {
                return Err(invalid(&key("delegate"), "it is this runtime's own socket"));
            }
            Some(socket) => Some(absolute(&key("delegate"), socket)?),
            None => None,
        };
        let handler = Handler {
            memory_mib: memory_mib
                .map(|value| memory(&key("memory_mib"), value))
                .transpose()?,
            vcpus: vcpus.map(|value| cpus(&key("vcpus"), value)).transpose()?,
            delegate,
        };
        handlers.by_name.insert(name, handler);
    }
    if let Some(name) = default {
        let Some(handler) = handlers.get(&name).cloned() else {
            return Err(invalid("default_handler", "there is no such handler"));
        };
        handlers.by_name.insert(String::new(), handler);
    }
    handlers.host_pods = host_pods;
    if handlers.host_pods.is_some() && handlers.host_pods().is_none() {
        let reason = "there is no such handler with a delegate";
        return Err(invalid("delegate_host_pods", reason));
    }
    Ok(handlers)
}

fn memory(key: &str, mib: u32) -> Result<u32, ConfigError> {
    if !(32..=1 << 22).contains(&mib) {
        return Err(invalid(key, "it must be 32 to 4194304"));
    }
    Ok(mib)
}

fn cpus(key: &str, count: u8) -> Result<u8, ConfigError> {
    if count == 0 {
        return Err(invalid(key, "it must be at least 1"));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(text: &str, flags: &Flags) -> Result<Settings, ConfigError> {
        Settings::merge(toml::from_str(text).expect("TOML"), None, flags)
    }

    fn refused(text: &str) -> String {
        merge(text, &Flags::default()).unwrap_err().to_string()
    }

    #[test]
    fn handlers_can_be_other_runtimes() {
        let text = "default_handler = 'runc'\ndelegate_host_pods = 'other'\n\
                    [handlers.runc]\ndelegate = '/c'\n[handlers.crun]\ndelegate = '/c'\n\
                    [handlers.other]\ndelegate = '/o'\n";
        let handlers = merge(text, &Flags::default()).unwrap().handlers;
        let delegate = |name: &str| handlers.get(name).unwrap().delegate.as_deref();
        assert_eq!(delegate(""), Some(Path::new("/c")));
        assert_eq!(delegate("hull"), None);
        assert_eq!(handlers.host_pods(), Some(Path::new("/o")));
        let expected = [(Path::new("/c"), "crun"), (Path::new("/o"), "other")];
        assert_eq!(handlers.delegates(), expected.into());
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let settings = merge("", &Flags::default()).unwrap();
        assert_eq!(settings.root, Path::new("/var/lib/hull"));
        assert_eq!(settings.listen, Path::new("/run/hull/hull.sock"));
        assert_eq!(settings.images.root, Path::new("/var/lib/hull/images"));
        assert_eq!(settings.pods.vmm, Path::new("/usr/lib/hull/hull-vmm"));
        assert_eq!(settings.network.netns_dir, Path::new("/run/netns"));
        assert_eq!(settings.handlers.names().collect::<Vec<_>>(), ["", "hull"]);
    }

    #[test]
    fn a_full_file_is_understood() {
        let text = r#"
            root = "/a"
            state = "/b"
            listen = "/c/s"
            assets = "/d"
            log = "debug"
            debug_console = true
            image_volumes = "ignore"
            [cni]
            conf_dir = "/e"
            bin_dirs = ["/f", "/g"]
            netns_dir = "/h"
            [registries]
            config_dir = "/i"
            [images]
            pinned = ["registry.k8s.io/pause:3.10", "quay.io/infra/*"]
            [vm]
            memory_mib = 512
            overhead_mib = 32
            vcpus = 2
            scratch_mib = 1024
            guest_volumes = false
            image_device = "pmem"
            template = true
            template_scope = "namespace"
            boot_timeout_seconds = 9
            first_user = 1000
            users = 3
            [handlers.small]
            memory_mib = 64
            [handlers.big]
            vcpus = 4
        "#;
        let settings = merge(text, &Flags::default()).unwrap();
        assert_eq!(settings.listen, Path::new("/c/s"));
        assert_eq!(settings.pods.kernel, Path::new("/d/vmlinux"));
        assert!(settings.pods.serial_console);
        assert_eq!(settings.pods.memory_mib, 512);
        assert_eq!(settings.pods.scratch_bytes, 1 << 30);
        assert!(!settings.pods.guest_volumes && !settings.pods.image_volumes);
        assert_eq!(settings.pods.image_device, ImageDevice::Pmem);
        assert_eq!(settings.pods.template, TemplateScope::Namespace);
        assert_eq!(Vec::from_iter(settings.pods.users.pods()), [1001, 1002]);
        assert_eq!(settings.images.workers.user, 1000);
        assert_eq!(settings.pods.boot_timeout, Duration::from_secs(9));
        assert_eq!(settings.network.bin_dirs.len(), 2);
        assert_eq!(
            settings.handlers.names().collect::<Vec<_>>(),
            ["", "big", "hull", "small"]
        );
        assert_eq!(settings.handlers.get("big").unwrap().vcpus, Some(4));
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = Flags {
            state: Some("/x".into()),
            root: Some("/y".into()),
            log: Some("warn".into()),
            ..Flags::default()
        };
        let text = "root = '/a'\nstate = '/b'\nlisten = '/c/s'\nlog = 'debug'";
        let settings = merge(text, &flags).unwrap();
        assert_eq!(settings.root, Path::new("/y"));
        assert_eq!(settings.listen, Path::new("/x/hull.sock"));
        assert_eq!(settings.log.as_deref(), Some("warn"));
        assert_eq!(settings.pods.state, Path::new("/x"));
        assert_eq!(settings.network.netns_dir, Path::new("/x/netns"));
    }

    #[test]
    fn bad_values_are_named() {
        assert!(refused("[images]\npinned = ['*']").starts_with("images.pinned: "));
        for collector in [
            "127.0.0.1:4317",
            "https://a:1",
            "http://user:password@a:1",
            "http://a:1/v1/traces",
            "unix:relative",
            "unix://relative",
            "",
        ] {
            let text = format!("[traces]\nendpoint = '{collector}'");
            assert!(refused(&text).starts_with("traces.endpoint: "), "{text}");
        }
        assert!(refused("[vm]\nvcpus = 0").starts_with("vm.vcpus: "));
        assert!(refused("[vm]\nmemory_mib = 1").starts_with("vm.memory_mib: "));
        assert!(refused("[vm]\nscratch_mib = 0").starts_with("vm.scratch_mib: "));
        assert!(refused("[vm]\nimage_device = 'nvme'").starts_with("vm.image_device: "));
        assert!(refused("[vm]\ntemplate_scope = 'pod'").starts_with("vm.template_scope: "));
        for users in ["first_user = 0", "users = 1", "first_user = 4294967290"] {
            assert!(refused(&format!("[vm]\n{users}")).starts_with("vm.first_user, "));
        }
        assert!(refused("[handlers.x]\nvcpus = 0").starts_with("handlers.x.vcpus: "));
        assert!(refused("[handlers.'A B']").starts_with("handlers.\"A B\": "));
        for (text, key) in [
            ("default_handler = 'none'", "default_handler: "),
            ("delegate_host_pods = 'hull'", "delegate_host_pods: "),
            (
                "[handlers.x]\nvcpus = 1\ndelegate = '/s'",
                "handlers.x.delegate: ",
            ),
            (
                "listen = '/a/s'\n[handlers.x]\ndelegate = '/a/s'",
                "handlers.x.delegate: ",
            ),
        ] {
            assert!(refused(text).starts_with(key), "{}", refused(text));
        }
        let long = format!("listen = '/{}'", "x".repeat(120));
        assert!(refused(&long).starts_with("listen: "));
        assert!(toml::from_str::<File>("roots = '/a'").is_err());
        assert!(refused("log = 'hull=loud'").starts_with("log: "));
    }

    #[test]
    fn what_counts_is_shown_with_where_it_comes_from() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hull.toml");
        std::fs::write(&file, "root = '/a'\n[handlers.x]\nvcpus = 3\n").unwrap();
        let flags = Flags {
            config: Some(file.clone()),
            state: Some("/s".into()),
            ..Flags::default()
        };
        let text = Settings::show(&flags).unwrap();
        let line = |key: &str| {
            let start = format!("{key} = ");
            let line = text.lines().find(|line| line.starts_with(&start)).unwrap();
            line[start.len()..]
                .split_ascii_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        let file = file.display();
        assert_eq!(line("root"), format!("\"/a\" # {file}"));
        assert_eq!(line("state"), "\"/s\" # --state");
        assert_eq!(line("listen"), "\"/s/hull.sock\" # default");
        assert_eq!(line("vm.vcpus"), "1 # default");
        assert_eq!(line("handlers.x.vcpus"), format!("3 # {file}"));
        std::fs::write(dir.path().join("hull.toml"), "[vm]\nvcpus = 0").unwrap();
        let error = Settings::load(&flags).unwrap_err().to_string();
        assert_eq!(error, format!("{file}: vm.vcpus: it must be at least 1"));
    }

    #[test]
    fn a_named_file_must_exist() {
        let flags = Flags {
            config: Some("/nonexistent/hull.toml".into()),
            ..Flags::default()
        };
        let error = Settings::load(&flags).unwrap_err();
        assert_eq!(
            error.to_string(),
            "read configuration /nonexistent/hull.toml"
        );
    }
}
