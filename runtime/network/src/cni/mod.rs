//! The Container Network Interface, spec 1.1: which network ([`conf`]) in which version
//! ([`version`]), what a pod's attachment to it is ([`attachment`]), how a plugin is called
//! ([`exec`]), and what it answers ([`result`]).

pub mod attachment;
pub mod conf;
pub mod exec;
pub mod result;
pub mod version;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use hull_base::{
    blocking,
    faults::{self, Point},
};
use serde_json::{Value, json};

pub use attachment::Attachment;
pub use conf::NetworkList;
pub use result::AddResult;
use version::{SpecVersion, Versions};

/// A failed DEL is tried again after 100 and 500 ms: a lock of the packet filter may be held, or a
/// daemon behind the plugin be restarting.
const DEL_RETRIES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(100))
    .with_factor(5.0)
    .with_max_times(2);

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
    /// The plugins have no version in common with the configuration.
    #[error("network {network} is of CNI version {wanted}, which plugin {plugin} does not speak")]
    Version {
        /// The network.
        network: String,
        /// Its versions.
        wanted: String,
        /// The plugin.
        plugin: String,
    },
}

/// How plugins are called on this node.
#[derive(Debug, Clone)]
pub struct Plugins {
    /// Where they are.
    pub dirs: Vec<PathBuf>,
    /// How long one call may take.
    pub timeout: Duration,
    /// What they answered to VERSION.
    pub versions: Versions,
}

impl Plugins {
    /// Chooses the newest version that the configuration names and all plugins speak.
    ///
    /// # Errors
    /// A plugin that is missing, can't be run or speaks none of the versions.
    pub async fn negotiate(&self, mut list: NetworkList) -> Result<NetworkList, CniError> {
        let mut common = list.versions.clone();
        for plugin in &list.plugins {
            let program = self.find(&plugin.kind).await?;
            if list.versions.len() < 2 {
                continue;
            }
            self.narrow(&list, &plugin.kind, &program, &mut common)
                .await?;
        }
        if let Some(newest) = common.last() {
            list.cni_version = *newest;
        }
        Ok(list)
    }

    /// Leaves the versions that this plugin speaks too.
    async fn narrow(
        &self,
        list: &NetworkList,
        kind: &str,
        program: &Path,
        common: &mut Vec<SpecVersion>,
    ) -> Result<(), CniError> {
        let call = self.invocation(program, "VERSION", None, &Value::Null);
        if let Some(spoken) = self.versions.of(call).await? {
            common.retain(|version| spoken.contains(version));
        }
        if common.is_empty() {
            let wanted: Vec<&str> = list.versions.iter().map(|v| v.as_str()).collect();
            return Err(CniError::Version {
                network: list.name.clone(),
                wanted: wanted.join(", "),
                plugin: kind.to_owned(),
            });
        }
        Ok(())
    }

    /// Tells whether a pod could be attached now: all plugins are there, speak the network's
    /// version, and say so when they can be asked (STATUS, since 1.1.0).
    ///
    /// # Errors
    /// What is missing, in the plugin's words where it has some.
    pub async fn status(&self, list: NetworkList) -> Result<(), CniError> {
        let list = self.negotiate(list).await?;
        for plugin in &list.plugins {
            let program = self.find(&plugin.kind).await?;
            let mut common = vec![list.cni_version];
            self.narrow(&list, &plugin.kind, &program, &mut common)
                .await?;
            if list.cni_version >= SpecVersion::V1_1_0 {
                let conf = attachment::plugin_conf(&list, plugin);
                let call = self.invocation(&program, "STATUS", None, &conf);
                call.run().await?;
            }
        }
        Ok(())
    }

