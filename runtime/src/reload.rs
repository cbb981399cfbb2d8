//! SIGHUP: the daemon reads its configuration anew. What can change under pods that run changes at once: what
//! is logged, the runtime handlers, the pinned images. Of the rest it says what has to wait for another daemon.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result};
use error_reporter::Report;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    config::{ConfigError, Flags, Settings},
    cri::Backend,
};

/// Keys, and tables of keys, that count from the signal on.
const CHANGEABLE: [&str; 5] = [
    "log",
    "images.pinned",
    "handlers.",
    "default_handler",
    "delegate_host_pods",
];

/// Sets what is logged.
pub(crate) type SetLog = Box<dyn Fn(EnvFilter) -> Result<()> + Send + Sync>;

/// What counts, and where it comes from.
pub(crate) struct Reload {
    flags: Flags,
    /// The keys' values.
    values: BTreeMap<String, String>,
    set_log: SetLog,
    signal: Signal,
}

impl Reload {
    /// From now on, the signal does not end the daemon. `values` are what the daemon began with.
    pub(crate) fn new(
        flags: &Flags,
        values: BTreeMap<String, String>,
        set_log: SetLog,
    ) -> Result<Self> {
        Ok(Self {
            values,
            flags: flags.clone(),
            set_log,
            signal: signal(SignalKind::hangup()).context("install a signal handler")?,
        })
    }

    /// Reads the configuration anew at each signal.
    pub(crate) async fn serve(mut self, backend: Arc<Backend>) {
        while self.signal.recv().await.is_some() {
            if let Err(reason) = self.reload(&backend) {
                let reason = Report::new(reason).to_string();
                error!(
                    reason,
                    "the configuration can't be read anew; what counted before counts"
                );
            }
        }
    }

    fn reload(&mut self, backend: &Backend) -> Result<(), ConfigError> {
        let (settings, values) = Settings::load_with_values(&self.flags)?;
        if let Err(reason) = (self.set_log)(settings.log_filter("info")) {
            warn!(reason = %format_args!("{reason:#}"), "what is logged stays as it is");
        }
        backend.images.pin(settings.images.pinned);
        backend.handlers.send_replace(settings.handlers);
        let changed = changed(&self.values, &values);
        let (now, later): (Vec<&str>, Vec<&str>) =
            changed.into_iter().partition(|key| can_change(key));
        info!(changed = ?now, "the configuration was read anew");
        if !later.is_empty() {
            warn!(keys = ?later, "these count when the daemon is started anew");
        }
        // The rest is still as it was.
        self.values.retain(|key, _| !can_change(key));
        let new = values.into_iter().filter(|(key, _)| can_change(key));
        self.values.extend(new);
        Ok(())
    }
}

fn can_change(key: &str) -> bool {
    CHANGEABLE
        .iter()
        .any(|known| match known.strip_suffix('.') {
            Some(_) => key.starts_with(known),
            None => key == *known,
        })
}

/// The keys whose values differ.
fn changed<'a>(
    old: &'a BTreeMap<String, String>,
    new: &'a BTreeMap<String, String>,
) -> Vec<&'a str> {
    let differs = |key: &&String| old.get(*key) != new.get(*key);
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    let mut keys: Vec<&str> = new
        .keys()
        .filter(differs)
        .chain(gone)
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_named() {
        let values = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let own = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
            pairs.iter().map(own).collect()
        };
        let old = values(&[("log", "a"), ("vm.vcpus", "1"), ("handlers.x.vcpus", "1")]);
        let new = values(&[("log", "b"), ("vm.vcpus", "1"), ("handlers.y.vcpus", "1")]);
        let keys = changed(&old, &new);
        assert_eq!(keys, ["handlers.x.vcpus", "handlers.y.vcpus", "log"]);
        assert!(keys.into_iter().all(can_change));
        assert!(!can_change("vm.vcpus") && !can_change("log_format"));
    }
}
