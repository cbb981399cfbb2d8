//! A pod that no fault may harm.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use hull_proto_cri::v1::ContainerState;
use hull_tests::client::Pod;

use crate::{kubelet::Work, left::Left, node::Node};

/// A pod that runs all the time.
#[derive(Debug)]
pub struct Witness {
    pub pod: Pod,
    pub container: String,
    /// What is there with it.
    pub left: Left,
    vmm: u32,
    lines: usize,
}

impl Witness {
    pub async fn start(node: &Node) -> Result<Self> {
        // Its log must have nothing of the one before.
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("witness-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let pod = node.run_sandbox(node.sandbox(&name)).await?;
        let container = node
            .create(&pod, node.container("ticks", Work::Ticks))
            .await?;
        node.start_container(&container).await?;
        let vmm = *node.vmms(&pod.id).first().context("its VMM")?;
        Ok(Self {
            pod,
            container,
            left: node.left(),
            vmm,
            lines: 0,
        })
    }

    /// It is unharmed.
    pub async fn look(&mut self, node: &Node) -> Result<()> {
        let vmms = node.vmms(&self.pod.id);
        ensure!(
            vmms == [self.vmm],
            "the running pod's VMM was {}, now {vmms:?}",
            self.vmm
        );
        ensure!(
            node.is_ready(&self.pod).await?,
            "the running pod is not ready"
        );
        let status = node.container_status(&self.container).await?;
        let is_running = status.state() == ContainerState::ContainerRunning;
        ensure!(
            is_running,
            "the running pod's container is {:?}",
            status.state()
        );
        node.exec(&self.container)
            .await
            .context("the running pod")?;
        let log = node.log(&self.pod, "ticks");
        ensure!(
            log.len() >= self.lines,
            "the running pod's log became shorter"
        );
        for (number, line) in log.iter().enumerate() {
            if *line != format!("line {number}") {
                bail!("line {number} of the running pod's log is {line:?}");
            }
        }
        self.lines = log.len();
        Ok(())
    }

    /// Its log goes on.
    pub async fn ticks(&mut self, node: &Node) -> Result<()> {
        let before = self.lines;
        for _ in 0..600 {
            self.look(node).await?;
            if self.lines > before {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("the running pod's log does not go on")
    }
}
