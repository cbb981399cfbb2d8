//! Metrics in cAdvisor's names, from the same numbers as the statistics.
//!
//! One table says for each its meaning and where its value comes from. All series of a container
//! are of its cgroup and processes in the guest; a series whose label `container` is empty is of
//! the pod: CPU and memory on the host, VM included, and the guest's network. Values are whole
//! numbers (CRI's `UInt64Value`), so times are cut to seconds.
//!
//! Of a VM some are true in their own way: `container_fs_*` is the writable layer on the pod's
//! scratch disk (`device="scratch"`, whose size is the limit), devices of `container_blkio_*` and
//! of reads and writes are the guest's, and `container_hugetlb_max_usage_bytes` is the most that
//! was seen by a request, since cgroup v2 keeps none.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use hull_proto_cri::v1::{
    ContainerMetrics, Metric, MetricDescriptor, MetricType, PodSandboxMetrics, UInt64Value,
};
use hull_spec::stats::{ContainerStats, DeviceIo, Interface, PodStats, Usage};

use self::Source::{Both, Container, Pod};

/// Labels of every series.
const BASE: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];
const SECOND_NS: u64 = 1_000_000_000;
const SECOND_US: u64 = 1_000_000;
/// What the kernel has without a quota.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// The shares that the kernel's default weight stands for.
const DEFAULT_SHARES: u64 = 1024;

/// Where values come from: each with the values of the further labels.
#[derive(Clone, Copy)]
enum Source {
    Container(fn(&ContainerStats) -> Vec<Value>),
    Pod(fn(&PodStats) -> Vec<Value>),
    Both(
        fn(&ContainerStats) -> Vec<Value>,
        fn(&PodStats) -> Vec<Value>,
    ),
}

type Value = (Vec<String>, u64);

struct Entry {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    kind: MetricType,
    source: Source,
}

/// All that are served.
pub(crate) fn descriptors() -> Vec<MetricDescriptor> {
    let labels = |entry: &Entry| {
        BASE.iter()
            .chain(entry.labels)
            .map(ToString::to_string)
            .collect()
    };
    TABLE
        .iter()
        .map(|entry| MetricDescriptor {
            name: entry.name.to_owned(),
            help: entry.help.to_owned(),
            label_keys: labels(entry),
        })
        .collect()
}

/// Those of a pod and of its containers that run.
pub(crate) fn pod(stats: &PodStats) -> PodSandboxMetrics {
    let spec = &stats.sandbox.spec.metadata;
    let labels = |id: &str, name: &str, image: &str, container: &str| {
        [id, name, image, &spec.namespace, &spec.name, container].map(str::to_owned)
    };
    let pod_labels = labels(stats.sandbox.id.as_str(), "", "", "");
    let running = stats.containers.iter().filter(|c| is_running(c));
    let of_container = |container: &ContainerStats| {
        let info = &container.container;
        let (id, name) = (info.id.as_str(), &info.spec.metadata.name);
        let labels = labels(id, name, &info.image_ref, name);
        let series = TABLE.iter().flat_map(|entry| match entry.source {
            Container(read) | Both(read, _) => {
                metrics(entry, container.at_ns, &labels, read(container))
            }
            Pod(_) => Vec::new(),
        });
        ContainerMetrics {
            container_id: id.to_owned(),
            metrics: series.collect(),
        }
    };
    let guest_ns = stats.guest.as_ref().map(|guest| guest.at_ns);
    let at_ns = stats.host.as_ref().map(|host| host.at_ns).or(guest_ns);
    let of_pod = TABLE.iter().flat_map(|entry| match entry.source {
        Pod(read) | Both(_, read) => metrics(entry, at_ns.unwrap_or(0), &pod_labels, read(stats)),
        Container(_) => Vec::new(),
    });
    PodSandboxMetrics {
        pod_sandbox_id: stats.sandbox.id.to_string(),
        metrics: of_pod.collect(),
        container_metrics: running.map(of_container).collect(),
    }
}

fn is_running(stats: &ContainerStats) -> bool {
    stats.container.state == hull_spec::info::ContainerState::Running
}

