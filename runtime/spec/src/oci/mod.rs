//! A container's OCI runtime specification: a pure function of what was asked for and of what
//! the image says. Defaults follow containerd's, because images and charts are written for them.
//!
//! The agent adds what only the guest knows: the root, the cgroup, the user's numbers, and the
//! paths of shared namespaces.

mod capabilities;
mod declared;
mod mounts;
mod profile;
mod resources;
mod seccomp;

use std::path::PathBuf;

use hull_image::ImageConfig;
use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, PosixRlimit, PosixRlimitBuilder, PosixRlimitType,
    Process, Root, Spec, User, get_default_maskedpaths, get_default_readonly_paths,
};

pub use self::{
    declared::declared_volumes, mounts::asked_mount, profile::ProfileFile, resources::limits,
};
use crate::{
    error::PodError,
    field::Field,
    spec::{ContainerSpec, Rlimit, SandboxSpec},
};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files of a process; what container images are used to.
const OPEN_FILES: u64 = 1 << 20;

/// What a container is made from.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The sandbox that it is in.
    pub sandbox: &'a SandboxSpec,
    /// What was asked for.
    pub container: &'a ContainerSpec,
    /// The defaults of its image.
    pub image: &'a ImageConfig,
    /// Those of the container's mounts that show the host's paths, and are kept by the guest.
    pub locals: &'a [usize],
    /// The profile that was read from the node, for `Seccomp::Localhost`.
    pub localhost_seccomp: Option<&'a ProfileFile>,
    /// The AppArmor profile of its processes.
    pub apparmor: Option<&'a str>,
    /// Whether a container that names no profile gets the default one.
    pub seccomp_default: bool,
}

/// Makes the specification.
///
/// # Errors
/// [`PodError::InvalidArgument`] when there is no command or a name is unknown.
pub fn build(inputs: Inputs<'_>) -> Result<Spec, PodError> {
    let privileged = inputs.container.security.privileged;
    let mut root = Root::default();
    root.set_path("rootfs".into());
    root.set_readonly(Some(inputs.container.security.readonly_rootfs));

    let process = process(inputs)?;
    let seccomp = seccomp::profile(
        &inputs.container.security,
        inputs.localhost_seccomp,
        inputs.seccomp_default,
        process.capabilities().as_ref(),
    )?;
    let mut linux = Linux::default();
    linux.set_namespaces(Some(vec![
        namespace(LinuxNamespaceType::Mount),
        namespace(LinuxNamespaceType::Pid),
        namespace(LinuxNamespaceType::Cgroup),
    ]));
    linux.set_resources(Some(resources::cgroup(
        inputs.container.resources.as_ref(),
        privileged,
    )));
    linux.set_seccomp(seccomp);
    linux.set_masked_paths(None);
    linux.set_readonly_paths(None);
    if !privileged {
        let security = &inputs.container.security;
        // No paths at all is what Kubernetes' `procMount: Unmasked` sends, which it allows to
        // pods with a user namespace; others that send none are protected.
        let unmasked = inputs.sandbox.namespaces.user_namespace.is_some()
            && security.masked_paths.is_empty()
            && security.readonly_paths.is_empty();
        if !unmasked {
            linux.set_masked_paths(Some(or_default(
                &security.masked_paths,
                get_default_maskedpaths,
            )));
            linux.set_readonly_paths(Some(or_default(
                &security.readonly_paths,
                get_default_readonly_paths,
            )));
        }
    }

    let mut spec = Spec::default();
    spec.set_root(Some(root));
    spec.set_process(Some(process));
    let user = inputs.sandbox.namespaces.user_namespace;
    let owners = user.map(mounts::Owners::of).transpose()?;
    let mounts = mounts::all(inputs.container, inputs.locals, owners.as_ref());
    spec.set_mounts(Some(mounts));
    spec.set_hostname(None);
    spec.set_linux(Some(linux));
    let annotations = inputs.container.adjusted.annotations.clone();
    spec.set_annotations(Some(annotations.into_iter().collect()));
    Ok(spec)
}

/// The command and the environment that a container gets.
///
/// # Errors
/// [`PodError::InvalidArgument`] when there is no command.
pub fn command_line(
    sandbox: &SandboxSpec,
    container: &ContainerSpec,
    image: &ImageConfig,
) -> Result<(Vec<String>, Vec<String>), PodError> {
    let args = arguments(container, image)?;
    Ok((args, environment(sandbox, container, image)))
}

