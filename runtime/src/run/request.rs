//! Arguments to CRI requests.

use std::path::Path;

use hull_proto_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata,
};

use super::arguments::{Bytes, RunArgs};

/// The log file's name in the session's directory.
pub(super) const LOG: &str = "container.log";
/// The quota's period, in microseconds.
const PERIOD_US: i64 = 100_000;

fn limits(arguments: &RunArgs) -> Option<LinuxContainerResources> {
    if arguments.memory.is_none() && arguments.cpus.is_none() {
        return None;
    }
    let mut limits = LinuxContainerResources::default();
    if let Some(Bytes(bytes)) = arguments.memory {
        limits.memory_limit_in_bytes = bytes;
    }
    if let Some(cpus) = arguments.cpus {
        limits.cpu_period = PERIOD_US;
        #[expect(clippy::cast_possible_truncation, reason = "at most 255 periods")]
        let quota = (cpus * 100_000.0) as i64;
        limits.cpu_quota = quota;
    }
    Some(limits)
}

/// The sandbox, with its log files in `directory`.
pub(super) fn sandbox(arguments: &RunArgs, name: &str, directory: &Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "hull-run".to_owned(),
            attempt: 0,
        }),
        log_directory: directory.to_string_lossy().into_owned(),
        linux: Some(LinuxPodSandboxConfig {
            resources: limits(arguments),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The container of the image that was pulled.
pub(super) fn container(arguments: &RunArgs, image_id: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: "run".to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: image_id.to_owned(),
            user_specified_image: arguments.image.clone(),
            ..Default::default()
        }),
        command: arguments.command.clone(),
        envs: arguments
            .env
            .iter()
            .map(|variable| KeyValue {
                key: variable.name.clone(),
                value: variable.value.clone().into_bytes(),
            })
            .collect(),
        log_path: LOG.to_owned(),
        linux: Some(LinuxContainerConfig {
            resources: limits(arguments),
            security_context: None,
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_become_a_quota() {
        let arguments = RunArgs {
            image: "busybox".into(),
            command: Vec::new(),
            env: vec!["A=b=c".parse().unwrap()],
            memory: None,
            cpus: Some(1.5),
            handler: String::new(),
            quiet: false,
        };
        let config = container(&arguments, "sha256:1");
        assert_eq!(config.envs[0].value, b"b=c");
        let limits = config.linux.unwrap().resources.unwrap();
        assert_eq!((limits.cpu_period, limits.cpu_quota), (100_000, 150_000));
    }
}
