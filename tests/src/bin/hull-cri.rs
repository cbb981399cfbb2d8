//! A small CRI client for the demo and for tests: crictl's commands and JSON
//! files, as far as they are needed.

#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use hull_proto_cri::v1::*;
use hull_streaming::client::Ports;
use hull_tests::{
    client::{Client, image},
    logs,
    streams::{self, Streams, Transport},
};
use serde::{Serialize, de::DeserializeOwned};

/// Talks CRI to a container runtime.
#[derive(Debug, Parser)]
#[command(name = "hull-cri")]
struct Arguments {
    /// The runtime's socket: a path, or unix:///path
    #[arg(short = 'r', long, default_value = "/run/hull/hull.sock")]
    runtime_endpoint: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the runtime's name and version
    Version,
    /// Show conditions, handlers and features as JSON
    Info,
    /// Show the cgroup driver as JSON
    RuntimeConfig,
    /// Pull an image and print its id
    Pull {
        /// Image name
        reference: String,
        /// USER:PASSWORD
        #[arg(long)]
        creds: Option<String>,
    },
    /// List images
    Images {
        /// Ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show an image as JSON
    Inspecti {
        /// Image name or id
        reference: String,
    },
    /// Remove images
    Rmi {
        /// Image names or ids
        #[arg(required = true)]
        references: Vec<String>,
    },
    /// Show what images occupy, as JSON
    Imagefsinfo,
    /// Run a pod sandbox and print its id
    Runp {
        /// Its configuration (JSON)
        config: PathBuf,
        /// Runtime handler
        #[arg(long, default_value = "")]
        runtime: String,
    },
    /// Create a container and print its id
    Create {
        /// The pod sandbox
        pod: String,
        /// The container's configuration (JSON)
        container: PathBuf,
        /// The sandbox's configuration (JSON)
        sandbox: PathBuf,
    },
    /// Start containers
    Start {
        /// Container ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Run a command in a container; its exit code becomes this one's
    Exec {
        /// Give it our input
        #[arg(short, long)]
        interactive: bool,
        /// Give it a terminal
        #[arg(short, long)]
        tty: bool,
        /// Collect its output instead of streaming it
        #[arg(short, long)]
        sync: bool,
        /// Seconds after which it is killed, with --sync; 0: none
        #[arg(long, default_value_t = 0)]
        timeout: i64,
        /// What carries the streams
        #[arg(long, value_enum, default_value_t = Transport::Spdy)]
        transport: Transport,
        /// The container
        id: String,
        /// The command
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Show what a container writes from now on
    Attach {
        /// Give it our input
        #[arg(short, long)]
        interactive: bool,
        /// It has a terminal
        #[arg(short, long)]
        tty: bool,
        /// What carries the streams
        #[arg(long, value_enum, default_value_t = Transport::Spdy)]
        transport: Transport,
        /// The container
        id: String,
    },
    /// Listen on ports of 127.0.0.1 and forward connections to a pod, until interrupted
    PortForward {
        /// What carries the streams
        #[arg(long, value_enum, default_value_t = Transport::Spdy)]
        transport: Transport,
        /// The sandbox
        id: String,
        /// LOCAL:POD, or one number for both; local port 0 takes a free one
        #[arg(required = true)]
        ports: Vec<Ports>,
    },
    /// List containers
    Ps {
        /// Exited ones too
        #[arg(short, long)]
        all: bool,
        /// Ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show what all containers use, as JSON
    Stats,
    /// List pod sandboxes
    Pods {
        /// Ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show a container as JSON
    Inspect {
        /// The container
        id: String,
    },
    /// Show a pod sandbox as JSON
    Inspectp {
        /// The pod sandbox
        id: String,
    },
    /// Print what a container wrote
    Logs {
        /// The container
        id: String,
    },
    /// Stop containers
    Stop {
        /// Seconds before they are killed
        #[arg(short, long, default_value_t = 0)]
        timeout: i64,
        /// Container ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Remove containers
    Rm {
        /// Container ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Stop pod sandboxes
    Stopp {
        /// Sandbox ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Remove pod sandboxes
    Rmp {
        /// Sandbox ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(code) => code,
        Err(error) => {
            match error.downcast_ref::<tonic::Status>() {
                Some(status) => eprintln!("hull-cri: {:?}: {}", status.code(), status.message()),
                None => eprintln!("hull-cri: {error:#}"),
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode> {
    let client = Client::connect(&arguments.runtime_endpoint).await?;
    match arguments.command {
        Command::Exec {
            sync: true,
            timeout,
            id,
            command,
            ..
        } => return exec(client, &id, command, timeout).await,
        Command::Exec {
            interactive,
            tty,
            transport,
            id,
            command,
            ..
        } => {
            let streams = Streams { interactive, tty };
            return streams::exec(client, id, command, streams, transport).await;
        }
        Command::Attach {
            interactive,
            tty,
            transport,
            id,
        } => {
            let streams = Streams { interactive, tty };
            return streams::attach(client, id, streams, transport).await;
        }
        Command::PortForward {
            transport,
            id,
            ports,
        } => streams::port_forward(client, id, &ports, transport).await?,
        Command::Version | Command::Info | Command::RuntimeConfig => {
            node(client, arguments.command).await?;
        }
        Command::Pull { .. }
        | Command::Images { .. }
        | Command::Inspecti { .. }
        | Command::Rmi { .. }
        | Command::Imagefsinfo => images(client, arguments.command).await?,
        Command::Runp { .. }
        | Command::Pods { .. }
        | Command::Inspectp { .. }
        | Command::Stopp { .. }
        | Command::Rmp { .. } => pods(client, arguments.command).await?,
        other => containers(client, other).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn node(mut client: Client, command: Command) -> Result<()> {
    match command {
        Command::Info => {
            let request = StatusRequest { verbose: true };
            json(&client.runtime.status(request).await?.into_inner())
        }
        Command::RuntimeConfig => json(
            &client
                .runtime
                .runtime_config(RuntimeConfigRequest {})
                .await?
                .into_inner(),
        ),
        _ => {
            let request = VersionRequest {
                version: "v1".into(),
            };
            let answer = client.runtime.version(request).await?.into_inner();
            line(&format!(
                "{} {} (CRI {})",
                answer.runtime_name, answer.runtime_version, answer.runtime_api_version
            ))
        }
    }
}

async fn images(mut client: Client, command: Command) -> Result<()> {
    match command {
        Command::Pull { reference, creds } => {
            let auth = creds.map(|creds| {
                let (username, password) = creds.split_once(':').unwrap_or((&creds, ""));
                AuthConfig {
                    username: username.into(),
                    password: password.into(),
                    ..Default::default()
                }
            });
            let request = PullImageRequest {
                image: Some(image(&reference)),
                auth,
                sandbox_config: None,
            };
            line(
                &client
                    .images
                    .pull_image(request)
                    .await?
                    .into_inner()
                    .image_ref,
            )
        }
        Command::Inspecti { reference } => {
            let request = ImageStatusRequest {
                image: Some(image(&reference)),
                verbose: true,
            };
            let answer = client.images.image_status(request).await?.into_inner();
            if answer.image.is_none() {
                anyhow::bail!("no such image: {reference}");
            }
            json(&answer)
        }
        Command::Rmi { references } => {
            for reference in references {
                client.remove_image(&reference).await?;
                line(&reference)?;
            }
            Ok(())
        }
        Command::Imagefsinfo => json(
            &client
                .images
                .image_fs_info(ImageFsInfoRequest {})
                .await?
                .into_inner(),
        ),
        Command::Images { quiet } => {
            let answer = client
                .images
                .list_images(ListImagesRequest { filter: None })
                .await?;
            for image in answer.into_inner().images {
                let names = if image.repo_tags.is_empty() {
                    image.repo_digests.join(",")
                } else {
                    image.repo_tags.join(",")
                };
                if quiet {
                    line(&image.id)?;
                } else {
                    line(&format!("{}\t{}\t{}", names, image.id, image.size))?;
                }
            }
            Ok(())
        }
        other => unreachable!("{other:?} is no image command"),
    }
}

async fn pods(mut client: Client, command: Command) -> Result<()> {
    match command {
        Command::Runp { config, runtime } => {
            let request = RunPodSandboxRequest {
                config: Some(read(&config)?),
                runtime_handler: runtime,
            };
            line(
                &client
                    .runtime
                    .run_pod_sandbox(request)
                    .await?
                    .into_inner()
                    .pod_sandbox_id,
            )
        }
        Command::Inspectp { id } => {
            let request = PodSandboxStatusRequest {
                pod_sandbox_id: id,
                verbose: true,
            };
            json(
                &client
                    .runtime
                    .pod_sandbox_status(request)
                    .await?
                    .into_inner(),
            )
        }
        Command::Stopp { ids } => {
            for id in ids {
                client.stop_sandbox(&id).await?;
                line(&id)?;
            }
            Ok(())
        }
        Command::Rmp { ids } => {
            for id in ids {
                client.remove_sandbox(&id).await?;
                line(&id)?;
            }
            Ok(())
        }
        Command::Pods { quiet } => {
            for pod in client.sandboxes().await? {
                let state = match pod.state() {
                    PodSandboxState::SandboxReady => "Ready",
                    PodSandboxState::SandboxNotready => "NotReady",
                };
                let metadata = pod.metadata.unwrap_or_default();
                if quiet {
                    line(&pod.id)?;
                } else {
                    line(&format!(
                        "{}\t{state}\t{}/{}\t{}",
                        pod.id, metadata.namespace, metadata.name, pod.runtime_handler
                    ))?;
                }
            }
            Ok(())
        }
        other => unreachable!("{other:?} is no pod command"),
    }
}

async fn containers(mut client: Client, command: Command) -> Result<()> {
    match command {
        Command::Create {
            pod,
            container,
            sandbox,
        } => {
            let request = CreateContainerRequest {
                pod_sandbox_id: pod,
                config: Some(read(&container)?),
                sandbox_config: Some(read(&sandbox)?),
            };
            line(
                &client
                    .runtime
                    .create_container(request)
                    .await?
                    .into_inner()
                    .container_id,
            )
        }
        Command::Start { ids } => {
            for id in ids {
                client.start_container(&id).await?;
                line(&id)?;
            }
            Ok(())
        }
        Command::Inspect { id } => {
            let request = ContainerStatusRequest {
                container_id: id,
                verbose: true,
            };
            json(&client.runtime.container_status(request).await?.into_inner())
        }
        Command::Logs { id } => print_logs(&client, &id).await,
        Command::Stop { timeout, ids } => {
            for id in ids {
                client.stop_container(&id, timeout).await?;
                line(&id)?;
            }
            Ok(())
        }
        Command::Rm { ids } => {
            for id in ids {
                client.remove_container(&id).await?;
                line(&id)?;
            }
            Ok(())
        }
        Command::Stats => json(
            &client
                .runtime
                .list_container_stats(ListContainerStatsRequest::default())
                .await?
                .into_inner(),
        ),
        Command::Ps { all, quiet } => ps(client, all, quiet).await,
        other => unreachable!("{other:?} is no container command"),
    }
}

async fn ps(client: Client, all: bool, quiet: bool) -> Result<()> {
    for container in client.containers(None).await? {
        if !all && container.state() != ContainerState::ContainerRunning {
            continue;
        }
        if quiet {
            line(&container.id)?;
            continue;
        }
        let state = match container.state() {
            ContainerState::ContainerCreated => "Created",
            ContainerState::ContainerRunning => "Running",
            ContainerState::ContainerExited => "Exited",
            ContainerState::ContainerUnknown => "Unknown",
        };
        line(&format!(
            "{}\t{state}\t{}\t{}\t{}",
            container.id,
            container.metadata.unwrap_or_default().name,
            container.image.unwrap_or_default().image,
            container.pod_sandbox_id
        ))?;
    }
    Ok(())
}

async fn exec(client: Client, id: &str, command: Vec<String>, timeout: i64) -> Result<ExitCode> {
    let answer = client.exec_sync(id, command, timeout).await?;
    io::stdout().write_all(&answer.stdout)?;
    io::stderr().write_all(&answer.stderr)?;
    Ok(u8::try_from(answer.exit_code).map_or(ExitCode::FAILURE, ExitCode::from))
}

async fn print_logs(client: &Client, id: &str) -> Result<()> {
    let path = client.container_status(id).await?.log_path;
    let file = tokio::fs::read(&path)
        .await
        .with_context(|| format!("read log {path:?}"))?;
    for text in file.split(|&byte| byte == b'\n') {
        if text.is_empty() {
            continue;
        }
        let entry = logs::Entry::parse(text)?;
        let end: &[u8] = if entry.partial { b"" } else { b"\n" };
        let mut out: Box<dyn Write> = match entry.stream {
            logs::Stream::Stdout => Box::new(io::stdout()),
            logs::Stream::Stderr => Box::new(io::stderr()),
        };
        out.write_all(entry.text)?;
        out.write_all(end)?;
        out.flush()?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

fn json(value: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

fn line(text: &str) -> Result<()> {
    writeln!(io::stdout(), "{text}").context("write to stdout")
}
