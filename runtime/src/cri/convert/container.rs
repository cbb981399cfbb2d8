//! Containers: request to specification, information to status.

use std::path::{Component, Path, PathBuf};

use hull_proto_cri::v1;
use hull_spec::{
    info::{ContainerInfo, ContainerState},
    spec::{Adjusted, ContainerMetadata, ContainerSpec, DeviceSpec},
};

use super::{enumeration, image, mount, required, resources, security, signal};
use crate::cri::error::CriError;

/// What is asked for.
pub(crate) fn spec(config: Option<v1::ContainerConfig>) -> Result<ContainerSpec, CriError> {
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
    Ok(ContainerSpec {
        metadata: ContainerMetadata {
            name: metadata.name,
            attempt: metadata.attempt,
        },
        image: image::request("config.image", config.image)?,
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        env: config
            .envs
            .into_iter()
            .enumerate()
            .map(|(index, pair)| variable(&format!("config.envs[{index}]"), pair))
            .collect::<Result<_, _>>()?,
        mounts: config
            .mounts
            .into_iter()
            .enumerate()
            .map(|(index, wanted)| mount::from_cri(&format!("config.mounts[{index}]"), wanted))
            .collect::<Result<_, _>>()?,
        devices: config.devices.into_iter().map(device).collect(),
        cdi_devices: config.cdi_devices.into_iter().map(|cdi| cdi.name).collect(),
        labels: config.labels,
        annotations: config.annotations,
        log_path: log_path(config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.map(resources::from_cri),
        security: security::of_container("config.linux.security_context", context)?,
        stop_signal: signal::from_cri(enumeration("config.stop_signal", config.stop_signal)?)?,
        adjusted: Adjusted::default(),
    })
}

fn variable(field: &str, pair: v1::KeyValue) -> Result<(String, String), CriError> {
    if pair.key.is_empty() || pair.key.contains(['=', '\0']) {
        return Err(CriError::invalid(
            format!("{field}.key"),
            format!("{:?} is no name of a variable", pair.key),
        ));
    }
    let value = String::from_utf8(pair.value)
        .ok()
        .filter(|value| !value.contains('\0'))
        .ok_or_else(|| {
            CriError::invalid(
                format!("{field}.value"),
                format!("the value of {} is not UTF-8 without zero bytes", pair.key),
            )
        })?;
    Ok((pair.key, value))
}

fn device(device: v1::Device) -> DeviceSpec {
    DeviceSpec {
        container_path: device.container_path.into(),
        host_path: device.host_path.into(),
        permissions: device.permissions,
    }
}

/// The log's path stays below the sandbox's log directory.
fn log_path(path: String) -> Result<PathBuf, CriError> {
    let below = Path::new(&path)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !below {
        return Err(CriError::invalid(
            "config.log_path",
            format!("{path:?} is not a path below the log directory"),
        ));
    }
    Ok(path.into())
}

/// CRI's word for a state.
pub(crate) fn state(state: ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running => v1::ContainerState::ContainerRunning,
        ContainerState::Exited => v1::ContainerState::ContainerExited,
        ContainerState::Unknown => v1::ContainerState::ContainerUnknown,
    }
}

fn metadata(info: &ContainerInfo) -> v1::ContainerMetadata {
    v1::ContainerMetadata {
        name: info.spec.metadata.name.clone(),
        attempt: info.spec.metadata.attempt,
    }
}

/// An entry of a list.
pub(crate) fn item(info: &ContainerInfo) -> v1::Container {
    v1::Container {
        id: info.id.to_string(),
        pod_sandbox_id: info.pod.to_string(),
        metadata: Some(metadata(info)),
        image: Some(image::spec(&info.spec.image)),
        image_ref: info.image_ref.clone(),
        state: state(info.state).into(),
        created_at: info.created_at_ns,
        labels: info.spec.labels.clone(),
        annotations: info.spec.annotations.clone(),
        image_id: info.image_id.to_string(),
    }
}

