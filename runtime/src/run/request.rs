//! Command line to CRI requests.

use std::{path::Path, str::FromStr};

use hull_proto_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata,
};

use super::RunArgs;

/// The log file's name in the session's directory.
pub(super) const LOG: &str = "container.log";
/// The quota's period, in microseconds.
const PERIOD_US: i64 = 100_000;

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) i64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_uppercase();
        let upper = upper.trim_end_matches("IB").trim_end_matches('B');
        let digits = upper.trim_end_matches(['K', 'M', 'G']);
        let shift = match &upper[digits.len()..] {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            _ => return Err(format!("{text:?} is no size")),
        };
        digits
            .parse::<i64>()
            .ok()
            .filter(|&number| number > 0)
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no size"))
    }
}

/// An environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Variable {
    name: String,
    value: String,
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(format!("{text:?} is not NAME=VALUE")),
        }
    }
}

/// A number of CPUs.
pub(super) fn parse_cpus(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|cpus| (0.01..=255.0).contains(cpus))
        .ok_or_else(|| format!("{text:?} is no number from 0.01 to 255"))
}

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
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1048576", 1 << 20),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("64MiB", 64 << 20),
            ("2g", 2 << 30),
            ("8kb", 8 << 10),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "M", "0", "-1", "1T", "9999999999999G", "1.5G", "1KM"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_become_a_quota() {
        let arguments = RunArgs {
            image: "busybox".into(),
            command: Vec::new(),
            env: vec!["A=b=c".parse().unwrap()],
            memory: None,
            cpus: Some(parse_cpus("1.5").unwrap()),
            handler: String::new(),
            quiet: false,
        };
        let config = container(&arguments, "sha256:1");
        assert_eq!(config.envs[0].value, b"b=c");
        let limits = config.linux.unwrap().resources.unwrap();
        assert_eq!((limits.cpu_period, limits.cpu_quota), (100_000, 150_000));
        assert!(parse_cpus("0").is_err());
        assert!(parse_cpus("NaN").is_err());
    }
}
