//! Pod networks: the CNI configuration and the plugins that it names.

use error_reporter::Report;
use hull_network::{
    NetworkConfig,
    cni::{conf, exec},
};

use super::finding::Finding;

/// A network of one node, which packages bring.
const EXAMPLE: &str = "/usr/share/hull/99-hull.conflist";

/// Whether there is a usable configuration.
pub(super) fn configuration(config: &NetworkConfig) -> Finding {
    match conf::load(&config.conf_dir) {
        Ok(list) => Finding::Good(format!("network {:?}", list.name)),
        Err(error) => Finding::bad(
            Report::new(error).to_string(),
            format!(
                "in a cluster its network plugin puts one there; for a node by itself \
                 `install -Dm644 {EXAMPLE} -t {}`",
                config.conf_dir.display()
            ),
        ),
    }
}

/// Whether its plugins are installed.
pub(super) fn plugins(config: &NetworkConfig) -> Finding {
    let Ok(list) = conf::load(&config.conf_dir) else {
        return Finding::bad(
            "not known which are needed",
            "mend the CNI configuration first",
        );
    };
    let kinds: Vec<&str> = list
        .plugins
        .iter()
        .map(|plugin| plugin.kind.as_str())
        .collect();
    for kind in &kinds {
        if let Err(error) = exec::find(&config.bin_dirs, kind) {
            return Finding::bad(
                Report::new(error).to_string(),
                "`apt install containernetworking-plugins`, or set `cni.bin_dirs`",
            );
        }
    }
    Finding::Good(kinds.join(", "))
}
