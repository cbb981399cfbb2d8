//! What the daemon counts and measures, for Prometheus. All metrics are defined here, and docs/METRICS.md lists
//! them; where they are measured names them: `metrics::CNI.observe(&["bridge", "ADD", "ok"], time)`. They count
//! from the daemon's start.
//!
//! A label has few values: none comes from a pod, an image or a guest.

use std::{collections::HashMap, sync::LazyLock, time::Duration};

use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder,
    core::Collector,
};

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, with its unit.
    pub name: &'static str,
    /// What it is made of.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it tells, in one sentence without the full stop.
    pub about: &'static str,
}

/// Kinds of metrics, as Prometheus has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Durations, in seconds.
    Seconds,
    /// A number that only grows.
    Counter,
    /// A number as it is now.
    Gauge,
}

/// Upper bounds of the buckets of durations, seconds: from a setting to a pull.
const BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
];

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal),*] $about:literal;)*) => {
        $(
            #[doc = $about]
            pub static $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                labels: &[$($label),*],
                about: $about,
            };
        )*
        /// All of them.
        pub static ALL: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    RPC: Seconds "hull_rpc_seconds" ["service", "method", "code"] "Calls of the CRI and image services until they are answered, by the answer's gRPC code";
    START: Seconds "hull_sandbox_start_seconds" ["stage", "start"] "Parts of a sandbox's start, which overlap, and the `total`; `start` is `boot` or `clone`";
    START_FAILURES: Counter "hull_sandbox_start_failures_total" [] "Sandboxes that could not be started";
    COLD: Counter "hull_vm_cold_starts_total" ["reason"] "VMs that booted where there are templates, by the reason";
    AGENT: Seconds "hull_agent_call_seconds" ["call", "result"] "Calls of guests' agents; `result` is `ok`, `refused` or `unanswered`";
    CNI: Seconds "hull_cni_seconds" ["plugin", "command", "result"] "Runs of CNI plugins; `result` is `ok` or `error`";
    PULL: Seconds "hull_image_pull_seconds" ["result"] "Pulls of images; `result` is `ok` or `error`";
    SANDBOXES: Gauge "hull_sandboxes" ["state"] "Sandboxes, `ready` or `not_ready`";
    CONTAINERS: Gauge "hull_containers" ["state"] "Containers: `created`, `running`, `exited` or `unknown`";
    TEMPLATES: Gauge "hull_templates" [] "Templates of VMs that are kept";
    VM_MEMORY: Gauge "hull_vm_memory_bytes" ["memory"] "Memory of all VMM and file server processes: `resident`, and of that `private`";
    VM_EXITS: Gauge "hull_vm_exits" ["reason"] "Exits to the VMM of all VMs that run, since each started";
    IMAGES: Gauge "hull_images" [] "Images of this node";
    IMAGE_BYTES: Gauge "hull_image_store_bytes" [] "What images and their layers occupy on disk";
    ADOPTED: Gauge "hull_adopted_sandboxes" [] "Sandboxes that an earlier daemon had started, when this one started";
    DESCRIPTORS: Gauge "hull_process_open_fds" [] "Descriptors that the daemon has open";
    MEMORY: Gauge "hull_process_resident_bytes" [] "Resident memory of the daemon";
    INFO: Gauge "hull_info" ["version"] "1, with the daemon's version";
}

/// What a metric is to the registry.
enum Family {
    Seconds(HistogramVec),
    Counter(IntCounterVec),
    Gauge(GaugeVec),
}

/// All families by name; one that can't be registered counts nothing.
static FAMILIES: LazyLock<(Registry, HashMap<&'static str, Family>)> = LazyLock::new(|| {
    let registry = Registry::new();
    let families = ALL.iter().filter_map(|metric| {
        let family = Family::register(metric, &registry).ok()?;
        Some((metric.name, family))
    });
    let families = families.collect();
    (registry, families)
});

impl Family {
    fn register(metric: &Metric, registry: &Registry) -> prometheus::Result<Self> {
        let Metric { name, labels, .. } = *metric;
        let about = metric.about.replace('`', "");
        fn kept<T: Collector + Clone + 'static>(
            family: prometheus::Result<T>,
            registry: &Registry,
        ) -> prometheus::Result<T> {
            let family = family?;
            registry.register(Box::new(family.clone()))?;
            Ok(family)
        }
        Ok(match metric.kind {
            Kind::Seconds => {
                let options = HistogramOpts::new(name, about).buckets(BUCKETS.to_vec());
                Self::Seconds(kept(HistogramVec::new(options, labels), registry)?)
            }
            Kind::Counter => {
                let counter = kept(IntCounterVec::new(Opts::new(name, about), labels), registry)?;
                // A first failure is an increase only if there was a zero before it.
                if labels.is_empty() {
                    counter.get_metric_with_label_values(labels)?;
                }
                Self::Counter(counter)
            }
            Kind::Gauge => {
                let gauge = GaugeVec::new(Opts::new(name, about), labels);
                Self::Gauge(kept(gauge, registry)?)
            }
        })
    }
}

