//! The daemon: started, killed at any point, and started again on what it left. Its callers are on other
//! hosts, and a call of theirs that it did not answer before it was killed fails.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use hull_pod::Pods;
use hull_spec::{
    config::{PodsConfig, TemplateScope},
    error::PodError,
};
use nix::errno::Errno;
use std::sync::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    dice,
    host::{Host, Ran},
    kernel::{self, Disk, Who},
    logs,
    node::{Images, Networks},
    trace::trace,
    vms::Processes,
};

/// How long a caller waits, as kubelet does.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long the disk is full or broken at most: twice, one after the other, is less than the daemon waits until
/// it gives up what could not be written to the log of a container that has ended.
const BROKEN_MS: u64 = 4500;

type Job = Box<dyn FnOnce(Pods) -> BoxFuture<'static, ()> + Send>;

/// Where calls go to. Clones share it.
#[derive(Clone, Default)]
pub struct Socket(Arc<Mutex<Option<mpsc::UnboundedSender<Job>>>>);

/// Why a call has no answer, or which.
#[derive(Debug)]
pub enum Failure {
    /// The daemon is not there, or was killed meanwhile.
    Gone,
    /// It did not answer in time.
    Late,
    Refused(PodError),
}

impl Socket {
    /// Calls the daemon.
    pub async fn call<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(Pods) -> BoxFuture<'static, Result<T, PodError>> + Send + 'static,
    ) -> Result<T, Failure> {
        trace(format_args!("call: {what}"));
        let result = self.ask(work).await;
        match &result {
            Ok(_) => trace(format_args!("done: {what}")),
            Err(Failure::Refused(error)) => trace(format_args!(
                "refused: {what}: {}",
                error_reporter::Report::new(error)
            )),
            Err(other) => trace(format_args!("{other:?}: {what}")),
        }
        result
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(Pods) -> BoxFuture<'static, Result<T, PodError>> + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(|pods| {
            Box::pin(async move {
                let mut reply = reply;
                // gRPC drops the work of a caller that went away.
                tokio::select! {
                    biased;
                    () = reply.closed() => {}
                    result = work(pods) => drop(reply.send(result)),
                }
            })
        });
        let sender = self.0.lock().unwrap().clone();
        let sent = sender.ok_or(Failure::Gone)?.send(job);
        sent.map_err(|_| Failure::Gone)?;
        let patience = match dice::fault_in(40) {
            true => dice::ms(1..2000),
            false => PATIENCE,
        };
        match timeout(patience, answer).await {
            Ok(Ok(result)) => result.map_err(Failure::Refused),
            Ok(Err(_)) => Err(Failure::Gone),
            Err(_) => Err(Failure::Late),
        }
    }
}

/// What daemons are made of, one after another.
pub struct Daemon {
    pub config: PodsConfig,
    pub images: Arc<Images>,
    pub networks: Arc<Networks>,
    pub processes: Arc<Processes>,
    /// Of pods; somebody else rotates them.
    logs: PathBuf,
    pub socket: Socket,
    host: Option<Host>,
    /// Why the last one could not start.
    failure: Arc<Mutex<Option<String>>>,
    /// After so many polls it is killed; none: it is not.
    kill_after: Option<u64>,
    /// When the next one is started.
    start_at: Duration,
    pub kills: u64,
    pub starts: u64,
    pub polls: u64,
    /// Until then its disk has this fault.
    broken_until: Duration,
}

impl Daemon {
    pub fn new(config: PodsConfig, images: Images, networks: Networks, logs: PathBuf) -> Self {
        let processes = Processes {
            kernel: config.kernel.clone(),
            are_clones: config.template != TemplateScope::Off,
        };
        Self {
            config,
            images: Arc::new(images),
            networks: Arc::new(networks),
            processes: Arc::new(processes),
            logs,
            socket: Socket::default(),
            host: None,
            failure: Arc::default(),
            kill_after: None,
            start_at: Duration::ZERO,
            kills: 0,
            starts: 0,
            polls: 0,
            broken_until: Duration::ZERO,
        }
    }

