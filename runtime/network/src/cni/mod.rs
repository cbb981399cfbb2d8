//! The Container Network Interface, spec 1.1: which network ([`conf`]), how a
//! plugin is called ([`exec`]), and what it answers ([`result`]).

pub mod conf;
pub mod exec;
pub mod result;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::setup::PodNetworkRequest;
pub use conf::NetworkList;
pub use result::AddResult;

/// Why CNI did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// Configuration.
    #[error(transparent)]
    Conf(#[from] conf::ConfError),
    /// A plugin.
    #[error(transparent)]
    Exec(#[from] exec::ExecError),
    /// A plugin's answer.
    #[error(transparent)]
    Result(#[from] result::ResultError),
}

/// The network that a pod is attached to: what ADD and DEL must be told alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    list: NetworkList,
    interface: String,
    args: String,
    port_mappings: Value,
    /// The last plugin's result; null before ADD.
    result: Value,
}

impl Attachment {
    /// Describes an attachment that is not made yet.
    #[must_use]
    pub fn new(list: NetworkList, interface: &str, request: &PodNetworkRequest) -> Self {
        // The conventional arguments of Kubernetes runtimes; IgnoreUnknown keeps
        // plugins that know none of them from refusing.
        let args = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", &request.namespace),
            ("K8S_POD_NAME", &request.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &request.pod_id),
            ("K8S_POD_UID", &request.uid),
        ]
        .map(|(key, value)| format!("{key}={value}"))
        .join(";");
        Self {
            list,
            interface: interface.to_owned(),
            args,
            port_mappings: json!(request.port_mappings),
            result: Value::Null,
        }
    }

    /// The configuration of one plugin, as spec section 2 "derived" wants it.
    fn plugin_conf(&self, plugin: &conf::Plugin) -> Value {
        let mut conf = plugin.conf.clone();
        if let Some(map) = conf.as_object_mut() {
            map.insert("name".into(), json!(self.list.name));
            map.insert("cniVersion".into(), json!(self.list.cni_version));
            if plugin.capabilities.iter().any(|c| c == "portMappings")
                && self.port_mappings.as_array().is_some_and(|m| !m.is_empty())
            {
                map.insert(
                    "runtimeConfig".into(),
                    json!({ "portMappings": self.port_mappings }),
                );
            }
            if !self.result.is_null() {
                map.insert("prevResult".into(), self.result.clone());
            }
        }
        conf
    }
}

/// What all plugin calls for one pod share.
#[derive(Debug)]
pub struct Call<'a> {
    /// Where plugins are.
    pub bin_dirs: &'a [PathBuf],
    /// How long one may take.
    pub timeout: Duration,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_NETNS.
    pub netns: PathBuf,
}

impl Call<'_> {
    /// Attaches the pod: every plugin in order, each given the result of the one before.
    ///
    /// # Errors
    /// The first plugin that failed; DEL must follow, also after a failure.
    pub async fn add(&self, attachment: &mut Attachment) -> Result<AddResult, CniError> {
        attachment.result = Value::Null;
        for plugin in attachment.list.plugins.clone() {
            let conf = attachment.plugin_conf(&plugin);
            let answer = self.run("ADD", &plugin, &conf, attachment).await?;
            attachment.result = result::parse(&plugin.kind, &answer)?;
        }
        Ok(AddResult::read(&attachment.result)?)
    }

    /// Detaches the pod: every plugin in reverse order. Repeating it is no error.
    ///
    /// # Errors
    /// The first plugin that failed; the ones before it in the chain were not called.
    pub async fn delete(&self, attachment: &Attachment) -> Result<(), CniError> {
        for plugin in attachment.list.plugins.iter().rev() {
            let conf = attachment.plugin_conf(plugin);
            self.run("DEL", plugin, &conf, attachment).await?;
        }
        Ok(())
    }

    async fn run(
        &self,
        command: &'static str,
        plugin: &conf::Plugin,
        conf: &Value,
        attachment: &Attachment,
    ) -> Result<Vec<u8>, CniError> {
        let program = exec::find(self.bin_dirs, &plugin.kind)?;
        // DEL of a namespace that is gone gets no CNI_NETNS (spec section 3, DEL).
        let netns = if command == "DEL" && !is_namespace(&self.netns) {
            Path::new("")
        } else {
            &self.netns
        };
        let invocation = exec::Invocation {
            program: &program,
            command,
            container_id: &self.container_id,
            netns,
            interface: &attachment.interface,
            args: &attachment.args,
            path: self.bin_dirs,
            conf,
            timeout: self.timeout,
        };
        Ok(invocation.run().await?)
    }
}

/// Tells a namespace from the empty file that a crash may leave.
fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}
