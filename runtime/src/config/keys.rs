//! All keys of the file, as a person reads them: for `hull config`, for docs/CONFIGURATION.md, and to name
//! the right key where another was written. What the keys do is in the parent.

use std::fmt::Write;

/// A key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    /// With its table: `vm.memory_mib`.
    pub(crate) name: &'static str,
    /// Its value when it is not set.
    pub(crate) default: Unset,
    /// What it is, in one sentence without the full stop.
    pub(crate) about: &'static str,
}

/// The value of a key that is not set.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Unset {
    /// This, as it would be written.
    Is(&'static str),
    /// What these words say; and an example.
    Says(&'static str, &'static str),
}

use Unset::{Is, Says};

/// The table whose names are the administrator's own, and the one of the examples.
const HANDLERS: (&str, &str) = ("handlers", "small");

const fn key(name: &'static str, default: Unset, about: &'static str) -> Key {
    Key {
        name,
        default,
        about,
    }
}

/// All keys, those of a table together.
#[rustfmt::skip]
pub(crate) const KEYS: &[Key] = &[
    key("root", Is("\"/var/lib/hull\""), "Directory of images, records and disks of pods"),
    key("state", Is("\"/run/hull\""), "Directory of sockets; a reboot empties it"),
    key("listen", Says("`hull.sock` in `state`", "\"/run/hull/hull.sock\""), "The CRI socket"),
    key("assets", Is("\"/usr/lib/hull\""), "Directory of hull-vmm, hull-fs, vmlinux, root.erofs and root-debug.erofs; $HULL_ASSETS goes before it"),
    key("log", Says("`info` for the daemon", "\"info,hull_pod=debug\""), "What is logged: error, warn, info, debug, trace, or directives as of tracing's EnvFilter"),
    key("debug_console", Is("false"), "Keeps each guest's console in `console.log` of its run directory"),
    key("seccomp_default", Is("true"), "Confines containers that name no seccomp profile at all"),
    key("image_volumes", Is("\"bind\""), "What images declare as volumes: \"bind\", directories of each container's; \"ignore\", none"),
    key("default_handler", Says("VMs with the sizes of `[vm]`", "\"small\""), "Handler for pods without a RuntimeClass"),
    key("delegate_host_pods", Says("they are refused", "\"runc\""), "Handler with a `delegate` for pods that ask for namespaces of the host, whatever handler they name"),
    key("cni.conf_dir", Is("\"/etc/cni/net.d\""), "Directory of network configurations; the first by name counts"),
    key("cni.bin_dirs", Is("[\"/opt/cni/bin\", \"/usr/lib/cni\"]"), "Directories of CNI plugins"),
    key("cni.netns_dir", Says("`/run/netns`, or `netns` in another `state`", "\"/run/netns\""), "Directory of pods' network namespaces"),
    key("registries.config_dir", Is("\"/etc/hull/certs.d\""), "Directory of REGISTRY/hosts.toml, in containerd's form"),
    key("images.pinned", Is("[]"), "Images that kubelet must not collect: names, or starts of names with a * at the end"),
    key("streaming.address", Is("\"127.0.0.1:0\""), "Where exec, attach and port-forward are served; port 0 takes a free one"),
    key("streaming.advertise", Says("where it listens", "\"node.example:10010\""), "Host and port that URLs name"),
    key("streaming.tls_cert", Says("no TLS", "\"/etc/hull/tls.crt\""), "Certificate to serve https with; needs tls_key"),
    key("streaming.tls_key", Says("no TLS", "\"/etc/hull/tls.key\""), "Key of the certificate"),
    key("streaming.allow_plaintext", Is("false"), "Listens for other hosts without TLS"),
    key("metrics.address", Says("no metrics", "\"127.0.0.1:9464\""), "Where Prometheus finds /metrics, over HTTP; whoever reaches it may read it"),
    key("traces.endpoint", Says("no traces", "\"http://127.0.0.1:4317\""), "Collector that gets traces of calls, in OTLP over gRPC: http://HOST:PORT or unix:/PATH"),
    key("nri.socket", Says("no plugins", "\"/var/run/nri/nri.sock\""), "Where NRI plugins register; with it, those in /opt/nri/plugins are started"),
    key("vm.memory_mib", Is("256"), "Memory of a VM whose pod names no limit, and the least of any VM, in MiB"),
    key("vm.max_memory_mib", Says("the host's memory", "4096"), "Most memory of a VM whose pod names no limit, which it gets when it needs it, in MiB; `vm.memory_mib`: it never gets more"),
    key("vm.overhead_mib", Is("64"), "Memory for the guest itself where the pod names no overhead, if its cgroup has room for it, in MiB"),
    key("vm.vcpus", Is("1"), "Virtual CPUs of a VM whose pod names no quota"),
    key("vm.scratch_mib", Is("10240"), "Quota of what a pod writes, and of each emptyDir, in MiB"),
    key("vm.guest_volumes", Is("true"), "emptyDirs are disks of the guest; false: shared with the host"),
    key("vm.image_device", Is("\"blk\""), "What images are for guests: \"blk\", disks; \"pmem\", memory that pods share, for pods of one tenant"),
    key("vm.template", Is("false"), "VMs of pods are clones of one that was booted, whose unchanged memory they share"),
    key("vm.template_scope", Is("\"node\""), "Who has clones of one template: \"node\", all pods; \"namespace\", those of one; \"off\", none"),
    key("vm.boot_timeout_seconds", Is("60"), "How long a guest may take to start"),
    key("vm.first_user", Is("1879048192"), "First of the host's users and groups that VMMs run as; nobody else's"),
    key("vm.users", Is("65536"), "How many users there are: one for each pod, and one for images"),
    key("vm.debug", Is("false"), "Pods are started with a shell on their guest's root, for `hull debug`"),
    key("handlers.small.memory_mib", Says("`vm.memory_mib`", "64"), "For pods of the RuntimeClass handler `small`: memory where the pod names no limit, in MiB"),
    key("handlers.small.vcpus", Says("`vm.vcpus`", "1"), "For pods of that handler: virtual CPUs where the pod names no quota"),
    key("handlers.runc.delegate", Says("VMs", "\"/run/containerd/containerd.sock\""), "CRI socket of another runtime, which has the pods of the handler `runc` then"),
];

