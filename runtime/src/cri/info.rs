//! The answer to `verbose`: what else is known, as JSON, under the key `info`
//! (the form that crictl shows).

use std::collections::BTreeMap;

use hull_base::stages::Stage;
use hull_spec::{
    info::{ContainerInfo, SandboxInfo},
    stats::{ProcessMemory, Processes},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Backend, node::runtime_config::cgroup_driver};

fn info(value: &Value) -> BTreeMap<String, String> {
    BTreeMap::from([("info".to_owned(), value.to_string())])
}

/// About a sandbox, with the counters of its VM and the memory of its processes on the host when
/// they could be had.
pub(crate) fn sandbox(
    pod: &SandboxInfo,
    metrics: Option<&impl Serialize>,
    memory: Option<ProcessMemory>,
) -> BTreeMap<String, String> {
    info(&json!({
        "pid": pod.vm.as_ref().map(|vm| vm.pid),
        "message": pod.message,
        "vm": pod.vm,
        "guest": pod.guest,
        "bootMicroseconds": pod.boot.as_ref().map(|boot| boot.parts().collect::<BTreeMap<_, _>>()),
        "cloned": pod.boot.as_ref().map(|boot| boot.cloned),
        "stages": pod.boot.as_ref().map(|boot| boot.stages.iter().map(stage).collect::<Vec<_>>()),
        "metrics": metrics,
        "hostMemory": memory,
        "config": *pod.spec,
    }))
}

/// A stage of a start; times in microseconds, the first from the start's begin.
fn stage(stage: &Stage) -> Value {
    json!({
        "name": stage.name,
        "within": stage.within,
        "begin": stage.begin_us,
        "took": stage.us,
        "failed": stage.failed,
    })
}

/// About a container, with its processes when the guest told them.
pub(crate) fn container(
    container: &ContainerInfo,
    processes: Option<&Processes>,
) -> BTreeMap<String, String> {
    info(&json!({
        "sandboxID": container.pod,
        "imageID": container.image_id,
        "stopSignal": container.stop_signal.to_string(),
        "user": container.user,
        "resources": container.resources,
        "processes": processes,
        "config": *container.spec,
    }))
}

/// About an image.
pub(crate) fn image(image: &hull_image::Image) -> BTreeMap<String, String> {
    info(&json!({ "imageSpec": { "config": image.config } }))
}

/// About the node. Its directories are under `config` too, in the words of other runtimes: clients
/// look there for the file systems that pods are on.
pub(crate) fn node(backend: &Backend, handlers: &[&str]) -> BTreeMap<String, String> {
    let mut node = info(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "handlers": handlers,
        "cgroupDriver": cgroup_driver().as_str_name(),
        "imagesDirectory": backend.images_dir,
        "podsDirectory": backend.pods_dir,
        "templates": backend.pods.templates(),
    }));
    let config = json!({ "rootDir": backend.root, "stateDir": backend.state });
    node.insert("config".to_owned(), config.to_string());
    node
}
