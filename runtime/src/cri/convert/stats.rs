//! Statistics: what pods and containers use, in CRI's words.
//!
//! Numbers of a container are those of its cgroup in the guest. Those of a pod are its cost on
//! the host: CPU time and memory of the whole VM, so they are more than the sum of the
//! containers. Pressure, network and the number of processes of a pod are the guest's.

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

use std::path::Path;

use hull_proto_cri::v1;
use hull_spec::{
    info::{ContainerInfo, SandboxInfo},
    stats::{
        ContainerStats, Filesystem, GuestUsage, HostUsage, Interface, PodStats, Pressure, Stall,
        Usage,
    },
};

/// A container's. `disks` is where the pods' disks are on the host, which kubelet looks up.
pub(crate) fn container(stats: &ContainerStats, disks: &Path) -> v1::ContainerStats {
    let (usage, timestamp) = (&stats.usage, stats.at_ns);
    v1::ContainerStats {
        attributes: Some(attributes(&stats.container)),
        cpu: Some(v1::CpuUsage {
            timestamp,
            usage_core_nano_seconds: value(usage.cpu.usage_ns),
            usage_nano_cores: stats.nano_cores.and_then(value),
            psi: psi(usage.cpu.pressure),
        }),
        memory: Some(memory(usage, timestamp)),
        writable_layer: stats.writable.map(|writable| filesystem(&writable, disks)),
        swap: Some(swap(usage, timestamp)),
        io: Some(v1::IoUsage {
            timestamp,
            psi: psi(usage.io_pressure),
        }),
    }
}

/// A pod's with its containers.
pub(crate) fn pod(stats: &PodStats, disks: &Path) -> v1::PodSandboxStats {
    let (host, guest) = (stats.host.as_ref(), stats.guest.as_ref());
    let containers = stats.containers.iter();
    v1::PodSandboxStats {
        attributes: Some(pod_attributes(&stats.sandbox)),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: host.map(|host| pod_cpu(host, guest)),
            memory: host.map(|host| pod_memory(host, guest)),
            network: guest.map(network),
            process: guest.map(|guest| v1::ProcessUsage {
                timestamp: guest.at_ns,
                process_count: value(guest.usage.tasks.processes),
            }),
            containers: containers.map(|stats| container(stats, disks)).collect(),
            io: guest.map(|guest| v1::IoUsage {
                timestamp: guest.at_ns,
                psi: psi(guest.usage.io_pressure),
            }),
        }),
        windows: None,
    }
}

fn attributes(info: &ContainerInfo) -> v1::ContainerAttributes {
    v1::ContainerAttributes {
        id: info.id.to_string(),
        metadata: Some(v1::ContainerMetadata {
            name: info.spec.metadata.name.clone(),
            attempt: info.spec.metadata.attempt,
        }),
        labels: info.spec.labels.clone(),
        annotations: info.spec.annotations.clone(),
    }
}

fn pod_attributes(info: &SandboxInfo) -> v1::PodSandboxAttributes {
    v1::PodSandboxAttributes {
        id: info.id.to_string(),
        metadata: Some(super::sandbox::metadata(info)),
        labels: info.spec.labels.clone(),
        annotations: info.spec.annotations.clone(),
    }
}

fn memory(usage: &Usage, timestamp: i64) -> v1::MemoryUsage {
    let memory = &usage.memory;
    let available = |limit: u64| limit.saturating_sub(memory.working_set_bytes);
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: value(memory.working_set_bytes),
        available_bytes: memory.limit_bytes.and_then(|limit| value(available(limit))),
        usage_bytes: value(memory.usage_bytes),
        rss_bytes: value(memory.rss_bytes),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: psi(memory.pressure),
    }
}

fn swap(usage: &Usage, timestamp: i64) -> v1::SwapUsage {
    let memory = &usage.memory;
    let available = |limit: u64| limit.saturating_sub(memory.swap_usage_bytes);
    v1::SwapUsage {
        timestamp,
        swap_available_bytes: memory
            .swap_limit_bytes
            .and_then(|limit| value(available(limit))),
        swap_usage_bytes: value(memory.swap_usage_bytes),
    }
}

fn filesystem(usage: &Filesystem, disks: &Path) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: usage.at_ns,
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: disks.to_string_lossy().into_owned(),
        }),
        used_bytes: value(usage.used_bytes),
        inodes_used: value(usage.used_inodes),
    }
}

