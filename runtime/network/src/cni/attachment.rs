//! One pod's attachment to a network: what all calls of its plugins must be told alike.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    conf::{NetworkList, Plugin},
    version::SpecVersion,
};
use crate::request::{PodNetworkRequest, RequestError};

/// The network that a pod is attached to: what ADD, CHECK and DEL must be told alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    pub(super) list: NetworkList,
    pub(super) interface: String,
    pub(super) args: String,
    /// What plugins may have of the pod, by capability (spec section 3, "capabilities").
    #[serde(default)]
    capabilities: Map<String, Value>,
    /// The last plugin's result; null before ADD.
    #[serde(default)]
    pub(super) result: Value,
}

impl Attachment {
    /// The plugins, in the order of ADD.
    pub(crate) fn plugins(&self) -> &[Plugin] {
        &self.list.plugins
    }

    /// Forgets what an earlier ADD returned.
    pub(crate) fn reset(&mut self) {
        self.result = Value::Null;
    }

    /// Describes an attachment that is not made yet.
    ///
    /// # Errors
    /// What the request asks for and this network can't do.
    pub fn new(
        list: NetworkList,
        interface: &str,
        request: &PodNetworkRequest,
    ) -> Result<Self, RequestError> {
        let capabilities = request.capabilities()?;
        // Some networks do host ports and bandwidth without being asked by capability; but an
        // address that nobody hears of would be another one than was asked for.
        for must in ["ips", "mac"] {
            if capabilities.contains_key(must)
                && !list.plugins.iter().any(|plugin| has(plugin, must))
            {
                return Err(RequestError::NoCapability {
                    network: list.name,
                    capability: must,
                });
            }
        }
        Ok(Self {
            list,
            interface: interface.to_owned(),
            args: args(request)?,
            capabilities,
            result: Value::Null,
        })
    }

    /// The network's name.
    #[must_use]
    pub fn network(&self) -> &str {
        &self.list.name
    }

    /// Whether ADD has answered.
    #[must_use]
    pub fn is_added(&self) -> bool {
        !self.result.is_null()
    }

    /// The configuration of one plugin (spec section 3, "deriving").
    pub(super) fn plugin_conf(&self, plugin: &Plugin, command: &str) -> Value {
        let mut conf = plugin_conf(&self.list, plugin);
        let Some(map) = conf.as_object_mut() else {
            return conf;
        };
        let declared: Map<String, Value> = self
            .capabilities
            .iter()
            .filter(|(name, _)| has(plugin, name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !declared.is_empty() {
            map.insert("runtimeConfig".into(), Value::Object(declared));
        }
        // DEL has it since 0.4.0.
        let wanted = command != "DEL" || self.list.cni_version >= SpecVersion::V0_4_0;
        if wanted && self.is_added() {
            map.insert("prevResult".into(), self.result.clone());
        }
        conf
    }
}

/// The part of a plugin's configuration that does not depend on a pod.
pub(super) fn plugin_conf(list: &NetworkList, plugin: &Plugin) -> Value {
    let mut conf = plugin.conf.clone();
    if let Some(map) = conf.as_object_mut() {
        map.insert("name".into(), json!(list.name));
        map.insert("cniVersion".into(), json!(list.cni_version));
        // They are for the runtime.
        map.remove("capabilities");
        map.remove("cniVersions");
    }
    conf
}

fn has(plugin: &Plugin, capability: &str) -> bool {
    plugin.capabilities.iter().any(|c| c == capability)
}

/// CNI_ARGS: the conventional arguments of Kubernetes runtimes. IgnoreUnknown keeps plugins that
/// know none of them from refusing.
fn args(request: &PodNetworkRequest) -> Result<String, RequestError> {
    let pairs = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &request.namespace),
        ("K8S_POD_NAME", &request.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &request.pod_id),
        ("K8S_POD_UID", &request.uid),
    ];
    let mut args = Vec::new();
    for (key, value) in pairs {
        if value.contains([';', '=', '\0', '\n']) {
            return Err(RequestError::Argument {
                key,
                value: value.to_owned(),
            });
        }
        args.push(format!("{key}={value}"));
    }
    Ok(args.join(";"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::PortMapping;

    fn attachment(
        version: SpecVersion,
        request: &PodNetworkRequest,
    ) -> Result<Attachment, RequestError> {
        let list = NetworkList {
            name: "n".into(),
            cni_version: version,
            versions: vec![version],
            disable_check: false,
            disable_gc: false,
            plugins: ["bridge", "portmap"]
                .map(|kind| Plugin {
                    kind: kind.into(),
                    capabilities: vec!["portMappings".into()],
                    conf: json!({"type": kind, "capabilities": {"portMappings": true}}),
                })
                .to_vec(),
        };
        Attachment::new(list, "eth0", request)
    }

    #[test]
    fn a_plugin_gets_what_it_declares_and_the_result_before_it() {
        let request = PodNetworkRequest {
            namespace: "ns".into(),
            port_mappings: vec![PortMapping {
                protocol: "tcp".into(),
                container_port: 80,
                host_port: 8080,
                host_ip: String::new(),
            }],
            ..PodNetworkRequest::default()
        };
        let mut attachment = attachment(SpecVersion::V0_3_1, &request).unwrap();
        let plugin = attachment.list.plugins[0].clone();
        assert_eq!(
            attachment.plugin_conf(&plugin, "ADD"),
            json!({"type": "bridge", "name": "n", "cniVersion": "0.3.1", "runtimeConfig": {
                "portMappings": [{"protocol": "tcp", "containerPort": 80, "hostPort": 8080}]}})
        );
        attachment.result = json!({"ips": []});
        let add = attachment.plugin_conf(&plugin, "ADD");
        assert_eq!(add["prevResult"], json!({"ips": []}));
        // DEL knows it since 0.4.0.
        let del = attachment.plugin_conf(&plugin, "DEL");
        assert_eq!(del["prevResult"], Value::Null);
        attachment.list.cni_version = SpecVersion::V0_4_0;
        let del = attachment.plugin_conf(&plugin, "DEL");
        assert_eq!(del["prevResult"], json!({"ips": []}));
        let none = Plugin {
            capabilities: vec!["bandwidth".into()],
            ..plugin
        };
        let conf = attachment.plugin_conf(&none, "ADD");
        assert_eq!(conf["runtimeConfig"], Value::Null);
    }

    #[test]
    fn a_name_can_not_smuggle_arguments() {
        let request = PodNetworkRequest {
            name: "a;IP=10.0.0.1".into(),
            ..PodNetworkRequest::default()
        };
        let error = attachment(SpecVersion::V1_0_0, &request).unwrap_err();
        assert!(error.to_string().contains("K8S_POD_NAME"), "{error}");
    }

    #[test]
    fn an_address_is_asked_for_only_where_it_is_heard() {
        let request = PodNetworkRequest {
            annotations: [("network.hull/ips".to_owned(), "10.0.0.9".to_owned())].into(),
            ..PodNetworkRequest::default()
        };
        let error = attachment(SpecVersion::V1_0_0, &request).unwrap_err();
        assert!(matches!(error, RequestError::NoCapability { .. }));
    }
}
