//! Arguments to CRI requests.

use std::path::Path;

use hull_proto_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PortMapping, Protocol as CriProtocol,
};

use super::{
    arguments::RunArgs,
    values::{Account, Bytes, Port, Protocol, Variable},
};
use crate::containers::own;

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
            // So that there is one pod of a name.
            uid: name.to_owned(),
            namespace: own::NAMESPACE.to_owned(),
            attempt: 0,
        }),
        log_directory: directory.to_string_lossy().into_owned(),
        port_mappings: arguments.publish.iter().map(port).collect(),
        linux: Some(LinuxPodSandboxConfig {
            resources: limits(arguments),
            security_context: Some(LinuxSandboxSecurityContext {
                privileged: arguments.privileged,
                namespace_options: Some(namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn port(port: &Port) -> PortMapping {
    let protocol = match port.protocol {
        Protocol::Tcp => CriProtocol::Tcp,
        Protocol::Udp => CriProtocol::Udp,
    };
    PortMapping {
        protocol: protocol.into(),
        container_port: port.container.into(),
        host_port: port.host.into(),
        host_ip: port.address.map(|ip| ip.to_string()).unwrap_or_default(),
    }
}

/// Whether and how the container gets an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// It has none.
    None,
    /// It ends with that of the first client.
    Once,
    /// It goes on when clients go.
    Kept,
}

/// The container of the image that was pulled.
pub(super) fn container(arguments: &RunArgs, image_id: &str, input: Input) -> ContainerConfig {
    let (command, args) = command(arguments);
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: own::CONTAINER.to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: image_id.to_owned(),
            user_specified_image: arguments.image().to_owned(),
            ..Default::default()
        }),
        command,
        args,
        working_dir: arguments.workdir.clone().unwrap_or_default(),
        envs: arguments.env.iter().filter_map(variable).collect(),
        mounts: arguments
            .volume
            .iter()
            .map(|volume| Mount {
                container_path: volume.container.clone(),
                host_path: volume.host.to_string_lossy().into_owned(),
                readonly: volume.readonly,
                ..Default::default()
            })
            .collect(),
        log_path: own::LOG.to_owned(),
        stdin: input != Input::None,
        stdin_once: input == Input::Once,
        tty: arguments.tty,
        linux: Some(LinuxContainerConfig {
            resources: limits(arguments),
            security_context: Some(security(arguments)),
        }),
        ..Default::default()
    }
}

/// What replaces the image's entry point, and what its command.
fn command(arguments: &RunArgs) -> (Vec<String>, Vec<String>) {
    let command = arguments.command().to_vec();
    match arguments.entrypoint.as_deref() {
        None => (Vec::new(), command),
        Some("") => (command, Vec::new()),
        Some(program) => (vec![program.to_owned()], command),
    }
}

fn variable(variable: &Variable) -> Option<KeyValue> {
    let value = variable.value.clone();
    let value = value.or_else(|| std::env::var(&variable.name).ok())?;
    Some(KeyValue {
        key: variable.name.clone(),
        value: value.into_bytes(),
    })
}

/// As kubelet has it: the container's first process is the first of its pid namespace.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}

fn security(arguments: &RunArgs) -> LinuxContainerSecurityContext {
    let mut context = LinuxContainerSecurityContext {
        privileged: arguments.privileged,
        readonly_rootfs: arguments.read_only,
        namespace_options: Some(namespaces()),
        ..Default::default()
    };
    if let Some(user) = &arguments.user {
        let id = |id: u32| Int64Value { value: id.into() };
        match &user.user {
            Account::Id(number) => context.run_as_user = Some(id(*number)),
            Account::Name(name) => context.run_as_username.clone_from(name),
        }
        context.run_as_group = user.group.map(id);
    }
    context
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> RunArgs {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            run: RunArgs,
        }
        let words = std::iter::once("run").chain(line.split(' '));
        <Line as clap::Parser>::try_parse_from(words).unwrap().run
    }

    fn of(line: &str) -> ContainerConfig {
        container(&arguments(line), "sha256:1", Input::None)
    }

    #[test]
    fn cpus_become_a_quota() {
        let config = of("-e A=b=c --cpus 1.5 busybox");
        assert_eq!(config.envs[0].value, b"b=c");
        let limits = config.linux.unwrap().resources.unwrap();
        assert_eq!((limits.cpu_period, limits.cpu_quota), (100_000, 150_000));
    }

    #[test]
    fn a_command_is_the_entry_points_unless_another_is_named() {
        let told = |line: &str| {
            let config = of(line);
            (config.command.join(" "), config.args.join(" "))
        };
        let both = |command: &str, args: &str| (command.to_owned(), args.to_owned());
        assert_eq!(told("image"), both("", ""));
        assert_eq!(told("image a -b"), both("", "a -b"));
        assert_eq!(told("image -- a -b"), both("", "a -b"));
        assert_eq!(told("image --version"), both("", "--version"));
        assert_eq!(told("--entrypoint sh image -c id"), both("sh", "-c id"));
        assert_eq!(told("--entrypoint= image a b"), both("a b", ""));
    }

    #[test]
    fn each_option_is_a_field_of_the_request() {
        let line = "-it -w /tmp -u 7:8 -v /:/host:ro --read-only --privileged --handler small \
                    -p 8080:80 -p [::1]:53:5353/udp image";
        let asked = arguments(line);
        assert!(asked.interactive && asked.tty);
        assert_eq!(asked.runtime, "small");
        let config = container(&asked, "sha256:1", Input::Once);
        assert!(config.tty && config.stdin && config.stdin_once);
        assert_eq!(config.working_dir, "/tmp");
        assert!(config.mounts[0].readonly && config.mounts[0].host_path == "/");
        let context = config.linux.unwrap().security_context.unwrap();
        assert!(context.readonly_rootfs && context.privileged);
        let ids = [context.run_as_user, context.run_as_group].map(|id| id.unwrap().value);
        assert_eq!(ids, [7, 8]);
        let pod = sandbox(&asked, "name", Path::new("/log"));
        assert!(pod.linux.unwrap().security_context.unwrap().privileged);
        let ports = pod.port_mappings.iter();
        let ports = ports.map(|p| (p.host_ip.as_str(), p.host_port, p.container_port));
        let ports = ports.collect::<Vec<_>>();
        assert_eq!(ports, [("", 8080, 80), ("::1", 53, 5353)]);
        assert_eq!(pod.port_mappings[1].protocol(), CriProtocol::Udp);
        let named = of("-u www image").linux.unwrap().security_context.unwrap();
        assert_eq!(named.run_as_username, "www");
    }

    #[test]
    fn what_can_not_be_is_refused() {
        for (line, word) in [
            ("-d --rm image", "--rm"),
            ("--bogus image", "--bogus"),
            ("-v /no/such/path:/x image", "/no/such/path"),
        ] {
            let error = arguments(line).check().unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
        arguments("--rm image").check().unwrap();
    }
}