/// The whole status.
pub(crate) fn status(info: &ContainerInfo) -> v1::ContainerStatus {
    let spec = &info.spec;
    v1::ContainerStatus {
        id: info.id.to_string(),
        metadata: Some(metadata(info)),
        state: state(info.state).into(),
        created_at: info.created_at_ns,
        started_at: info.started_at_ns,
        finished_at: info.finished_at_ns,
        exit_code: info.exit_code,
        image: Some(image::spec(&spec.image)),
        image_ref: info.image_ref.clone(),
        reason: info.reason.clone(),
        message: info.message.clone(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        mounts: spec
            .mounts
            .iter()
            .enumerate()
            .map(|(index, asked)| mount::to_cri(asked, info.mount_images.get(&index)))
            .collect(),
        log_path: info.log_path.to_string_lossy().into_owned(),
        resources: info
            .resources
            .as_ref()
            .map(|limits| v1::ContainerResources {
                linux: Some(resources::to_cri(limits)),
                windows: None,
            }),
        image_id: info.image_id.to_string(),
        user: info.user.as_ref().map(|user| v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().map(|&group| group.into()).collect(),
            }),
        }),
        stop_signal: signal::to_cri(info.stop_signal).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hull_spec::{
        id::{ContainerId, PodId},
        info::ContainerUser,
    };

    use super::*;

    fn config() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: "c".into(),
                attempt: 1,
            }),
            image: Some(v1::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn refused(config: v1::ContainerConfig) -> String {
        spec(Some(config)).unwrap_err().to_string()
    }

    #[test]
    fn missing_parts_are_named() {
        assert_eq!(spec(None).unwrap_err().to_string(), "config: is missing");
        assert_eq!(
            refused(v1::ContainerConfig {
                metadata: None,
                ..config()
            }),
            "config.metadata: is missing"
        );
        assert_eq!(
            refused(v1::ContainerConfig {
                image: None,
                ..config()
            }),
            "config.image.image: is missing"
        );
    }

    #[test]
    fn variables_are_checked() {
        let with = |key: &str, value: &[u8]| v1::ContainerConfig {
            envs: vec![v1::KeyValue {
                key: key.into(),
                value: value.into(),
            }],
            ..config()
        };
        let good = spec(Some(with("A", b"b=c"))).unwrap();
        assert_eq!(good.env, [("A".to_owned(), "b=c".to_owned())]);
        assert!(refused(with("", b"x")).starts_with("config.envs[0].key"));
        assert!(refused(with("A=B", b"x")).starts_with("config.envs[0].key"));
        assert!(refused(with("A", &[0xff])).starts_with("config.envs[0].value"));
        assert!(refused(with("A", b"x\0y")).starts_with("config.envs[0].value"));
    }

    #[test]
    fn a_log_stays_in_its_directory() {
        let with = |path: &str| v1::ContainerConfig {
            log_path: path.into(),
            ..config()
        };
        assert!(spec(Some(with(""))).is_ok());
        assert!(spec(Some(with("c/0.log"))).is_ok());
        for bad in ["/etc/passwd", "../0.log", "c/../../0.log"] {
            assert!(refused(with(bad)).starts_with("config.log_path"), "{bad}");
        }
    }

    #[test]
    fn a_status_tells_what_was_asked_for() {
        let asked = v1::ContainerConfig {
            labels: [("a".to_owned(), "b".to_owned())].into(),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(v1::LinuxContainerResources {
                    cpu_shares: 2,
                    ..Default::default()
                }),
                security_context: None,
            }),
            stop_signal: v1::Signal::Sigquit.into(),
            ..config()
        };
        let spec = spec(Some(asked.clone())).unwrap();
        let info = ContainerInfo {
            id: ContainerId::random(),
            pod: PodId::random(),
            image_id: format!("sha256:{}", "1".repeat(64)).parse().unwrap(),
            image_ref: "busybox@sha256:2".into(),
            state: ContainerState::Exited,
            created_at_ns: 1,
            started_at_ns: 2,
            finished_at_ns: 3,
            exit_code: 137,
            reason: "OOMKilled".into(),
            message: String::new(),
            log_path: "/log/c/0.log".into(),
            stop_signal: spec.stop_signal.unwrap(),
            mount_images: Default::default(),
            user: Some(ContainerUser {
                uid: 1,
                gid: 2,
                groups: vec![2, 3],
            }),
            resources: spec.resources.clone(),
            spec: Arc::new(spec),
        };
        let status = status(&info);
        assert_eq!(status.metadata, asked.metadata);
        assert_eq!(status.image, asked.image);
        assert_eq!(status.labels, asked.labels);
        assert_eq!(status.stop_signal(), v1::Signal::Sigquit);
        assert_eq!(status.state(), v1::ContainerState::ContainerExited);
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled")
        );
        let limits = status.resources.unwrap().linux.unwrap();
        assert_eq!(limits.cpu_shares, 2);
        let user = status.user.unwrap().linux.unwrap();
        assert_eq!(user.supplemental_groups, [2, 3]);
        assert_eq!(item(&info).pod_sandbox_id, info.pod.to_string());
    }
}