fn metrics(entry: &Entry, timestamp: i64, base: &[String; 6], values: Vec<Value>) -> Vec<Metric> {
    let metric = |(labels, value): Value| Metric {
        name: entry.name.to_owned(),
        timestamp,
        metric_type: entry.kind.into(),
        label_values: base.iter().cloned().chain(labels).collect(),
        value: Some(UInt64Value { value }),
    };
    values.into_iter().map(metric).collect()
}

fn one(value: u64) -> Vec<Value> {
    vec![(Vec::new(), value)]
}

fn labelled(label: &str, value: u64) -> Vec<Value> {
    vec![(vec![label.to_owned()], value)]
}

fn maybe(value: Option<u64>) -> Vec<Value> {
    value.map_or_else(Vec::new, one)
}

fn seconds(at_ns: i64) -> u64 {
    u64::try_from(at_ns).unwrap_or(0) / SECOND_NS
}

fn devices(c: &ContainerStats, value: fn(&DeviceIo) -> u64) -> Vec<Value> {
    let devices = c.usage.io.iter();
    devices
        .map(|io| (vec![io.device.clone()], value(io)))
        .collect()
}

fn blkio(c: &ContainerStats) -> Vec<Value> {
    let labels = |io: &DeviceIo, operation: &str| {
        let (major, minor) = (io.major.to_string(), io.minor.to_string());
        vec![io.device.clone(), major, minor, operation.to_owned()]
    };
    let both = |io: &DeviceIo| {
        [
            (labels(io, "Read"), io.read_bytes),
            (labels(io, "Write"), io.write_bytes),
        ]
    };
    c.usage.io.iter().flat_map(both).collect()
}

/// Both scopes are the same: a container's cgroup counts what is below it.
fn failures(c: &ContainerStats) -> Vec<Value> {
    let memory = &c.usage.memory;
    let kinds = [
        ("pgfault", memory.page_faults),
        ("pgmajfault", memory.major_page_faults),
    ];
    let scopes = ["container", "hierarchy"];
    let rows = kinds.into_iter().flat_map(|(kind, count)| {
        scopes.map(|scope| (vec![kind.to_owned(), scope.to_owned()], count))
    });
    rows.collect()
}

fn interfaces(p: &PodStats, value: fn(&Interface) -> u64) -> Vec<Value> {
    let interfaces = p.guest.iter().flat_map(|guest| &guest.interfaces);
    interfaces
        .map(|i| (vec![i.name.clone()], value(i)))
        .collect()
}

fn ulimits(c: &ContainerStats) -> Vec<Value> {
    // One without a limit has no number.
    let limits = c.ulimits.iter();
    limits
        .filter_map(|limit| Some((vec![limit.name.clone()], limit.soft?)))
        .collect()
}

fn resource(c: &ContainerStats, value: fn(&hull_spec::spec::Resources) -> i64) -> Option<u64> {
    let resources = c.container.resources.as_ref()?;
    u64::try_from(value(resources))
        .ok()
        .filter(|value| *value > 0)
}

fn of_guest(p: &PodStats, value: fn(&Usage) -> Option<u64>) -> Vec<Value> {
    maybe(p.guest.as_ref().and_then(|guest| value(&guest.usage)))
}

fn of_host(p: &PodStats, value: fn(&hull_spec::stats::HostUsage) -> u64) -> Vec<Value> {
    maybe(p.host.as_ref().map(value))
}

const fn entry(
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    kind: MetricType,
    source: Source,
) -> Entry {
    Entry {
        name,
        help,
        labels,
        kind,
        source,
    }
}

macro_rules! table {
    ($($name:literal $help:literal $labels:tt $kind:ident $source:expr;)*) => {
        &[$(entry($name, $help, &$labels, MetricType::$kind, $source)),*]
    };
}

macro_rules! pressure {
    ($line:ident, $($path:ident).+) => {
        Both(
            |c| maybe(c.usage.$($path).+.map(|p| p.$line.total_us / SECOND_US)),
            |p| of_guest(p, |u| u.$($path).+.map(|p| p.$line.total_us / SECOND_US)),
        )
    };
}

