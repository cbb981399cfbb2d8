//! From pull to clean-up.
//!
//! ```text
//! pull ──▶ RunPodSandbox ──▶ CreateContainer ──▶ Attach ──▶ StartContainer ──▶ output … exited
//!   │            └───────────────┴─────────────────┴─ failure or Ctrl-C ─┴───────┐    │
//!   └─ Ctrl-C: nothing to undo                                stop and remove the sandbox
//! ```
//! The first Ctrl-C while the container runs asks it to end, the second kills it. One that is left to
//! the daemon (`-d`, or the detach keys) keeps its sandbox.

use std::{
    fmt::Display,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use hull_proto_cri::v1::{
    ContainerState, ContainerStatus, CreateContainerRequest, ImageSpec, ImageStatusRequest,
    PodSandboxConfig, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
};
use hull_proto_images::v1::PullRequest;
use hull_streaming::client::{self, Detach, Left, Wants};
use tokio::{sync::watch, time::timeout};
use tonic::Code;

use super::{arguments::RunArgs, interrupts, request, streams};
use crate::{
    client::{Client, Daemon, refused},
    containers::{self, Show as ShowLog, Streams, own},
    images::{
        self,
        progress::{self, Show},
    },
    table,
};

/// Grace after the first Ctrl-C, in seconds.
const GRACE_SECONDS: i64 = 10;
/// How often the container's state is asked for.
const POLL: Duration = Duration::from_millis(30);
/// How long what a container wrote last may take to come by a connection.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// One container's way.
pub(super) struct Session<'a> {
    client: Client,
    streams: Streams,
    arguments: &'a RunArgs,
    /// Our input is the container's.
    passes: bool,
    /// The daemon outlives us.
    daemon_stays: bool,
    interrupts: watch::Receiver<u32>,
}

/// What became of the container.
enum Outcome {
    Exited(Box<ContainerStatus>),
    /// It is the daemon's now, with this id.
    Left(String),
}

pub(super) fn unique_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_nanos());
    format!("run-{}-{now:x}", std::process::id())
}

impl<'a> Session<'a> {
    /// At the daemon.
    pub(super) fn new(
        daemon: &Daemon,
        streams: Streams,
        arguments: &'a RunArgs,
        passes: bool,
    ) -> Result<Self> {
        Ok(Self {
            client: daemon.client(),
            streams,
            arguments,
            passes,
            daemon_stays: daemon.goes_on(),
            interrupts: interrupts::count().context("install signal handlers")?,
        })
    }

