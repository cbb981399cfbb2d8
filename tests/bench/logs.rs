//! The load of logs.sh: pods that write without end, and one that starts containers beside them.
//!
//!     log-load DIR PID FLOODS ROUNDS

#![forbid(unsafe_code)]

use std::{
    env, fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hull_proto_cri::v1::*;
use hull_tests::client::{Client, image};

/// How long output is measured.
const WINDOW: Duration = Duration::from_secs(5);
/// How long it runs before.
const WARM: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let dir = PathBuf::from(arguments.next().context("no directory")?);
    let mut number = || -> Result<usize> { Ok(arguments.next().context("no number")?.parse()?) };
    let (daemon, floods, rounds) = (number()?, number()?, number()?);
    let socket = dir.join("state/hull.sock");
    let client = Client::connect_within(&socket, Duration::from_secs(10)).await?;
    let node = Node {
        client,
        dir,
        daemon,
    };

    let quiet = node.pod("quiet").await?;
    let alone = node.starts(&quiet, 0, rounds).await?;
    tell("start", alone, 1.0);
    for (name, length) in [("long", 4000), ("short", 40)] {
        let noisy = node.pod(name).await?;
        let id = node.flood(&noisy, length).await?;
        let (rate, cpu) = node.watch(&noisy, length).await?;
        tell(&format!("rate-{name}"), rate, 1.0);
        tell(&format!("cpu-{name}"), cpu * 100.0, 1.0);
        tell(&format!("cost-{name}"), cpu * 1000.0 / rate, 1.0);
        node.remove(&id).await?;
    }
    let mut pods = Vec::new();
    for count in 0..floods {
        let noisy = node.pod(&format!("noisy{count}")).await?;
        node.flood(&noisy, 40).await?;
        pods.push(noisy);
        if [0, floods - 1].contains(&count) {
            tokio::time::sleep(WARM).await;
            let emptied = node.empty(&pods);
            let with = tokio::select! {
                with = node.starts(&quiet, count + 1, rounds) => with?,
                failed = emptied => return failed,
            };
            tell(&format!("start-{}", count + 1), with, with / alone);
        }
    }
    Ok(())
}

struct Node {
    client: Client,
    dir: PathBuf,
    daemon: usize,
}

struct Pod {
    name: String,
    id: String,
    config: PodSandboxConfig,
}

impl Node {
    async fn pod(&self, name: &str) -> Result<Pod> {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: name.into(),
                namespace: "bench".into(),
                attempt: 0,
            }),
            log_directory: self.dir.join("logs").join(name).display().to_string(),
            linux: Some(LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let answer = self.client.runtime.clone().run_pod_sandbox(request).await?;
        Ok(Pod {
            name: name.into(),
            id: answer.into_inner().pod_sandbox_id,
            config,
        })
    }

    /// Starts a container whose process does what `command` says.
    async fn container(&self, pod: &Pod, name: &str, command: Vec<String>) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(image("bench.local/app:1")),
            command,
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let mut runtime = self.client.runtime.clone();
        let container_id = runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id;
        let request = StartContainerRequest {
            container_id: container_id.clone(),
        };
        runtime.start_container(request).await?;
        Ok(container_id)
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        self.client
            .runtime
            .clone()
            .remove_container(request)
            .await?;
        Ok(())
    }

    fn log(&self, pod: &Pod, name: &str) -> PathBuf {
        self.dir
            .join("logs")
            .join(&pod.name)
            .join(format!("{name}.log"))
    }

    /// Writes lines of so many bytes without end.
    async fn flood(&self, pod: &Pod, length: usize) -> Result<String> {
        let line = "x".repeat(length - 1);
        self.container(pod, "flood", vec![format!("yes:{line}")])
            .await
    }

    /// How many MB of output a second come into a log of lines of one length, and what the daemon uses of a
    /// processor for it.
    async fn watch(&self, pod: &Pod, length: usize) -> Result<(f64, f64)> {
        // Time, stream, tag and three spaces come with each line.
        const HEAD: usize = 30 + 6 + 1 + 3;
        tokio::time::sleep(WARM).await;
        let log = self.log(pod, "flood");
        let (begin, size, cpu) = (Instant::now(), fs::metadata(&log)?.len(), self.cpu()?);
        tokio::time::sleep(WINDOW).await;
        let grown = fs::metadata(&log)?.len() - size;
        let (cpu, seconds) = (self.cpu()? - cpu, begin.elapsed().as_secs_f64());
        ensure!(grown > 0, "{} does not grow", log.display());
        let share = length as f64 / (length + HEAD) as f64;
        // It is in memory.
        fs::File::options().write(true).open(&log)?.set_len(0)?;
        Ok((grown as f64 * share / 1e6 / seconds, cpu / seconds))
    }

    /// Keeps logs short, as rotation does; it does not end.
    async fn empty(&self, pods: &[Pod]) -> Result<()> {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            for pod in pods {
                fs::File::options()
                    .write(true)
                    .open(self.log(pod, "flood"))?
                    .set_len(0)?;
            }
        }
    }

    /// Seconds that the daemon has used of processors.
    fn cpu(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon))?;
        let (_, fields) = stat.rsplit_once(')').context("no stat")?;
        // User and system, from the field after the name on; in hundredths of a second.
        let used = fields.split_ascii_whitespace().skip(11).take(2);
        let ticks: u64 = used.map(str::parse::<u64>).sum::<Result<_, _>>()?;
        Ok(ticks as f64 / 100.0)
    }

    /// How long a container takes until its line is in its log, ms: the median of so many,
    /// with so many others that write.
    async fn starts(&self, pod: &Pod, beside: usize, rounds: usize) -> Result<f64> {
        let mut times = Vec::new();
        for round in 0..rounds {
            let name = format!("s{beside}-{round}");
            let begin = Instant::now();
            let command = vec!["out:begun\\n".into(), "wait".into()];
            let id = self.container(pod, &name, command).await?;
            while fs::metadata(self.log(pod, &name)).map_or(0, |log| log.len()) == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            self.remove(&id).await?;
        }
        times.sort_by(f64::total_cmp);
        Ok(times[rounds / 2])
    }
}

fn tell(name: &str, value: f64, ratio: f64) {
    println!("bench logs-{name} hull={value:.2} peer=none ratio={ratio:.2} target=none");
}
