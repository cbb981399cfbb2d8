//! Pod sandboxes: request to specification, information to status.

use std::path::PathBuf;

use hull_proto_cri::v1;
use hull_spec::{
    info::{SandboxInfo, SandboxState},
    spec::{Dns, PortMapping, SandboxMetadata, SandboxSpec},
};

use super::{enumeration, required, resources, security};
use crate::cri::error::CriError;

/// What is asked for.
pub(crate) fn spec(
    config: Option<v1::PodSandboxConfig>,
    runtime_handler: String,
) -> Result<SandboxSpec, CriError> {
    let config = required("config", config)?;
    let metadata = required("config.metadata", config.metadata)?;
    if config.windows.is_some() {
        return Err(CriError::unsupported(
            "config.windows",
            "this node runs Linux pods only",
        ));
    }
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let field = "config.linux.security_context";
    Ok(SandboxSpec {
        metadata: SandboxMetadata {
            name: metadata.name,
            uid: metadata.uid,
            namespace: metadata.namespace,
            attempt: metadata.attempt,
        },
        hostname: config.hostname,
        log_directory: log_directory(config.log_directory)?,
        dns: config.dns_config.map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: config
            .port_mappings
            .into_iter()
            .enumerate()
            .map(|(index, port)| port_mapping(&format!("config.port_mappings[{index}]"), port))
            .collect::<Result<_, _>>()?,
        labels: config.labels,
        annotations: config.annotations,
        cgroup_parent: linux.cgroup_parent,
        sysctls: linux.sysctls,
        resources: linux.resources.map(resources::from_cri),
        overhead: linux.overhead.map(resources::from_cri),
        namespaces: security::namespaces(field, context.namespace_options.as_ref())?,
        security: security::of_sandbox(field, &context)?,
        runtime_handler,
    })
}

fn log_directory(path: String) -> Result<PathBuf, CriError> {
    if !path.is_empty() && !path.starts_with('/') {
        return Err(CriError::invalid(
            "config.log_directory",
            format!("{path:?} is not an absolute path"),
        ));
    }
    Ok(path.into())
}

fn port_mapping(field: &str, mapping: v1::PortMapping) -> Result<PortMapping, CriError> {
    let port = |name: &str, value: i32, least: u16| {
        u16::try_from(value)
            .ok()
            .filter(|&port| port >= least)
            .ok_or_else(|| {
                CriError::invalid(format!("{field}.{name}"), format!("{value} is no port"))
            })
    };
    let protocol = match enumeration(&format!("{field}.protocol"), mapping.protocol)? {
        v1::Protocol::Tcp => "tcp",
        v1::Protocol::Udp => "udp",
        v1::Protocol::Sctp => "sctp",
    };
    if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<std::net::IpAddr>().is_err() {
        return Err(CriError::invalid(
            format!("{field}.host_ip"),
            format!("{:?} is no address", mapping.host_ip),
        ));
    }
    Ok(PortMapping {
        protocol: protocol.to_owned(),
        container_port: port("container_port", mapping.container_port, 1)?,
        host_port: port("host_port", mapping.host_port, 0)?,
        host_ip: mapping.host_ip,
    })
}

/// CRI's word for a state.
pub(crate) fn state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

/// Its name.
pub(crate) fn metadata(info: &SandboxInfo) -> v1::PodSandboxMetadata {
    let metadata = &info.spec.metadata;
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

/// An entry of a list.
pub(crate) fn item(info: &SandboxInfo) -> v1::PodSandbox {
    v1::PodSandbox {
        id: info.id.to_string(),
        metadata: Some(metadata(info)),
        state: state(info.state).into(),
        created_at: info.created_at_ns,
        labels: info.spec.labels.clone(),
        annotations: info.spec.annotations.clone(),
        runtime_handler: info.spec.runtime_handler.clone(),
    }
}

/// The whole status.
pub(crate) fn status(info: &SandboxInfo) -> v1::PodSandboxStatus {
    let mut ips = info.ips.iter().map(ToString::to_string);
    v1::PodSandboxStatus {
        id: info.id.to_string(),
        metadata: Some(metadata(info)),
        state: state(info.state).into(),
        created_at: info.created_at_ns,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(security::namespace_option(&info.spec.namespaces)),
            }),
        }),
        labels: info.spec.labels.clone(),
        annotations: info.spec.annotations.clone(),
        runtime_handler: info.spec.runtime_handler.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hull_spec::id::PodId;

    use super::*;

    fn config() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "web".into(),
                uid: "u".into(),
                namespace: "default".into(),
                attempt: 2,
            }),
            ..Default::default()
        }
    }

    fn refused(config: v1::PodSandboxConfig) -> String {
        spec(Some(config), String::new()).unwrap_err().to_string()
    }

    #[test]
    fn missing_parts_are_named() {
        let error = spec(None, String::new()).unwrap_err();
        assert_eq!(error.to_string(), "config: is missing");
        assert_eq!(refused(Default::default()), "config.metadata: is missing");
    }

    #[test]
    fn ports_are_checked() {
        let with = |container_port, host_port, protocol, host_ip: &str| v1::PodSandboxConfig {
            port_mappings: vec![v1::PortMapping {
                protocol,
                container_port,
                host_port,
                host_ip: host_ip.into(),
            }],
            ..config()
        };
        let good = spec(Some(with(80, 8080, 1, "127.0.0.1")), String::new()).unwrap();
        assert_eq!(good.port_mappings[0].protocol, "udp");
        assert_eq!(good.port_mappings[0].host_port, 8080);
        assert!(spec(Some(with(80, 0, 0, "")), String::new()).is_ok());
        assert!(refused(with(0, 1, 0, "")).starts_with("config.port_mappings[0].container_port"));
        assert!(refused(with(1, 65536, 0, "")).starts_with("config.port_mappings[0].host_port"));
        assert!(refused(with(1, 1, 3, "")).starts_with("config.port_mappings[0].protocol"));
        assert!(refused(with(1, 1, 0, "here")).starts_with("config.port_mappings[0].host_ip"));
    }

    #[test]
    fn a_status_tells_what_was_asked_for() {
        let mut asked = config();
        asked.labels = [("a".to_owned(), "b".to_owned())].into();
        asked.annotations = [("c".to_owned(), "d".to_owned())].into();
        let info = SandboxInfo {
            id: PodId::random(),
            spec: Arc::new(spec(Some(asked.clone()), "small".into()).unwrap()),
            state: SandboxState::Ready,
            message: String::new(),
            created_at_ns: 5,
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            vm: None,
            guest: None,
            boot: None,
        };
        let status = status(&info);
        assert_eq!(status.metadata, asked.metadata);
        assert_eq!(status.labels, asked.labels);
        assert_eq!(status.annotations, asked.annotations);
        assert_eq!(status.runtime_handler, "small");
        assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
        let network = status.network.unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips[0].ip, "fd00::2");
        assert_eq!(item(&info).metadata, asked.metadata);
    }
}
