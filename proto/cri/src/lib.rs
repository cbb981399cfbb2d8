//! The Container Runtime Interface v1: messages, clients and servers.
//!
//! `proto/api.proto` is the listing, generated into [`v1`]; there is no logic
//! here but a `Debug` that hides registry passwords. Enum fields arrive as `i32`:
//! whoever reads one decides what an unknown value means. With the feature
//! `serde`, messages can be read from and written to JSON as crictl has it.

#![forbid(unsafe_code)]

use std::fmt;

/// Package `runtime.v1`, as Kubernetes documents it (k8s.io/cri-api).
#[allow(warnings, clippy::all, clippy::pedantic, reason = "generated code")]
#[allow(
    clippy::allow_attributes,
    reason = "which lints fire varies with the generator"
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// How an option of `RestorePod` begins that is Hull's own: after it comes where containers have a path of the host, and
/// the option's value is which they get. A mount in `container_configs` says the same.
pub const RESTORE_MOUNT: &str = "mount:";

impl fmt::Debug for v1::AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// Bytes that are text in JSON: values of environment variables.
#[cfg(feature = "serde")]
mod text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&String::from_utf8_lossy(bytes))
    }

    pub(crate) fn deserialize<'a, D: Deserializer<'a>>(input: D) -> Result<Vec<u8>, D::Error> {
        String::deserialize(input).map(String::into_bytes)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::v1;

    /// Encodes the message and returns its first key (field number << 3 | wire type).
    fn first_key(message: &impl Message) -> u64 {
        let bytes = message.encode_to_vec();
        let mut slice = bytes.as_slice();
        prost::encoding::decode_varint(&mut slice).expect("a message with one field set")
    }

    const VARINT: u64 = 0;
    const BYTES: u64 = 2;

    #[test]
    fn field_numbers_are_those_of_the_public_contract() {
        let cases: [(&str, u64, u64, u64); 12] = [
            (
                "ImageSpec.image_ref",
                first_key(&v1::ImageSpec {
                    image_ref: "x".into(),
                    ..Default::default()
                }),
                20,
                BYTES,
            ),
            (
                "Mount.mount_options",
                first_key(&v1::Mount {
                    mount_options: vec!["x".into()],
                    ..Default::default()
                }),
                11,
                BYTES,
            ),
            (
                "Mount.readonly",
                first_key(&v1::Mount {
                    readonly: true,
                    ..Default::default()
                }),
                3,
                VARINT,
            ),
            (
                "ContainerConfig.stop_signal",
                first_key(&v1::ContainerConfig {
                    stop_signal: v1::Signal::Sigterm.into(),
                    ..Default::default()
                }),
                18,
                VARINT,
            ),
            (
                "LinuxContainerSecurityContext.run_as_group",
                first_key(&v1::LinuxContainerSecurityContext {
                    run_as_group: Some(v1::Int64Value { value: 1 }),
                    ..Default::default()
                }),
                12,
                BYTES,
            ),
            (
                "LinuxSandboxSecurityContext.supplemental_groups_policy",
                first_key(&v1::LinuxSandboxSecurityContext {
                    supplemental_groups_policy: v1::SupplementalGroupsPolicy::Strict.into(),
                    ..Default::default()
                }),
                11,
                VARINT,
            ),
            (
                "LinuxContainerResources.memory_swap_limit_in_bytes",
                first_key(&v1::LinuxContainerResources {
                    memory_swap_limit_in_bytes: 1,
                    ..Default::default()
                }),
                10,
                VARINT,
            ),
            (
                "PodSandboxMetadata.namespace",
                first_key(&v1::PodSandboxMetadata {
                    namespace: "x".into(),
                    ..Default::default()
                }),
                3,
                BYTES,
            ),
            (
                "ContainerStatus.image_id",
                first_key(&v1::ContainerStatus {
                    image_id: "x".into(),
                    ..Default::default()
                }),
                17,
                BYTES,
            ),
            (
                "StatusResponse.features",
                first_key(&v1::StatusResponse {
                    features: Some(v1::RuntimeFeatures::default()),
                    ..Default::default()
                }),
                4,
                BYTES,
            ),
            (
                "RestorePodRequest.container_configs",
                first_key(&v1::RestorePodRequest {
                    container_configs: vec![v1::ContainerConfig::default()],
                    ..Default::default()
                }),
                5,
                BYTES,
            ),
            (
                "UpdatePodSandboxResourcesRequest.resources",
                first_key(&v1::UpdatePodSandboxResourcesRequest {
                    resources: Some(v1::LinuxContainerResources::default()),
                    ..Default::default()
                }),
                3,
                BYTES,
            ),
        ];
        for (name, key, number, wire) in cases {
            assert_eq!(key, number << 3 | wire, "{name}");
        }
        assert_eq!(v1::Signal::Sigterm as i32, 23);
        assert_eq!(v1::Signal::Sigrtmax as i32, 65);
        assert_eq!(v1::CgroupDriver::Cgroupfs as i32, 1);
    }

    #[test]
    fn environment_values_may_be_any_bytes() {
        let value = v1::KeyValue {
            key: "K".into(),
            value: vec![0xff, 0x00],
        };
        let back = v1::KeyValue::decode(value.encode_to_vec().as_slice()).expect("decode");
        assert_eq!(back.value, [0xff, 0x00]);
    }

    #[test]
    fn debug_hides_credentials() {
        let auth = v1::AuthConfig {
            username: "me".into(),
            password: "secret-1".into(),
            auth: "secret-2".into(),
            identity_token: "secret-3".into(),
            registry_token: "secret-4".into(),
            ..Default::default()
        };
        let request = v1::PullImageRequest {
            auth: Some(auth),
            ..Default::default()
        };
        let text = format!("{request:?}");
        assert!(text.contains("me"));
        assert!(!text.contains("secret"));
    }

    #[cfg(feature = "serde")]
    #[test]
    fn json_is_read_in_crictl_names() {
        let text = r#"{"metadata":{"name":"c"},"image":{"image":"busybox"},
            "envs":[{"key":"A","value":"b"}],"CDI_devices":[{"name":"x"}],
            "mounts":[{"container_path":"/m","uidMappings":[{"length":1}]}],
            "linux":{"security_context":{"run_as_user":{"value":7},
            "namespace_options":{"pid":1}}}}"#;
        let config: v1::ContainerConfig = serde_json::from_str(text).expect("parse");
        assert_eq!(config.envs[0].value, b"b");
        let security = config.linux.and_then(|l| l.security_context).expect("set");
        assert_eq!(security.run_as_user.map(|v| v.value), Some(7));
        assert!(serde_json::from_str::<v1::ContainerConfig>(r#"{"imag":{}}"#).is_err());
    }
}
