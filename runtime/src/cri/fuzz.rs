//! Messages of CRI, decoded, converted and checked as a request is; see [`crate::fuzz`].

use hull_image::ImageConfig;
use hull_proto_cri::v1::{
    CreateContainerRequest, RunPodSandboxRequest, UpdateContainerResourcesRequest,
};
use hull_spec::{
    config::PodsConfig,
    field::Field,
    oci::{self, Inputs},
    resources,
    size::{Room, VmSize},
    spec::{Resources, SandboxSpec},
    validate,
};
use prost::Message;

use super::convert;

/// `RunPodSandbox`: what is accepted has names, and a VM of a size.
pub(crate) fn sandbox(input: &[u8]) {
    let Ok(request) = RunPodSandboxRequest::decode(input) else {
        return;
    };
    let Ok(spec) = convert::sandbox::spec(request.config, request.runtime_handler) else {
        return;
    };
    if validate::sandbox(&spec).is_err() {
        return;
    }
    assert!(!spec.metadata.name.is_empty() && !spec.metadata.uid.is_empty());
    let config = PodsConfig::new("/root", "/state", "/assets");
    for room in [Room::Unknown, Room::Unlimited, Room::Mib(1000)] {
        let size = VmSize::of(&spec, &config, 4, room);
        assert!(size.vcpus >= 1 && size.memory_mib >= 32);
        assert!(room != Room::Mib(1000) || size.max_memory_mib() < 1000);
    }
    let kept = serde_json::to_vec(&spec).expect("a specification is kept");
    let again: SandboxSpec = serde_json::from_slice(&kept).expect("and read again");
    assert_eq!(again, spec);
}

/// `CreateContainer`: what is accepted has a specification without zero bytes in what is executed.
pub(crate) fn container(input: &[u8]) {
    let Ok(request) = CreateContainerRequest::decode(input) else {
        return;
    };
    let Ok(spec) = convert::container::spec(request.config) else {
        return;
    };
    let sandbox = SandboxSpec::default();
    if validate::container(&spec, &sandbox).is_err() {
        return;
    }
    let built = oci::build(Inputs {
        sandbox: &sandbox,
        container: &spec,
        image: &ImageConfig::default(),
        locals: &[],
        localhost_seccomp: None,
        apparmor: None,
        seccomp_default: true,
    });
    let Ok(built) = built else { return };
    let process = built.process().as_ref().expect("a container has a process");
    let words = process
        .args()
        .iter()
        .flatten()
        .chain(process.env().iter().flatten());
    assert!(words.into_iter().all(|word| !word.contains('\0')));
    assert!(process.args().as_ref().is_some_and(|args| !args.is_empty()));
}

/// `UpdateContainerResources`: limits that are merged and fit once fit again.
pub(crate) fn update(input: &[u8]) {
    let Ok(request) = UpdateContainerResourcesRequest::decode(input) else {
        return;
    };
    let asked = convert::resources::from_cri(request.linux.unwrap_or_default());
    if resources::check(&asked, Field::Limit).is_err() {
        return;
    }
    let merged = resources::merge(&Resources::default(), &asked);
    assert_eq!(
        resources::merge(&merged, &asked),
        merged,
        "asked twice is asked once"
    );
    let _ = resources::check(&merged, Field::Limit);
}