impl Key {
    /// The table, none for the keys at the top, and the name in it.
    fn parts(&self) -> (Option<&'static str>, &'static str) {
        match self.name.rsplit_once('.') {
            Some((table, name)) => (Some(table), name),
            None => (None, self.name),
        }
    }

    /// Whether it stands for one of a name that the administrator chooses.
    pub(crate) fn is_example(&self) -> bool {
        self.name.starts_with(HANDLERS.0)
    }

    /// The value, or an example of one.
    fn value(&self) -> &'static str {
        match self.default {
            Is(value) | Says(_, value) => value,
        }
    }
}

/// Whether there is such a key, or a table with keys.
pub(super) fn is_known(name: &str) -> bool {
    let name = as_listed(name);
    KEYS.iter().any(|key| {
        let rest = key.name.strip_prefix(name.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// The known key that looks most like `name`, if one does.
pub(super) fn nearest(name: &str) -> Option<String> {
    let listed = as_listed(name);
    let likeness = |key: &Key| {
        // Also a right name in a wrong table.
        let own = |name: &str| {
            name.rsplit('.')
                .next()
                .map(str::to_owned)
                .unwrap_or_default()
        };
        let whole = strsim::jaro_winkler(&listed, key.name);
        let last = strsim::jaro_winkler(&own(&listed), &own(key.name));
        whole.max(last)
    };
    let (likeness, key) = KEYS
        .iter()
        .map(|key| (likeness(key), key))
        .rev()
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness > 0.8).then(|| key.name.to_owned())
}

/// A handler's key by the name of the example.
fn as_listed(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').collect();
    if let [table, handler, rest @ ..] = parts.as_mut_slice()
        && *table == HANDLERS.0
    {
        let mut all = KEYS
            .iter()
            .map(|key| key.name.split('.').collect::<Vec<_>>());
        let listed = all.find(|key| key.first() == Some(table) && key.get(2..) == Some(rest));
        *handler = listed.map_or(HANDLERS.1, |key| key[1]);
    }
    parts.join(".")
}

/// A file with all keys and their defaults, as comments.
pub fn default_file() -> String {
    let mut text = String::from(
        "# Configuration of hull(1). All keys, with their defaults or an example; `hull config show` tells what\n\
         # counts and where it comes from. Files /etc/hull/config.d/*.toml go before this one, the last first.\n",
    );
    let mut current = None;
    for key in KEYS {
        let (table, name) = key.parts();
        if table != current {
            let comment = if key.is_example() { "#" } else { "" };
            let _ = write!(text, "\n{comment}[{}]", table.unwrap_or_default());
            current = table;
        }
        let _ = write!(text, "\n# {}", key.about);
        if let Says(default, _) = key.default {
            let _ = write!(text, "; not set: {default}");
        }
        let _ = write!(text, "\n#{name} = {}\n", key.value());
    }
    text
}

/// docs/CONFIGURATION.md: `before` what is said of all keys, and a table of them.
pub fn table() -> String {
    let mut text = String::from("| key | default | what |\n|---|---|---|\n");
    for key in KEYS {
        let default = match key.default {
            Is(value) => format!("`{value}`"),
            Says(words, example) => format!("{words}; for example `{example}`"),
        };
        let _ = writeln!(text, "| `{}` | {default} | {} |", key.name, key.about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Flags, Settings, file::File};
    use super::*;

    /// The default file with the `#` of settings taken away, but for those that are examples.
    fn uncommented(examples: bool) -> String {
        let mut text = String::new();
        let mut skip = false;
        for line in default_file().lines() {
            let setting = line.strip_prefix('#').filter(|rest| !rest.starts_with(' '));
            if line.starts_with("# ") {
                skip = line.contains("; not set: ");
            }
            let example = skip || line.starts_with("#[");
            match setting {
                Some(setting) if examples || !example => text.push_str(setting),
                _ => text.push_str(line),
            }
            text.push('\n');
        }
        text
    }

    #[test]
    fn the_default_file_is_what_counts_without_one() {
        let of = |text: &str| {
            let file: File = toml::from_str(text).unwrap();
            format!(
                "{:?}",
                Settings::merge(file, None, &Flags::default()).unwrap()
            )
        };
        assert_eq!(of(&default_file()), of(""));
        assert_eq!(of(&uncommented(false)), of(""));
        assert_ne!(of(&uncommented(true)), of(""));
    }

    #[test]
    fn all_keys_of_the_file_are_listed() {
        // What a key that does not exist is told to be one of.
        for table in [
            "",
            "cni",
            "registries",
            "images",
            "streaming",
            "metrics",
            "nri",
            "vm",
            "handlers.small",
        ] {
            let header = if table.is_empty() {
                String::new()
            } else {
                format!("[{table}]\n")
            };
            let error = toml::from_str::<File>(&format!("{header}no_such_key = 1")).unwrap_err();
            let message = error.message().to_owned();
            let known: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
            assert!(!known.is_empty(), "{message}");
            for name in known {
                let name = format!("{table}.{name}");
                assert!(is_known(name.trim_start_matches('.')), "{name}");
            }
        }
        assert!(KEYS.len() < 40, "{}", KEYS.len());
        assert!(!is_known("vm.memory") && !is_known("v") && is_known("handlers.x.vcpus"));
    }

    #[test]
    fn the_nearest_key_is_named() {
        for (written, meant) in [
            ("rot", "root"),
            ("vm.memory_mb", "vm.memory_mib"),
            ("memory_mib", "vm.memory_mib"),
            ("cni.bin_dir", "cni.bin_dirs"),
            ("handlers.big.vcpu", "handlers.small.vcpus"),
        ] {
            assert_eq!(nearest(written).as_deref(), Some(meant), "{written}");
        }
        assert_eq!(nearest("zzzzzz"), None);
    }

    #[test]
    fn the_documentation_lists_all_keys() {
        let text = include_str!("../../../docs/CONFIGURATION.md");
        let written: String = text
            .lines()
            .filter(|l| l.starts_with('|'))
            .map(|l| format!("{l}\n"))
            .collect();
        assert!(
            written.starts_with(&table()),
            "put this there:\n{}",
            table()
        );
    }
}
