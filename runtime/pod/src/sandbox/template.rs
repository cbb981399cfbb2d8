//! Making of templates ([`crate::templates`]): a guest is booted in a VM of its own and saved when its agent
//! answers.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use error_reporter::Report;
use hull_base::panics::caught;
use hull_proto_agent::GUEST_CID;
use hull_proto_vmm::{DeviceConfig, Extent, FdIndex, VmConfig};
use hull_spec::{
    config::{PodsConfig, TemplateScope},
    error::PodError,
    id::PodId,
    size::VmSize,
};
use hull_vm::{
    agent::client::Agent,
    client::{CALL_TIMEOUT, VmClient},
    process::Process,
    rundir::{DataDir, RunDir},
    slots,
};

use super::{SPAWN, cmdline, make_dir, teardown};
use crate::{
    node::Node,
    templates::{Cold, Template, label},
};

/// The template that a VM of this size could be a clone of, as the namespace's pods may have it.
pub(super) fn template(
    node: &Node,
    pod: &PodId,
    namespace: &str,
    size: VmSize,
) -> Option<Arc<Template>> {
    let label = class(&node.config, namespace, size)?;
    let found = match label {
        Ok(label) => node
            .templates
            .find(&label)
            .map_err(|why| (why, String::new())),
        Err(error) => Err((Cold::Class, error.to_string())),
    };
    found
        .inspect_err(|(why, details)| node.templates.boots(pod, *why, details))
        .ok()
}

/// Has the template of such VMs made, if there is none: beside pods, in no pod's time.
pub(super) fn provide(node: &Arc<Node>, namespace: &str, size: VmSize) {
    let Some(Ok(label)) = class(&node.config, namespace, size) else {
        return;
    };
    if !node.templates.claim(&label) {
        return;
    }
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let _turn = node.starts.turn().await;
        let made = caught(make(&node, &label, size)).await;
        let failure = match made {
            Ok(Ok(template)) => {
                tracing::info!(label, "template is ready");
                return node.templates.made(&label, Some(template));
            }
            Ok(Err(error)) => Report::new(&error).to_string(),
            Err(panic) => panic.to_string(),
        };
        tracing::warn!(label, failure, "template can't be made");
        node.templates.made(&label, None);
    });
}

/// Names the class of such VMs, or says why it can't; none: they are no clones.
fn class(config: &PodsConfig, namespace: &str, size: VmSize) -> Option<io::Result<String>> {
    let scope = match config.template {
        TemplateScope::Off => return None,
        TemplateScope::Node => "",
        TemplateScope::Namespace => namespace,
    };
    Some(label(config, scope, size))
}

/// A VM that is no pod's: it goes with the daemon if that ends.
struct KilledWithUs(Process);

impl Drop for KilledWithUs {
    fn drop(&mut self) {
        if self.0.is_alive() {
            self.0.kill();
        }
    }
}

/// Boots a guest, and saves it when its agent answers.
async fn make(node: &Node, label: &str, size: VmSize) -> Result<Template, PodError> {
    let id = PodId::random();
    let (run, data) = (
        RunDir::of(&node.config, &id),
        DataDir::of(&node.config, &id),
    );
    let made = match make_dir(run.path()) {
        Ok(()) => make_in(node, &id, &run, label, size).await,
        Err(error) => Err(PodError::internal("make a template's directory", error)),
    };
    match (made, teardown::directories(&run, &data).await) {
        (Ok(template), Ok(())) => Ok(template),
        (Ok(_), Err(error)) => Err(error),
        (Err(error), undo) => Err(error.after_undo(undo)),
    }
}

