//! From pull to clean-up.
//!
//! ```text
//! pull ──▶ RunPodSandbox ──▶ CreateContainer ──▶ StartContainer ──▶ output … exited
//!   │            └───────────────┴─ failure or Ctrl-C ─┴──────────────┐    │
//!   └─ Ctrl-C: nothing to undo                     stop and remove the sandbox
//! ```
//! The first Ctrl-C while the container runs asks it to end, the second kills it.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use hull_proto_cri::v1::{
    ContainerState, ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ImageSpec,
    ImageStatusRequest, PodSandboxConfig, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use hull_proto_images::v1::PullRequest;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{arguments::RunArgs, follow, request};
use crate::{
    client::{Client, refused},
    images::progress::{self, Show},
    socket::private_directory,
};

/// Grace after the first Ctrl-C, in seconds.
const GRACE_SECONDS: i64 = 10;
/// How often the container's state is asked for.
const POLL: Duration = Duration::from_millis(30);

struct Session<'a> {
    client: Client,
    arguments: &'a RunArgs,
    directory: PathBuf,
    interrupts: watch::Receiver<u32>,
}

/// Runs a container as asked and returns its exit code.
pub(super) async fn run(client: Client, state: &Path, arguments: &RunArgs) -> Result<u8> {
    let name = unique_name();
    let mut session = Session {
        client,
        arguments,
        directory: state.join(&name),
        interrupts: interrupts().context("install signal handlers")?,
    };
    let image = session.image().await?;
    private_directory(&session.directory)?;
    let result = session.pod(&name, &image).await;
    let removed = tokio::fs::remove_dir_all(&session.directory).await;
    let code = result?;
    removed.with_context(|| format!("remove {}", session.directory.display()))?;
    Ok(code)
}

fn unique_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_nanos());
    format!("run-{}-{now:x}", std::process::id())
}

/// Counts SIGINT and SIGTERM.
fn interrupts() -> std::io::Result<watch::Receiver<u32>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            sender.send_modify(|count| *count += 1);
        }
    });
    Ok(receiver)
}

impl Session<'_> {
    fn say(&self, text: impl Display) {
        if !self.arguments.quiet {
            eprintln!("hull: {text}");
        }
    }

    fn interrupted(&self) -> Result<()> {
        if *self.interrupts.borrow() > 0 {
            bail!("interrupted");
        }
        Ok(())
    }

    /// The id of the image, pulled when it is not here.
    async fn image(&mut self) -> Result<String> {
        let spec = ImageSpec {
            image: self.arguments.image.clone(),
            ..Default::default()
        };
        let request = ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        };
        let status = self.client.cri_images.image_status(request).await;
        let status = status.map_err(refused("look for the image"))?;
        if let Some(image) = status.into_inner().image {
            return Ok(image.id);
        }
        self.say(format_args!("pulling {}", self.arguments.image));
        let started = Instant::now();
        let request = PullRequest {
            image: self.arguments.image.clone(),
            ..Default::default()
        };
        let show = Show::unless(self.arguments.quiet);
        let pulled = tokio::select! {
            pulled = progress::pull(&self.client, request, show) => pulled?,
            _ = self.interrupts.changed() => bail!("interrupted"),
        };
        self.say(format_args!("pulled in {:.1?}", started.elapsed()));
        Ok(pulled)
    }

    /// A sandbox, what happens in it, and its end.
    async fn pod(&mut self, name: &str, image: &str) -> Result<u8> {
        self.say("booting a microVM");
        let started = Instant::now();
        let config = request::sandbox(self.arguments, name, &self.directory);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.arguments.handler.clone(),
        };
        // Not given up by Ctrl-C: without the answer there would be no id to remove.
        let pod = self.client.runtime.run_pod_sandbox(request).await;
        let pod = pod.map_err(refused("boot"))?.into_inner().pod_sandbox_id;
        self.say(format_args!("booted in {:.1?}", started.elapsed()));
        let result = self.container(&pod, config, image).await;
        let removed = self.remove(pod).await;
        match (result, removed) {
            (Ok(status), Ok(())) => Ok(self.exit_code(&status)),
            (Ok(_), Err(error)) => Err(error),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(removal)) => Err(error.context(format!("also: {removal}"))),
        }
    }

    /// A container, its output and its end.
    async fn container(
        &mut self,
        pod: &str,
        sandbox: PodSandboxConfig,
        image: &str,
    ) -> Result<ContainerStatus> {
        self.interrupted()?;
        self.say("starting the container");
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(request::container(self.arguments, image)),
            sandbox_config: Some(sandbox),
        };
        let created = self.client.runtime.create_container(request).await;
        let id = created
            .map_err(refused("create the container"))?
            .into_inner()
            .container_id;
        self.interrupted()?;
        let request = StartContainerRequest {
            container_id: id.clone(),
        };
        let started = self.client.runtime.start_container(request).await;
        started.map_err(refused("start the container"))?;
        let (exited, ended) = watch::channel(());
        let log = self.directory.join(request::LOG);
        let output = tokio::spawn(follow::follow(log, ended));
        let status = self.exited(&id).await;
        drop(exited);
        output.await.context("print the output")??;
        status
    }

    /// Waits for the container's end and passes interrupts on.
    async fn exited(&mut self, id: &str) -> Result<ContainerStatus> {
        loop {
            let request = ContainerStatusRequest {
                container_id: id.to_owned(),
                verbose: false,
            };
            let status = self.client.runtime.container_status(request).await;
            let status = status.map_err(refused("ask for the container's state"))?;
            if let Some(status) = status.into_inner().status
                && status.state() == ContainerState::ContainerExited
            {
                return Ok(status);
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                _ = self.interrupts.changed() => self.stop(id),
            }
        }
    }

    /// Asks for the container's end without waiting, so that its output goes on.
    fn stop(&self, id: &str) {
        let timeout = if *self.interrupts.borrow() > 1 {
            0
        } else {
            GRACE_SECONDS
        };
        self.say(format_args!(
            "stopping the container ({timeout} s of grace; Ctrl-C again kills it)"
        ));
        let mut runtime = self.client.runtime.clone();
        let container_id = id.to_owned();
        tokio::spawn(async move {
            let request = StopContainerRequest {
                container_id,
                timeout,
            };
            if let Err(status) = runtime.stop_container(request).await {
                eprintln!("hull: {}", refused("stop the container")(status));
            }
        });
    }

    async fn remove(&mut self, pod_sandbox_id: String) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        let stopped = self.client.runtime.stop_pod_sandbox(request).await;
        stopped.map_err(refused("stop the sandbox"))?;
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        let removed = self.client.runtime.remove_pod_sandbox(request).await;
        removed.map_err(refused("remove the sandbox"))?;
        Ok(())
    }

    fn exit_code(&self, status: &ContainerStatus) -> u8 {
        if status.reason == "OOMKilled" {
            self.say("the container ran out of memory and was killed");
        }
        self.say(format_args!("exit code {}", status.exit_code));
        // 128 + signal at most; anything else is a failure all the same.
        u8::try_from(status.exit_code).unwrap_or(u8::MAX)
    }
}