fn pod_cpu(host: &HostUsage, guest: Option<&GuestUsage>) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp: host.at_ns,
        usage_core_nano_seconds: value(host.cpu_usage_ns),
        usage_nano_cores: host.nano_cores.and_then(value),
        psi: psi(guest.and_then(|guest| guest.usage.cpu.pressure)),
    }
}

fn pod_memory(host: &HostUsage, guest: Option<&GuestUsage>) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp: host.at_ns,
        working_set_bytes: value(host.memory_working_set_bytes),
        // Its limit is kubelet's, on the cgroup above.
        available_bytes: None,
        usage_bytes: value(host.memory_usage_bytes),
        rss_bytes: value(host.rss_bytes),
        page_faults: value(host.page_faults),
        major_page_faults: value(host.major_page_faults),
        psi: psi(guest.and_then(|guest| guest.usage.memory.pressure)),
    }
}

/// The first interface is the default one: it is the one that CNI made.
fn network(guest: &GuestUsage) -> v1::NetworkUsage {
    let is_default = |i: &&Interface| i.name == "eth0";
    let default = guest
        .interfaces
        .iter()
        .find(is_default)
        .or_else(|| guest.interfaces.first());
    let others = guest.interfaces.iter().filter(|i| Some(*i) != default);
    v1::NetworkUsage {
        timestamp: guest.at_ns,
        default_interface: default.map(interface),
        interfaces: others.map(interface).collect(),
    }
}

fn interface(usage: &Interface) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: usage.name.clone(),
        rx_bytes: value(usage.received.bytes),
        rx_errors: value(usage.received.errors),
        tx_bytes: value(usage.sent.bytes),
        tx_errors: value(usage.sent.errors),
    }
}

fn psi(pressure: Option<Pressure>) -> Option<v1::PsiStats> {
    pressure.map(|pressure| v1::PsiStats {
        full: Some(stall(pressure.full)),
        some: Some(stall(pressure.some)),
    })
}

/// The total is in microseconds, as the kernel has it.
fn stall(stall: Stall) -> v1::PsiData {
    v1::PsiData {
        total: stall.total_us,
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the form of the message's fields")]
fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::convert::testing;

    #[test]
    fn a_pod_has_the_hosts_numbers_and_its_containers_the_guests() {
        let told = testing::pod_stats();
        let stats = pod(&told, Path::new("/disks"));
        let linux = stats.linux.unwrap();
        let cpu = linux.cpu.unwrap();
        assert_eq!(cpu.timestamp, 6);
        assert_eq!(cpu.usage_core_nano_seconds, value(9_000_000_000));
        assert_eq!(cpu.usage_nano_cores, None);
        assert_eq!(cpu.psi.unwrap().some.unwrap().total, 3_000_000);
        assert_eq!(linux.memory.unwrap().usage_bytes, value(1 << 20));
        let network = linux.network.unwrap();
        assert_eq!(network.default_interface.unwrap().name, "eth0");
        assert_eq!(network.interfaces[0].name, "net1");

        let container = &linux.containers[0];
        let cpu = container.cpu.as_ref().unwrap();
        assert_eq!((cpu.timestamp, cpu.usage_nano_cores), (5, value(11)));
        assert_eq!(cpu.usage_core_nano_seconds, value(7_500_000_000));
        let memory = container.memory.as_ref().unwrap();
        assert_eq!(memory.available_bytes, value(10_000 - 4096));
        let swap = container.swap.as_ref().unwrap();
        assert_eq!(swap.swap_available_bytes, value(0));
        let layer = container.writable_layer.as_ref().unwrap();
        assert_eq!(layer.fs_id.as_ref().unwrap().mountpoint, "/disks");
        assert_eq!(layer.used_bytes, value(77));
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let mut told = testing::pod_stats();
        told.guest = None;
        told.containers[0].usage.memory.limit_bytes = None;
        told.containers[0].usage.cpu.pressure = None;
        told.containers[0].writable = None;
        let linux = pod(&told, Path::new("/disks")).linux.unwrap();
        assert!(linux.cpu.unwrap().psi.is_none());
        assert!(linux.network.is_none() && linux.process.is_none() && linux.io.is_none());
        let container = &linux.containers[0];
        assert!(container.memory.as_ref().unwrap().available_bytes.is_none());
        assert!(container.cpu.as_ref().unwrap().psi.is_none());
        assert!(container.writable_layer.is_none());
    }
}
