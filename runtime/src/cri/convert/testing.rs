//! Statistics for tests.

use std::sync::Arc;

use hull_spec::{
    id::{ContainerId, PodId},
    info::{ContainerInfo, ContainerState, SandboxInfo, SandboxState},
    spec::{ContainerMetadata, ContainerSpec, Resources, SandboxMetadata, SandboxSpec},
    stats::{
        ContainerStats, DeviceIo, Filesystem, GuestUsage, HostUsage, Hugetlb, Interface, PodStats,
        Pressure, Stall, Ulimit, Usage,
    },
};

/// A pod with one container that runs, of which everything is known.
pub(crate) fn pod_stats() -> PodStats {
    let pod = PodId::random();
    let stall = |seconds: u64| Stall {
        avg10: 1.5,
        total_us: seconds * 1_000_000,
        ..Stall::default()
    };
    let pressure = Some(Pressure {
        some: stall(3),
        full: stall(1),
    });
    let mut usage = Usage {
        io: vec![DeviceIo {
            device: "/dev/vdb".into(),
            ..DeviceIo::default()
        }],
        io_pressure: pressure,
        hugetlb: vec![Hugetlb::default()],
        ..Usage::default()
    };
    usage.cpu.usage_ns = 7_500_000_000;
    usage.cpu.pressure = pressure;
    usage.memory.pressure = pressure;
    usage.memory.working_set_bytes = 4096;
    usage.memory.limit_bytes = Some(10_000);
    usage.memory.swap_limit_bytes = Some(0);
    let interface = |name: &str| Interface {
        name: name.into(),
        ..Interface::default()
    };
    PodStats {
        containers: vec![ContainerStats {
            container: container(&pod),
            at_ns: 5,
            usage: usage.clone(),
            nano_cores: Some(11),
            writable: Some(Filesystem {
                used_bytes: 77,
                ..Filesystem::default()
            }),
            ulimits: vec![Ulimit {
                name: "max_open_files".into(),
                soft: Some(1024),
            }],
        }],
        host: Some(HostUsage {
            at_ns: 6,
            cpu_usage_ns: 9_000_000_000,
            memory_usage_bytes: 1 << 20,
            ..HostUsage::default()
        }),
        guest: Some(GuestUsage {
            at_ns: 5,
            usage,
            interfaces: vec![interface("net1"), interface("eth0")],
            scratch: None,
        }),
        sandbox: sandbox(pod),
    }
}

fn sandbox(id: PodId) -> SandboxInfo {
    SandboxInfo {
        id,
        spec: Arc::new(SandboxSpec {
            metadata: SandboxMetadata {
                name: "web".into(),
                namespace: "default".into(),
                ..SandboxMetadata::default()
            },
            ..SandboxSpec::default()
        }),
        state: SandboxState::Ready,
        message: String::new(),
        created_at_ns: 1,
        ips: Vec::new(),
        vm: None,
        guest: None,
        boot: None,
    }
}

fn container(pod: &PodId) -> ContainerInfo {
    ContainerInfo {
        mount_images: Default::default(),
        id: ContainerId::random(),
        pod: pod.clone(),
        spec: Arc::new(ContainerSpec {
            metadata: ContainerMetadata {
                name: "app".into(),
                attempt: 0,
            },
            ..ContainerSpec::default()
        }),
        resources: Some(Resources {
            cpu_quota_us: 20_000,
            ..Resources::default()
        }),
        image_id: format!("sha256:{}", "1".repeat(64)).parse().unwrap(),
        image_ref: String::new(),
        state: ContainerState::Running,
        created_at_ns: 1,
        started_at_ns: 2,
        finished_at_ns: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        log_path: "".into(),
        stop_signal: hull_spec::signal::Signal::TERM,
        user: None,
    }
}
