//! Carries the output of a container from the agent to its log file.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OnceCell, watch},
    task::JoinHandle,
    time::sleep,
};

use hull_base::{blocking, clock};
use hull_vm::agent::{
    client::Agent,
    stdio::{Output, OutputEnd, OutputKind},
};

use super::{
    LogError,
    fanout::{AttachedOutput, Fanout},
    file::{LogFile, LogPath},
    line::LineSplitter,
    share::{Share, timed},
};

const BUFFER: usize = 64 * 1024;
/// The same while an output is silent.
const IDLE_BUFFER: usize = 512;
/// Pause before a write is tried again, for example on a full disk. Meanwhile the container's
/// writes block once the agent's buffer is full, so the pause does not grow: nothing tells when there
/// is room again.
const RETRY: Duration = Duration::from_secs(1);

/// The log of a running container.
#[derive(Debug)]
pub(crate) struct ContainerLog {
    stdout_end: watch::Sender<OutputEnd>,
    stderr_end: watch::Sender<OutputEnd>,
    stdout: Fanout,
    stderr: Fanout,
    file: LogHandle,
    pumps: Vec<JoinHandle<()>>,
}

/// The file of a log, while others write it.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    path: Option<LogPath>,
    position: PathBuf,
    /// Nothing: it could not be opened yet.
    file: OnceCell<Arc<Mutex<LogFile>>>,
}

impl LogHandle {
    fn new(target: &LogTarget) -> Self {
        Self(Arc::new(Handle {
            path: target.path.clone(),
            position: target.position.clone(),
            file: OnceCell::new(),
        }))
    }

    /// The file, which is opened unless it was.
    async fn open(&self) -> Result<Arc<Mutex<LogFile>>, LogError> {
        let open = || async {
            let (path, position) = (self.0.path.clone(), self.0.position.clone());
            let opened = blocking(move || LogFile::open(path, &position)).await;
            opened.map(|file| Arc::new(Mutex::new(file)))
        };
        self.0.file.get_or_try_init(open).await.cloned()
    }

    /// The same, for as long as it takes.
    async fn opened(&self) -> Arc<Mutex<LogFile>> {
        loop {
            match self.open().await {
                Ok(file) => return file,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "go on with a log");
                }
            }
            sleep(RETRY).await;
        }
    }

    /// How much of standard output and of standard error is in the file, in bytes.
    ///
    /// # Errors
    /// When it can't be opened.
    pub(crate) async fn written(&self) -> Result<(u64, u64), LogError> {
        let file = self.open().await?;
        let written = move || {
            let file = file.lock().unwrap_or_else(PoisonError::into_inner);
            (
                file.written(OutputKind::Stdout),
                file.written(OutputKind::Stderr),
            )
        };
        Ok(blocking(written).await)
    }

    /// Goes on in a new file, after the old one was renamed.
    ///
    /// # Errors
    /// When it can't be opened; then the old file is gone on with.
    pub(crate) async fn reopen(&self) -> Result<(), LogError> {
        let file = self.open().await?;
        blocking(move || file.lock().unwrap_or_else(PoisonError::into_inner).reopen()).await
    }
}

/// What a log is made of.
#[derive(Debug, Clone)]
pub(crate) struct LogTarget {
    pub container: String,
    /// None: output is thrown away.
    pub path: Option<LogPath>,
    pub position: PathBuf,
    pub tty: bool,
    /// The pod's.
    pub share: Share,
}

impl ContainerLog {
    /// Begins to write the log.
    ///
    /// # Errors
    /// When its files can't be opened.
    pub(crate) async fn start(agent: &Agent, target: &LogTarget) -> Result<Self, LogError> {
        let log = LogHandle::new(target);
        log.open().await?;
        Ok(Self::carry(agent, target, log))
    }

    /// Goes on with a log that an earlier daemon began, as soon as its files can be opened: until then the
    /// guest keeps what is written.
    pub(crate) fn resume(agent: &Agent, target: &LogTarget) -> Self {
        Self::carry(agent, target, LogHandle::new(target))
    }