    /// Starts a daemon that will be killed at a point of the seed's, or never.
    pub fn start(&mut self) {
        let mut disk = Disk::default();
        self.kill_after = None;
        match dice::within(0..8) {
            _ if !dice::is_chaos() => {}
            // Most of what there is to interrupt comes early.
            0..=2 => self.kill_after = Some(1 + dice::within(0..200)),
            3..=5 => self.kill_after = Some(1 + dice::within(0..3000)),
            6 => disk.kill_after = Some(dice::within(0..60)),
            _ => disk.kill_after = Some(dice::within(0..400)),
        }
        if dice::fault_in(4) {
            disk.fail_after = Some(dice::within(0..200));
        }
        if dice::fault_in(6) {
            disk.full = Some((dice::within(0..300), dice::ms(1..BROKEN_MS)));
        }
        trace(format_args!(
            "the daemon starts, kill after {:?} polls, {disk:?}",
            self.kill_after
        ));
        kernel::set_disk(disk);
        let host = Host::new(Who::Daemon);
        let (sender, mut jobs) = mpsc::unbounded_channel::<Job>();
        *self.socket.0.lock().unwrap() = Some(sender);
        let config = self.config.clone();
        let (images, networks) = (self.images.clone(), self.networks.clone());
        let (processes, failure) = (self.processes.clone(), self.failure.clone());
        host.handle().spawn(async move {
            match Pods::open_with(config, images, networks, processes).await {
                Ok(pods) => {
                    trace(format_args!("the daemon serves"));
                    while let Some(job) = jobs.recv().await {
                        tokio::spawn(job(pods.clone()));
                    }
                }
                Err(error) => {
                    let why = error_reporter::Report::new(error).to_string();
                    *failure.lock().unwrap() = Some(why);
                }
            }
        });
        self.host = Some(host);
        self.starts += 1;
    }

    /// Runs on; one that was killed or could not start is started again.
    pub fn run(&mut self, polls: u64) -> Ran {
        let Some(host) = &self.host else {
            let is_due = kernel::now() >= self.start_at;
            if is_due {
                if dice::fault_in(3) {
                    logs::rotate_all(&self.logs);
                }
                self.start();
            }
            return Ran {
                polls: 1,
                is_idle: !is_due,
            };
        };
        let slice = self.kill_after.map_or(polls, |left| left.min(polls));
        let ran = host.run(slice);
        self.polls += ran.polls;
        if let Some(left) = &mut self.kill_after {
            // Those that only wait for time to pass are no points of their own.
            *left -= match ran {
                Ran {
                    polls: 1,
                    is_idle: true,
                } => 0,
                ran => ran.polls,
            };
            if *left == 0 {
                kernel::set_dead(true);
            }
        }
        if let Some(why) = self.failure.lock().unwrap().take() {
            trace(format_args!("the daemon can't start: {why}"));
            kernel::set_dead(true);
        }
        if kernel::is_dead() {
            self.kill();
        }
        ran
    }

    /// Kills it.
    pub fn kill(&mut self) {
        if let Some(host) = self.host.take() {
            trace(format_args!("the daemon is killed"));
            kernel::set_dead(true);
            *self.socket.0.lock().unwrap() = None;
            host.kill();
            kernel::set_dead(false);
            self.kills += 1;
            self.start_at = kernel::now() + dice::ms(0..3000);
        }
    }

    /// Lets time pass.
    pub fn advance(&mut self, time: Duration) {
        if let Some(host) = &self.host {
            host.advance(time);
        }
        if !self.broken_until.is_zero() && kernel::now() >= self.broken_until {
            self.mend();
        }
    }

    /// Its disk is full, or broken, for a time.
    pub fn break_disk(&mut self) {
        let errno = dice::pick(&[Errno::ENOSPC, Errno::EIO]);
        let time = dice::ms(1..BROKEN_MS);
        trace(format_args!("{errno:?} for {time:?}"));
        self.broken_until = kernel::now() + time;
        kernel::set_disk(Disk {
            broken: Some(errno),
            ..Disk::default()
        });
    }

    /// Nothing is wrong with it any more.
    pub fn mend(&mut self) {
        trace(format_args!("the disk is as it should be"));
        self.broken_until = Duration::ZERO;
        self.kill_after = None;
        kernel::set_disk(Disk::default());
    }
}