fn process(inputs: Inputs<'_>) -> Result<Process, PodError> {
    let Inputs {
        container, image, ..
    } = inputs;
    let mut process = Process::default();
    process.set_terminal(Some(container.tty));
    process.set_user(User::default());
    process.set_args(Some(arguments(container, image)?));
    process.set_env(Some(environment(inputs.sandbox, container, image)));
    process.set_cwd(working_dir(container, image));
    process.set_capabilities(Some(capabilities::of(&container.security)?));
    process.set_no_new_privileges(container.security.no_new_privs.then_some(true));
    process.set_oom_score_adj(
        container
            .resources
            .as_ref()
            .and_then(|r| i32::try_from(r.oom_score_adj).ok())
            .filter(|adj| (-1000..=1000).contains(adj)),
    );
    process.set_apparmor_profile(inputs.apparmor.map(str::to_owned));
    process.set_rlimits(Some(rlimits(&container.adjusted.rlimits)?));
    Ok(process)
}

/// Those that are asked for, and that of open files in any case.
fn rlimits(asked: &[Rlimit]) -> Result<Vec<PosixRlimit>, PodError> {
    let limit = |kind, soft, hard| {
        let limit = PosixRlimitBuilder::default()
            .typ(kind)
            .soft(soft)
            .hard(hard);
        let limit = limit.build();
        limit.map_err(|e| PodError::internal("set a limit of the container's process", e))
    };
    let mut limits = Vec::with_capacity(asked.len() + 1);
    let files = PosixRlimitType::RlimitNofile;
    let mut sets_files = false;
    for Rlimit { kind, soft, hard } in asked {
        let known = kind.parse::<PosixRlimitType>();
        let kind = known.map_err(|e| PodError::internal("name a limit of a process", e))?;
        sets_files |= kind == files;
        limits.push(limit(kind, *soft, *hard)?);
    }
    if !sets_files {
        limits.push(limit(files, OPEN_FILES, OPEN_FILES)?);
    }
    Ok(limits)
}

/// The command: `command` replaces the image's entrypoint, `args` its command; a `command` alone
/// runs without the image's arguments (Kubernetes: "Define a Command and Arguments").
fn arguments(container: &ContainerSpec, image: &ImageConfig) -> Result<Vec<String>, PodError> {
    let mut words = Vec::new();
    if container.command.is_empty() {
        words.extend_from_slice(&image.entrypoint);
        let args = if container.args.is_empty() {
            &image.cmd
        } else {
            &container.args
        };
        words.extend_from_slice(args);
    } else {
        words.extend_from_slice(&container.command);
        words.extend_from_slice(&container.args);
    }
    if words.is_empty() {
        return Err(PodError::invalid(
            Field::Command,
            "neither the request nor the image names a command",
        ));
    }
    Ok(words)
}

/// Later settings replace earlier ones: default, image, request.
fn environment(
    sandbox: &SandboxSpec,
    container: &ContainerSpec,
    image: &ImageConfig,
) -> Vec<String> {
    let mut variables = vec![DEFAULT_PATH.to_owned()];
    if container.tty {
        set(&mut variables, "TERM=xterm".into());
    }
    set(
        &mut variables,
        format!("HOSTNAME={}", sandbox.guest_hostname()),
    );
    for variable in &image.env {
        set(&mut variables, variable.clone());
    }
    for (name, value) in &container.env {
        set(&mut variables, format!("{name}={value}"));
    }
    let unset = &container.adjusted.unset_env;
    variables.retain(|variable| !unset.iter().any(|name| *name == name_of(variable)));
    variables
}

fn set(variables: &mut Vec<String>, variable: String) {
    let new = name_of(&variable).to_owned();
    match variables.iter_mut().find(|v| name_of(v) == new) {
        Some(old) => *old = variable,
        None => variables.push(variable),
    }
}

fn name_of(variable: &str) -> &str {
    variable.split('=').next().unwrap_or_default()
}

fn working_dir(container: &ContainerSpec, image: &ImageConfig) -> PathBuf {
    let dir = if container.working_dir.is_empty() {
        &image.working_dir
    } else {
        &container.working_dir
    };
    PathBuf::from("/").join(dir)
}

fn namespace(typ: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(typ);
    namespace.set_path(None);
    namespace
}

fn or_default(asked: &[String], default: fn() -> Vec<String>) -> Vec<String> {
    if asked.is_empty() {
        default()
    } else {
        asked.to_vec()
    }
}

#[cfg(test)]
mod tests;