    /// Runs a container as asked and returns its exit code.
    pub(super) async fn run(mut self, state: &Path) -> Result<u8> {
        let name = self.arguments.name.clone().unwrap_or_else(unique_name);
        let image = self.image().await?;
        self.pod(&name, &image, &own::directory(state, &name)).await
    }

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
            image: self.arguments.image().to_owned(),
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
        self.say(format_args!("pulling {}", self.arguments.image()));
        let started = Instant::now();
        let mut request = PullRequest {
            image: self.arguments.image().to_owned(),
            ..Default::default()
        };
        images::complete(&mut request);
        let show = Show::unless(self.arguments.quiet);
        let pulled = tokio::select! {
            pulled = progress::pull(&self.client, request, show) => pulled?,
            _ = self.interrupts.changed() => bail!("interrupted"),
        };
        self.say(format_args!("pulled in {:.1?}", started.elapsed()));
        Ok(pulled)
    }

    /// A sandbox, what happens in it, and its end.
    async fn pod(&mut self, name: &str, image: &str, directory: &Path) -> Result<u8> {
        self.say("booting a microVM");
        let started = Instant::now();
        let config = request::sandbox(self.arguments, name, directory);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.arguments.runtime.clone(),
        };
        // Not given up by Ctrl-C: without the answer there would be no id to remove.
        let pod = self.client.runtime.run_pod_sandbox(request).await;
        let pod = pod.map_err(|status| match status.code() {
            Code::AlreadyExists => {
                anyhow::anyhow!("the name {name} is taken; `hull rm {name}` frees it")
            }
            _ => refused("boot")(status),
        })?;
        let pod = pod.into_inner().pod_sandbox_id;
        self.say(format_args!("booted in {:.1?}", started.elapsed()));
        let result = self.container(&pod, config, image, directory).await;
        if let Ok(Outcome::Left(id)) = result {
            return self.left(name, &id);
        }
        let removed = own::remove(&self.client, &pod, directory).await;
        match (result, removed) {
            (Ok(Outcome::Exited(status)), Ok(())) => Ok(self.exit_code(&status)),
            (Ok(_), removed) => removed.map(|()| 0),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(removal)) => Err(error.context(format!("also: {removal:#}"))),
        }
    }

    /// A container, its output and its end.
    async fn container(
        &mut self,
        pod: &str,
        sandbox: PodSandboxConfig,
        image: &str,
        directory: &Path,
    ) -> Result<Outcome> {
        self.interrupted()?;
        self.say("starting the container");
        own::make_directory(directory).await?;
        let input = streams::input(self.arguments, self.passes);
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(request::container(self.arguments, image, input)),
            sandbox_config: Some(sandbox),
        };
        let created = self.client.runtime.create_container(request).await;
        let id = created
            .map_err(refused("create the container"))?
            .into_inner()
            .container_id;
        self.interrupted()?;
        let session = match streams::wants(self.arguments, self.passes) {
            Some(wants) => Some((self.streams.attach(&id, wants).await?, wants)),
            None => None,
        };
        let request = StartContainerRequest {
            container_id: id.clone(),
        };
        let started = self.client.runtime.start_container(request).await;
        started.map_err(refused("start the container"))?;
        match session {
            _ if self.arguments.detach => Ok(Outcome::Left(id)),
            Some((session, wants)) if wants.tty => self.at_terminal(id, session, wants).await,
            session => {
                let session = session.map(|(session, _)| session);
                let log = directory.join(own::LOG);
                let status = self.until_exit(&id, session, &log).await?;
                Ok(Outcome::Exited(Box::new(status)))
            }
        }
    }

    /// Passes our input on, if that is wanted, and prints the log until the container has ended.
    async fn until_exit(
        &mut self,
        id: &str,
        session: Option<client::Session>,
        log: &Path,
    ) -> Result<ContainerStatus> {
        let (exited, ended) = watch::channel(());
        let mut output = tokio::spawn(containers::follow(
            log.to_owned(),
            ended,
            ShowLog::default(),
        ));
        let input = tokio::spawn(async move {
            let mut session = session?;
            if let Some(stdin) = session.stdin.take()
                && let Err(error) = client::feed(stdin, None).await
            {
                eprintln!("hull: {:#}", anyhow::Error::from(error));
            }
            // Its end would be that of the connection, and of an input that nobody ended.
            Some(session)
        });
        let status = tokio::select! {
            status = self.exited(id) => status,
            // Before the container's end there is none but by an error.
            early = &mut output => {
                early.context("print the output")??;
                bail!("the log ended before the container");
            }
        };
        drop(exited);
        input.abort();
        output.await.context("print the output")??;
        status
    }

    /// Lends the container our terminal, until it has ended or is left.
    async fn at_terminal(
        &mut self,
        id: String,
        mut session: client::Session,
        wants: Wants,
    ) -> Result<Outcome> {
        let detach = if self.daemon_stays {
            Detach::Keys
        } else {
            Detach::Never
        };
        let interact = client::interact(&mut session, wants, detach);
        tokio::pin!(interact);
        let status = tokio::select! {
            left = &mut interact => match left? {
                Left::Detached => return Ok(Outcome::Left(id)),
                Left::Ended => self.exited(&id).await?,
            },
            status = self.exited(&id) => {
                // What is not there by then is in nobody's hands any more.
                if let Ok(left) = timeout(LAST_OUTPUT, interact).await {
                    left?;
                }
                status?
            }
        };
        Ok(Outcome::Exited(Box::new(status)))
    }

    /// Waits for the container's end and passes interrupts on.
    async fn exited(&mut self, id: &str) -> Result<ContainerStatus> {
        loop {
            let (status, _) = containers::status(&self.client, id, false).await?;
            if status.state() == ContainerState::ContainerExited {
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

    /// Tells of a container that goes on without us.
    fn left(&self, name: &str, id: &str) -> Result<u8> {
        if self.arguments.detach {
            table::print(&format!("{id}\n"))?;
        } else {
            self.say(format_args!(
                "{name} goes on: `hull attach {name}`, `hull rm -f {name}`"
            ));
        }
        Ok(0)
    }

    fn exit_code(&self, status: &ContainerStatus) -> u8 {
        if status.reason == "OOMKilled" {
            self.say("the container ran out of memory and was killed");
        }
        self.say(format_args!("exit code {}", status.exit_code));
        containers::exit_code(status)
    }
}