impl Metric {
    fn family(&self) -> Option<&'static Family> {
        FAMILIES.1.get(self.name)
    }

    /// Adds a duration to those that were measured. `labels` has a value for each label.
    pub fn observe(&self, labels: &[&str], time: Duration) {
        if let Some(Family::Seconds(family)) = self.family()
            && let Ok(histogram) = family.get_metric_with_label_values(labels)
        {
            histogram.observe(time.as_secs_f64());
        }
    }

    /// Counts one more.
    pub fn count(&self, labels: &[&str]) {
        if let Some(Family::Counter(family)) = self.family()
            && let Ok(counter) = family.get_metric_with_label_values(labels)
        {
            counter.inc();
        }
    }

    /// Says how much it is now.
    pub fn set(&self, labels: &[&str], value: f64) {
        if let Some(Family::Gauge(family)) = self.family()
            && let Ok(gauge) = family.get_metric_with_label_values(labels)
        {
            gauge.set(value);
        }
    }

    /// Forgets what was set, for all labels.
    pub fn clear(&self) {
        if let Some(Family::Gauge(family)) = self.family() {
            family.reset();
        }
    }
}

/// The value of a label that tells success.
#[must_use]
pub fn result<T, E>(result: &Result<T, E>) -> &'static str {
    match result {
        Ok(_) => "ok",
        Err(_) => "error",
    }
}

/// All that was measured, in Prometheus' text format; and its media type.
#[must_use]
pub fn text() -> (Vec<u8>, &'static str) {
    let mut text = Vec::new();
    // Into memory, it does not fail.
    let _ = TextEncoder::new().encode(&FAMILIES.0.gather(), &mut text);
    (text, prometheus::TEXT_FORMAT)
}

/// The table of docs/METRICS.md.
#[must_use]
pub fn table() -> String {
    let line = |metric: &&Metric| {
        let kind = match metric.kind {
            Kind::Seconds => "histogram",
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        let (name, labels, about) = (metric.name, labels.join(", "), metric.about);
        format!("| `{name}` | {kind} | {labels} | {about} |\n")
    };
    let rows: String = ALL.iter().map(line).collect();
    format!("| metric | kind | labels | what |\n|---|---|---|---|\n{rows}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_can_be_measured() {
        for metric in ALL {
            let labels: Vec<&str> = metric.labels.iter().map(|_| "x").collect();
            match metric.kind {
                Kind::Seconds => metric.observe(&labels, Duration::from_millis(30)),
                Kind::Counter => metric.count(&labels),
                Kind::Gauge => metric.set(&labels, 7.5),
            }
        }
        let text = String::from_utf8(text().0).unwrap();
        for metric in ALL {
            let type_line = match metric.kind {
                Kind::Seconds => format!("# TYPE {} histogram", metric.name),
                Kind::Counter => format!("# TYPE {} counter", metric.name),
                Kind::Gauge => format!("# TYPE {} gauge", metric.name),
            };
            assert!(text.contains(&type_line), "{}: {text}", metric.name);
            let is_total = metric.name.ends_with("_total");
            assert_eq!(is_total, metric.kind == Kind::Counter, "{}", metric.name);
        }
        assert!(text.contains(r#"hull_image_pull_seconds_bucket{result="x",le="0.025"} 0"#));
        assert!(text.contains(r#"hull_image_pull_seconds_bucket{result="x",le="0.05"} 1"#));
        SANDBOXES.clear();
        let text = String::from_utf8(super::text().0).unwrap();
        assert!(!text.contains("hull_sandboxes"), "{text}");
        // Of another kind, or with other labels: nothing.
        RPC.count(&["x", "x", "x"]);
        RPC.observe(&["x"], Duration::ZERO);
    }

    #[test]
    fn alerts_and_dashboard_name_what_there_is() {
        for (file, text) in [
            (
                "alerts.yml",
                include_str!("../../../packaging/monitoring/alerts.yml"),
            ),
            (
                "dashboard.json",
                include_str!("../../../packaging/monitoring/dashboard.json"),
            ),
        ] {
            let words = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
            let named: Vec<&str> = words.filter(|word| word.starts_with("hull_")).collect();
            assert!(named.len() > 5, "{file}: {named:?}");
            for name in named {
                let parts = ["_bucket", "_sum", "_count"];
                let of = parts.iter().find_map(|part| name.strip_suffix(part));
                let is_there = ALL.iter().any(|metric| match metric.kind {
                    Kind::Seconds => of == Some(metric.name),
                    Kind::Counter | Kind::Gauge => name == metric.name,
                });
                assert!(is_there, "{file}: {name}");
            }
        }
    }

    #[test]
    fn the_documentation_lists_all() {
        let text = include_str!("../../../docs/METRICS.md");
        assert!(text.contains(&table()), "put this there:\n{}", table());
    }
}