async fn make_in(
    node: &Node,
    id: &PodId,
    run: &RunDir,
    label: &str,
    size: VmSize,
) -> Result<Template, PodError> {
    let user = node.users.take()?;
    let vmm = node
        .processes
        .spawn_vmm(&node.config.vmm, id, user.id(), run, None)?;
    let _guard = KilledWithUs(vmm.clone());
    let deadline = tokio::time::Instant::now() + SPAWN;
    let saved = async {
        let (socket, report) = (run.control_socket(), run.exit_report());
        let (vm, _) = VmClient::connect(&socket, &report, deadline, &vmm).await?;
        boot(node, run, &vm, size).await?;
        save(&vm, label).await
    };
    let saved = saved.await;
    // Nobody writes to the files any more when it has ended.
    let ended = vmm.end(Duration::ZERO).await.map_err(PodError::from);
    match (saved, ended) {
        (Ok(template), Ok(())) => match template.seal() {
            Ok(()) => Ok(template),
            Err(error) => Err(PodError::internal("seal a template's files", error)),
        },
        (Ok(_), Err(error)) => Err(error),
        (Err(error), ended) => Err(error.after_undo(ended)),
    }
}

/// Boots the guest with what all of its clones have, and waits for its agent.
async fn boot(node: &Node, run: &RunDir, vm: &VmClient, size: VmSize) -> Result<(), PodError> {
    let config = &node.config;
    let vsock = run.vsock_socket();
    let listener = UnixListener::bind(&vsock)
        .map_err(|e| PodError::internal(format!("listen on {}", vsock.display()), e))?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut send = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(fds.len() as u32 - 1)
    };
    let devices = base_devices(listener, open(&config.guest_root)?, &mut send)?;
    let machine = VmConfig {
        vcpus: size.vcpus,
        boot_vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        pluggable: None,
        kernel: send(open(&config.kernel)?.into()),
        initrd: None,
        cmdline: cmdline(config),
        serial: None,
        devices,
    };
    vm.configure(machine, fds).await?;
    vm.start().await?;
    let deadline = tokio::time::Instant::now() + config.boot_timeout;
    // Its connection ends here: no clone has one.
    Agent::connect(&vsock, config.agent_timeout, deadline).await?;
    Ok(())
}

/// The devices that a guest has from its boot on, whether it is a clone or not: its vsock, randomness, and
/// its root. `send` puts a descriptor among those that go with them.
///
/// # Errors
/// When the root can't be looked at.
pub(super) fn base_devices(
    listener: UnixListener,
    root: File,
    send: &mut impl FnMut(OwnedFd) -> FdIndex,
) -> Result<Vec<(u8, DeviceConfig)>, PodError> {
    let length = root
        .metadata()
        .map_err(|e| PodError::internal("look at the guest's root", e))?
        .len();
    let vsock = DeviceConfig::Vsock {
        cid: GUEST_CID,
        listener: send(listener.into()),
    };
    Ok(vec![
        (slots::VSOCK, vsock),
        (slots::RNG, DeviceConfig::Rng),
        (slots::BALLOON, DeviceConfig::Balloon),
        (slots::ROOT, disk("root", true, send(root.into()), length)),
    ])
}

/// A disk of one file.
pub(super) fn disk(serial: &str, readonly: bool, file: FdIndex, length: u64) -> DeviceConfig {
    DeviceConfig::Block {
        serial: serial.into(),
        readonly,
        extents: vec![Extent {
            file,
            offset: 0,
            length,
        }],
    }
}

/// Opens a file of the node's to be read.
///
/// # Errors
/// When it is not there.
pub(super) fn open(path: &Path) -> Result<File, PodError> {
    File::open(path).map_err(|e| PodError::internal(format!("open {}", path.display()), e))
}

async fn save(vm: &VmClient, label: &str) -> Result<Template, PodError> {
    let template =
        Template::new(label).map_err(|e| PodError::internal("make a template's files", e))?;
    let [state, memory] = template
        .files()
        .map_err(|e| PodError::internal("duplicate a template's file", e))?;
    vm.pause().await?;
    vm.save(label.to_owned(), state, memory, None, CALL_TIMEOUT)
        .await?;
    Ok(template)
}