#[rustfmt::skip]
static TABLE: &[Entry] = table![
    "container_blkio_device_usage_total" "Bytes read from and written to block devices."
        ["device", "major", "minor", "operation"] Counter Container(blkio);
    "container_cpu_cfs_periods_total" "Enforcement periods of the CPU quota that have passed."
        [] Counter Container(|c| one(c.usage.cpu.periods));
    "container_cpu_cfs_throttled_periods_total" "Periods in which the CPU quota was used up."
        [] Counter Container(|c| one(c.usage.cpu.throttled_periods));
    "container_cpu_cfs_throttled_seconds_total" "Time for which the CPU quota was used up."
        [] Counter Container(|c| one(c.usage.cpu.throttled_ns / SECOND_NS));
    "container_cpu_system_seconds_total" "CPU time used in the kernel."
        [] Counter Container(|c| one(c.usage.cpu.system_ns / SECOND_NS));
    "container_cpu_usage_seconds_total" "CPU time used."
        ["cpu"] Counter Both(
            |c| labelled("total", c.usage.cpu.usage_ns / SECOND_NS),
            |p| p.host.iter().flat_map(|h| labelled("total", h.cpu_usage_ns / SECOND_NS)).collect(),
        );
    "container_cpu_user_seconds_total" "CPU time used in user mode."
        [] Counter Container(|c| one(c.usage.cpu.user_ns / SECOND_NS));
    "container_file_descriptors" "Open file descriptors."
        [] Gauge Container(|c| one(c.usage.tasks.file_descriptors));
    "container_fs_inodes_free" "Free inodes of the file system of the writable layer."
        ["device"] Gauge Container(|c| c.writable.iter().flat_map(|w| labelled("scratch", w.free_inodes)).collect());
    "container_fs_inodes_total" "Inodes of the file system of the writable layer."
        ["device"] Gauge Container(|c| c.writable.iter().flat_map(|w| labelled("scratch", w.capacity_inodes)).collect());
    "container_fs_limit_bytes" "Size of the file system of the writable layer."
        ["device"] Gauge Container(|c| c.writable.iter().flat_map(|w| labelled("scratch", w.capacity_bytes)).collect());
    "container_fs_reads_bytes_total" "Bytes read from block devices."
        ["device"] Counter Container(|c| devices(c, |io| io.read_bytes));
    "container_fs_reads_total" "Reads from block devices."
        ["device"] Counter Container(|c| devices(c, |io| io.reads));
    "container_fs_usage_bytes" "Bytes that the writable layer occupies."
        ["device"] Gauge Container(|c| c.writable.iter().flat_map(|w| labelled("scratch", w.used_bytes)).collect());
    "container_fs_writes_bytes_total" "Bytes written to block devices."
        ["device"] Counter Container(|c| devices(c, |io| io.write_bytes));
    "container_fs_writes_total" "Writes to block devices."
        ["device"] Counter Container(|c| devices(c, |io| io.writes));
    "container_hugetlb_max_usage_bytes" "The most memory in huge pages that was seen."
        ["pagesize"] Gauge Container(|c| c.usage.hugetlb.iter().flat_map(|h| labelled(&h.page_size, h.max_usage_bytes)).collect());
    "container_hugetlb_usage_bytes" "Memory in huge pages."
        ["pagesize"] Gauge Container(|c| c.usage.hugetlb.iter().flat_map(|h| labelled(&h.page_size, h.usage_bytes)).collect());
    "container_last_seen" "When this was measured, Unix time."
        [] Gauge Both(|c| one(seconds(c.at_ns)), |p| of_host(p, |h| seconds(h.at_ns)));
    "container_memory_cache" "Memory in pages of files."
        [] Gauge Container(|c| one(c.usage.memory.cache_bytes));
    "container_memory_failcnt" "How often the memory limit was reached."
        [] Counter Container(|c| one(c.usage.memory.limit_hits));
    "container_memory_failures_total" "Page faults."
        ["failure_type", "scope"] Counter Container(failures);
    "container_memory_kernel_usage" "Memory that the kernel uses for it."
        [] Gauge Container(|c| one(c.usage.memory.kernel_bytes));
    "container_memory_mapped_file" "Memory in pages of files that are mapped."
        [] Gauge Container(|c| one(c.usage.memory.mapped_file_bytes));
    "container_memory_max_usage_bytes" "The most memory that was used."
        [] Gauge Container(|c| one(c.usage.memory.peak_bytes));
    "container_memory_rss" "Anonymous memory; of a pod: resident memory of its processes on the host."
        [] Gauge Both(|c| one(c.usage.memory.rss_bytes), |p| of_host(p, |h| h.rss_bytes));
    "container_memory_swap" "Swap in use."
        [] Gauge Container(|c| one(c.usage.memory.swap_usage_bytes));
    "container_memory_usage_bytes" "Memory in use."
        [] Gauge Both(|c| one(c.usage.memory.usage_bytes), |p| of_host(p, |h| h.memory_usage_bytes));
    "container_memory_working_set_bytes" "Memory in use that can't easily be given back."
        [] Gauge Both(|c| one(c.usage.memory.working_set_bytes), |p| of_host(p, |h| h.memory_working_set_bytes));
    "container_network_receive_bytes_total" "Bytes received."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.received.bytes));
    "container_network_receive_errors_total" "Errors while receiving."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.received.errors));
    "container_network_receive_packets_dropped_total" "Received packets that were dropped."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.received.dropped));
    "container_network_receive_packets_total" "Packets received."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.received.packets));
    "container_network_transmit_bytes_total" "Bytes sent."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.sent.bytes));
    "container_network_transmit_errors_total" "Errors while sending."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.sent.errors));
    "container_network_transmit_packets_dropped_total" "Packets that were dropped instead of sent."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.sent.dropped));
    "container_network_transmit_packets_total" "Packets sent."
        ["interface"] Counter Pod(|p| interfaces(p, |i| i.sent.packets));
    "container_oom_events_total" "Processes killed for want of memory."
        [] Counter Container(|c| one(c.usage.memory.oom_kills));
    "container_pressure_cpu_stalled_seconds_total" "Time in which all tasks waited for CPU."
        [] Counter pressure!(full, cpu.pressure);
    "container_pressure_cpu_waiting_seconds_total" "Time in which some task waited for CPU."
        [] Counter pressure!(some, cpu.pressure);
    "container_pressure_io_stalled_seconds_total" "Time in which all tasks waited for I/O."
        [] Counter pressure!(full, io_pressure);
    "container_pressure_io_waiting_seconds_total" "Time in which some task waited for I/O."
        [] Counter pressure!(some, io_pressure);
    "container_pressure_memory_stalled_seconds_total" "Time in which all tasks waited for memory."
        [] Counter pressure!(full, memory.pressure);
    "container_pressure_memory_waiting_seconds_total" "Time in which some task waited for memory."
        [] Counter pressure!(some, memory.pressure);
    "container_processes" "Processes."
        [] Gauge Both(|c| one(c.usage.tasks.processes), |p| of_guest(p, |u| Some(u.tasks.processes)));
    "container_sockets" "Open sockets."
        [] Gauge Container(|c| one(c.usage.tasks.sockets));
    "container_spec_cpu_period" "Period of the CPU quota in microseconds."
        [] Gauge Container(|c| one(resource(c, |r| r.cpu_period_us).unwrap_or(DEFAULT_PERIOD_US)));
    "container_spec_cpu_quota" "CPU quota in microseconds; none: no limit."
        [] Gauge Container(|c| maybe(resource(c, |r| r.cpu_quota_us)));
    "container_spec_cpu_shares" "CPU shares."
        [] Gauge Container(|c| one(resource(c, |r| r.cpu_shares).unwrap_or(DEFAULT_SHARES)));
    "container_spec_memory_limit_bytes" "Memory limit; 0: none."
        [] Gauge Container(|c| one(c.usage.memory.limit_bytes.unwrap_or(0)));
    "container_spec_memory_reservation_limit_bytes" "Memory that is protected from reclaim."
        [] Gauge Container(|c| one(c.usage.memory.min_bytes));
    "container_spec_memory_swap_limit_bytes" "Limit of swap; 0: none, or no swap."
        [] Gauge Container(|c| one(c.usage.memory.swap_limit_bytes.unwrap_or(0)));
    "container_start_time_seconds" "When it was started, Unix time."
        [] Gauge Both(
            |c| one(seconds(c.container.started_at_ns)),
            |p| one(seconds(p.sandbox.created_at_ns)),
        );
    "container_threads" "Threads."
        [] Gauge Both(|c| one(c.usage.tasks.threads), |p| of_guest(p, |u| Some(u.tasks.threads)));
    "container_threads_max" "Most threads; 0: no limit."
        [] Gauge Container(|c| one(c.usage.tasks.threads_limit.unwrap_or(0)));
    "container_ulimits_soft" "Soft limits of the first process; those without a limit are left out."
        ["ulimit"] Gauge Container(ulimits);
];

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::cri::convert::testing;

    #[test]
    fn each_name_is_there_once_and_sorted() {
        let names: Vec<_> = descriptors().into_iter().map(|d| d.name).collect();
        let sorted: BTreeSet<_> = names.iter().cloned().collect();
        assert_eq!(sorted.into_iter().collect::<Vec<_>>(), names);
        assert_eq!(names.len(), 56);
    }

    #[test]
    fn every_descriptor_has_series_with_its_labels() {
        let mut stats = testing::pod_stats();
        let all = pod(&stats);
        let mut labels: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        let of_containers = all.container_metrics.iter().flat_map(|c| &c.metrics);
        for metric in all.metrics.iter().chain(of_containers) {
            assert!(metric.timestamp > 0, "{metric:?}");
            let counts = labels.entry(metric.name.clone()).or_default();
            counts.insert(metric.label_values.len());
            let name = metric.name.as_str();
            let counts = name.ends_with("_total") && name != "container_fs_inodes_total"
                || name == "container_memory_failcnt";
            assert_eq!(
                metric.metric_type() == MetricType::Counter,
                counts,
                "{name}"
            );
        }
        for descriptor in descriptors() {
            let counts = labels
                .get(&descriptor.name)
                .map(|c| c.iter().copied().collect());
            assert_eq!(
                counts,
                Some(vec![descriptor.label_keys.len()]),
                "{}",
                descriptor.name
            );
            assert!(!descriptor.help.is_empty());
        }
        // One that ended has none.
        stats.containers[0].container.state = hull_spec::info::ContainerState::Exited;
        assert!(pod(&stats).container_metrics.is_empty());
        // A guest that is silent takes its own with it.
        stats.guest = None;
        let names: BTreeSet<_> = pod(&stats).metrics.into_iter().map(|m| m.name).collect();
        assert!(names.contains("container_memory_usage_bytes"));
        assert!(!names.contains("container_network_receive_bytes_total"));
    }

    #[test]
    fn values_are_those_of_their_names() {
        let all = pod(&testing::pod_stats());
        let value = |metrics: &[Metric], name: &str| {
            let metric = metrics.iter().find(|m| m.name == name).unwrap();
            metric.value.unwrap().value
        };
        let container = &all.container_metrics[0].metrics;
        assert_eq!(value(container, "container_cpu_usage_seconds_total"), 7);
        assert_eq!(value(&all.metrics, "container_cpu_usage_seconds_total"), 9);
        assert_eq!(value(container, "container_memory_working_set_bytes"), 4096);
        assert_eq!(
            value(container, "container_pressure_io_waiting_seconds_total"),
            3
        );
        assert_eq!(
            value(container, "container_pressure_io_stalled_seconds_total"),
            1
        );
        assert_eq!(value(container, "container_ulimits_soft"), 1024);
        let series = &container[0].label_values;
        assert_eq!(series[3..6], ["default", "web", "app"]);
        let of_pod = &all.metrics[0].label_values;
        assert_eq!(of_pod[3..6], ["default", "web", ""]);
    }
}