    fn carry(agent: &Agent, target: &LogTarget, handle: LogHandle) -> Self {
        let (stdout_end, stdout) = watch::channel(OutputEnd::Open);
        let (stderr_end, stderr) = watch::channel(OutputEnd::Open);
        let (stdout_live, stderr_live) = (Fanout::default(), Fanout::default());
        let mut outputs = vec![(OutputKind::Stdout, stdout, stdout_live.clone())];
        if !target.tty {
            outputs.push((OutputKind::Stderr, stderr, stderr_live.clone()));
        }
        let pumps = outputs
            .into_iter()
            .map(|(kind, end, live)| {
                let (handle, agent, target) = (handle.clone(), agent.clone(), target.clone());
                tokio::spawn(async move {
                    let pump = Box::pin(async {
                        let file = handle.opened().await;
                        let written = {
                            let file = file.lock().unwrap_or_else(PoisonError::into_inner);
                            file.written(kind)
                        };
                        let container = target.container.as_str();
                        let output = Output::new(&agent, kind, container, "", written, end.clone());
                        let log = OutputLog {
                            file,
                            kind,
                            written,
                            live,
                            share: target.share,
                            end,
                        };
                        log.pump(output).await;
                    });
                    // A panic has told the pod's task.
                    let _ = agent.guard(pump).await;
                })
            })
            .collect();
        Self {
            stdout_end,
            stderr_end,
            stdout: stdout_live,
            stderr: stderr_live,
            file: handle,
            pumps,
        }
    }

    /// Tells where the outputs end.
    pub(crate) fn end(&self, stdout: OutputEnd, stderr: OutputEnd) {
        self.stdout_end.send_replace(stdout);
        self.stderr_end.send_replace(stderr);
    }

    /// Its file.
    pub(crate) fn file(&self) -> LogHandle {
        self.file.clone()
    }

    /// Follows an output from now on.
    pub(crate) fn follow(&self, kind: OutputKind) -> AttachedOutput {
        match kind {
            OutputKind::Stdout => self.stdout.follow(),
            OutputKind::Stderr => self.stderr.follow(),
        }
    }

    /// The tasks that write the log, to be waited for; they end after [`ContainerLog::end`].
    pub(crate) fn take_pumps(&mut self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.pumps)
    }
}

impl Drop for ContainerLog {
    fn drop(&mut self) {
        for pump in &self.pumps {
            pump.abort();
        }
        self.stdout.end();
        self.stderr.end();
    }
}

/// Where one output goes.
#[derive(Debug)]
struct OutputLog {
    file: Arc<Mutex<LogFile>>,
    kind: OutputKind,
    written: u64,
    live: Fanout,
    share: Share,
    end: watch::Receiver<OutputEnd>,
}

impl OutputLog {
    async fn pump(mut self, mut output: Output) {
        let mut splitter = LineSplitter::new(match self.kind {
            OutputKind::Stdout => "stdout",
            OutputKind::Stderr => "stderr",
        });
        let mut buffer = vec![0; IDLE_BUFFER];
        loop {
            let read = output.read(&mut buffer).await;
            let (is_end, length) = (read.is_empty(), read.len());
            let mut lines = Vec::with_capacity(read.len().saturating_add(256));
            let now = clock::now_ns();
            let (bytes, split) = timed(|| {
                if is_end {
                    self.live.end();
                    splitter.finish(now, &mut lines)
                } else {
                    self.live.publish(read);
                    splitter.push(read, now, &mut lines)
                }
            });
            let mut appended = Duration::ZERO;
            if bytes > 0 {
                appended = self.append(Arc::new(lines), bytes).await;
                self.written = self.written.saturating_add(bytes);
                output.acknowledge(self.written).await;
            }
            if is_end {
                return;
            }
            fit(&mut buffer, length);
            let work = split.saturating_add(appended);
            self.share.spend(work, &mut self.end).await;
        }
    }

    /// Appends for as long as it takes; returns how much work it was.
    async fn append(&self, lines: Arc<Vec<u8>>, bytes: u64) -> Duration {
        let mut work = Duration::ZERO;
        loop {
            let (file, lines, kind) = (Arc::clone(&self.file), Arc::clone(&lines), self.kind);
            let append = move || {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                timed(|| file.append(&lines, kind, bytes))
            };
            let (result, took) = blocking(append).await;
            work = work.saturating_add(took);
            match result {
                Ok(()) => return work,
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "write log"),
            }
            sleep(RETRY).await;
        }
    }
}

/// Makes a buffer large while an output fills it, and small again: most outputs are silent most of
/// the time, and there are two for each container of the node.
fn fit(buffer: &mut Vec<u8>, length: usize) {
    let size = if length > IDLE_BUFFER / 2 {
        BUFFER
    } else {
        IDLE_BUFFER
    };
    buffer.resize(size, 0);
    buffer.shrink_to(size);
}