    /// Lets plugins free what belongs to no attachment of this list of container id and
    /// interface (GC, since 1.1.0). Every plugin is asked, whatever the others say.
    ///
    /// # Errors
    /// The first failure.
    pub async fn gc(&self, list: &NetworkList, valid: &[(String, String)]) -> Result<(), CniError> {
        if list.disable_gc || list.cni_version < SpecVersion::V1_1_0 {
            return Ok(());
        }
        let valid: Vec<Value> = valid
            .iter()
            .map(|(id, interface)| json!({"containerID": id, "ifname": interface}))
            .collect();
        let mut result = Ok(());
        for plugin in &list.plugins {
            let mut conf = attachment::plugin_conf(list, plugin);
            if let Some(map) = conf.as_object_mut() {
                map.insert("cni.dev/valid-attachments".into(), json!(valid));
                // The name in an earlier text of the spec, which plugins were built after.
                map.insert("cni.dev/attachments".into(), json!(valid));
            }
            let collect = async {
                let program = self.find(&plugin.kind).await?;
                self.invocation(&program, "GC", None, &conf).run().await
            };
            let collected = collect.await.map(drop).map_err(CniError::from);
            result = result.and(collected);
        }
        result
    }

    async fn find(&self, kind: &str) -> Result<PathBuf, exec::ExecError> {
        let (dirs, kind) = (self.dirs.clone(), kind.to_owned());
        blocking(move || exec::find(&dirs, &kind)).await
    }

    fn invocation<'a>(
        &'a self,
        program: &'a Path,
        command: &'static str,
        target: Option<exec::Target<'a>>,
        conf: &'a Value,
    ) -> exec::Invocation<'a> {
        exec::Invocation {
            program,
            command,
            target,
            path: &self.dirs,
            conf,
            timeout: self.timeout,
        }
    }
}

/// What all plugin calls for one pod share.
#[derive(Debug)]
pub struct Call<'a> {
    /// The node's plugins.
    pub plugins: &'a Plugins,
    /// CNI_CONTAINERID.
    pub container_id: &'a str,
    /// CNI_NETNS.
    pub netns: &'a Path,
}

impl Call<'_> {
    /// Attaches the pod to one plugin of the attachment's list, which is given the result of the one
    /// before. They are called in order; keep the attachment after each, so that DEL can be told how
    /// far ADD came.
    ///
    /// # Errors
    /// When the plugin failed; DEL must follow, also after a failure.
    pub async fn add(
        &self,
        plugin: &conf::Plugin,
        attachment: &mut Attachment,
    ) -> Result<AddResult, CniError> {
        let answer = self.run("ADD", plugin, attachment).await?;
        let version = attachment.list.cni_version;
        let (value, result) = result::parse(&plugin.kind, version, &answer)?;
        attachment.result = value;
        Ok(result)
    }

    /// Detaches the pod: every plugin in reverse order. Repeating it is no error.
    ///
    /// # Errors
    /// The first plugin that failed; the ones before it in the chain were not called, because
    /// what it still has (a host port) may lead to what they would free (the address).
    pub async fn delete(&self, attachment: &Attachment) -> Result<(), CniError> {
        for plugin in attachment.list.plugins.iter().rev() {
            let delete = || self.run("DEL", plugin, attachment);
            let may_pass =
                |error: &CniError| matches!(error, CniError::Exec(exec::ExecError::Failed { .. }));
            delete.retry(DEL_RETRIES).when(may_pass).await?;
        }
        Ok(())
    }

    /// Asks every plugin whether the attachment is as ADD left it (CHECK, since 0.4.0).
    ///
    /// # Errors
    /// What the first plugin misses.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        let list = &attachment.list;
        if list.disable_check || list.cni_version < SpecVersion::V0_4_0 || !attachment.is_added() {
            return Ok(());
        }
        for plugin in &list.plugins {
            self.run("CHECK", plugin, attachment).await?;
        }
        Ok(())
    }

    async fn run(
        &self,
        command: &'static str,
        plugin: &conf::Plugin,
        attachment: &Attachment,
    ) -> Result<Vec<u8>, CniError> {
        let program = self.plugins.find(&plugin.kind).await?;
        let conf = attachment.plugin_conf(plugin, command);
        // DEL of a namespace that is gone gets no CNI_NETNS (spec section 3, DEL).
        let netns = if command == "DEL" && !is_namespace(self.netns) {
            Path::new("")
        } else {
            self.netns
        };
        let target = exec::Target {
            container_id: self.container_id,
            netns,
            interface: &attachment.interface,
            args: &attachment.args,
        };
        let call = self
            .plugins
            .invocation(&program, command, Some(target), &conf);
        let answer = call.run().await;
        faults::point(Point::PluginRan);
        Ok(answer?)
    }
}

/// Tells a namespace from the empty file that a crash may leave.
fn is_namespace(path: &Path) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}
