//! What a "process" does: its arguments, one after another.
//!
//! `out:TEXT`, `err:TEXT` (`\n` is a line end), `lines:N` (numbers, a line each, slowly), `ticks:MS` (the
//! same, one each so many milliseconds, without end), `flood:N` (bytes), `yes:TEXT` (lines without end, a
//! MiB ahead of who reads them), `sleep:MS`, `wait` (until it is killed), `trap` (SIGTERM is written to
//! stdout instead of ending it), `signals` (writes the signals that the container got), `cat`
//! (copies its input to its output), `limits` (writes the changes of limits that the container
//! got), `close` (closes its outputs and goes on), `oom`, `forbidden` (the VMM is allowed no
//! system call, and makes one), `exit:CODE`. A first word `tar` or `test` is that program of this machine;
//! when `tar` fails, it ends [`LATE`] after its output.
//!
//! What the guest tells about it that is not so: `lie:offset` (its output begins at the last byte
//! there can be), `lie:late-offset` (the same, on connections that want no first byte),
//! `lie:after-end`, `lie:ends` (its output goes on after its end, or ends once more),
//! `lie:early-end` (connections that want no first byte get one less than was acknowledged),
//! `lie:no-end` (the end of its output is the end of the connection), `lie:end` (it ended in the far
//! future, and wrote endlessly), `lie:exited:ID` (the container ID ended), `lie:stats` (the guest
//! uses all there is), `lie:events:KIND` (events without end, once something else happened), `lie:wire:WORD`
//! ([`crate::wire`]).

use std::{
    collections::HashSet,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hull_jail::seccomp::List;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    sync::{mpsc, watch},
    time::sleep,
};

use crate::outputs::{OutputBuffer, OutputState};

/// What a busy guest may take.
const LATE: Duration = Duration::from_millis(1500);

/// A process, or one to be.
#[derive(Debug, Default)]
pub struct Process {
    pub args: Vec<String>,
    pub stdout: OutputBuffer,
    pub stderr: OutputBuffer,
    pub signals: Mutex<Vec<u32>>,
    pub once: Mutex<HashSet<String>>,
    pub limits: Mutex<Vec<String>>,
    pub kill: Mutex<Option<mpsc::UnboundedSender<u32>>>,
    /// None: it is at its end, or there is none.
    pub input: Mutex<Option<mpsc::UnboundedSender<Vec<u8>>>>,
    /// The end of a connection is the end of the input.
    pub input_closes: bool,
    /// It stands still, as far as it writes lines.
    pub held: watch::Sender<bool>,
    /// How many of its ticks it has written.
    pub ticks: AtomicU64,
    pub received: tokio::sync::Mutex<Option<mpsc::UnboundedReceiver<Vec<u8>>>>,
}

/// What a snapshot keeps of a process that runs or waits.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedProcess {
    args: Vec<String>,
    stdout: OutputState,
    stderr: OutputState,
    ticks: u64,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub code: i32,
    pub signal: u32,
    pub oom: bool,
}

impl Process {
    pub fn new(args: Vec<String>) -> Arc<Self> {
        Arc::new(Self {
            args,
            ..Self::default()
        })
    }

    /// One with an input.
    pub fn with_input(args: Vec<String>, input_closes: bool) -> Arc<Self> {
        let (input, received) = mpsc::unbounded_channel();
        Arc::new(Self {
            args,
            input: Mutex::new(Some(input)),
            input_closes,
            received: tokio::sync::Mutex::new(Some(received)),
            ..Self::default()
        })
    }

    pub fn saved(&self) -> SavedProcess {
        SavedProcess {
            args: self.args.clone(),
            stdout: self.stdout.saved(),
            stderr: self.stderr.saved(),
            ticks: self.ticks.load(Ordering::Relaxed),
        }
    }

    /// One that stands still where it was saved.
    pub fn restored(saved: SavedProcess) -> Arc<Self> {
        Arc::new(Self {
            args: saved.args,
            stdout: OutputBuffer::restored(saved.stdout),
            stderr: OutputBuffer::restored(saved.stderr),
            ticks: AtomicU64::new(saved.ticks),
            held: watch::channel(true).0,
            ..Self::default()
        })
    }

    /// What is told of it that is not so.
    pub fn lies(&self) -> impl Iterator<Item = &str> {
        self.args.iter().filter_map(|arg| arg.strip_prefix("lie:"))
    }

    pub fn signal(&self, signal: u32) {
        self.signals.lock().unwrap().push(signal);
        if let Some(kill) = &*self.kill.lock().unwrap() {
            let _ = kill.send(signal);
        }
    }

    /// Runs it to its end. `owner` is the process whose signals `signals` shows.
    pub async fn run(&self, owner: &Process) -> End {
        let (sender, mut signals) = mpsc::unbounded_channel();
        *self.kill.lock().unwrap() = Some(sender);
        let trap = self.args.iter().any(|a| a == "trap");
        let killed = async {
            loop {
                match signals.recv().await {
                    Some(15) if trap => self.stdout.write(b"TERM\n"),
                    Some(signal) => return signal,
                    None => std::future::pending().await,
                }
            }
        };
        let end = tokio::select! {
            end = self.work(owner) => end,
            signal = killed => End { code: 128 + signal as i32, signal, oom: false },
        };
        self.stdout.end();
        self.stderr.end();
        end
    }

    async fn work(&self, owner: &Process) -> End {
        let mut end = End {
            code: 0,
            signal: 0,
            oom: false,
        };
        if let Some("tar" | "test") = self.args.first().map(String::as_str) {
            end.code = self.of_this_machine().await;
            if end.code != 0 && self.args[0] == "tar" {
                self.stdout.end();
                sleep(LATE).await;
            }
            return end;
        }
        for arg in &self.args {
            let (word, value) = arg.split_once(':').unwrap_or((arg, ""));
            let number = || value.parse::<u64>().unwrap_or(0);
            match word {
                "out" => self.stdout.write(value.replace("\\n", "\n").as_bytes()),
                "err" => self.stderr.write(value.replace("\\n", "\n").as_bytes()),
                "lines" => {
                    for n in 0..number() {
                        self.stdout.write(format!("line {n}\n").as_bytes());
                        sleep(Duration::from_millis(1)).await;
                    }
                }
                "ticks" => loop {
                    let _ = self.held.subscribe().wait_for(|held| !held).await;
                    let n = self.ticks.fetch_add(1, Ordering::Relaxed);
                    self.stdout.write(format!("line {n}\n").as_bytes());
                    sleep(Duration::from_millis(number())).await;
                },
                "flood" => self.stdout.write(&vec![b'x'; number() as usize]),
                "yes" => {
                    let lines = format!("{value}\n").repeat((64 << 10) / (value.len() + 1) + 1);
                    loop {
                        self.stdout.write(lines.as_bytes());
                        self.stdout.wait_for_room(1 << 20).await;
                    }
                }
                "sleep" => sleep(Duration::from_millis(number())).await,
                "cat" => {
                    if let Some(input) = self.received.lock().await.as_mut() {
                        while let Some(bytes) = input.recv().await {
                            self.stdout.write(&bytes);
                        }
                    }
                }
                "wait" => std::future::pending::<()>().await,
                "signals" => {
                    let signals = owner.signals.lock().unwrap().clone();
                    self.stdout.write(format!("{signals:?}").as_bytes());
                }
                "limits" => {
                    let limits = owner.limits.lock().unwrap().join("\n");
                    self.stdout.write(limits.as_bytes());
                }
                "close" => {
                    self.stdout.end();
                    self.stderr.end();
                }
                "oom" => {
                    end = End {
                        code: 137,
                        signal: 9,
                        oom: true,
                    };
                }
                "forbidden" => {
                    let nothing = List {
                        threads: "",
                        contains: &[],
                        calls: &[],
                    };
                    nothing.apply().unwrap();
                }
                "exit" => end.code = number() as i32,
                _ => {}
            }
        }
        end
    }

    /// Runs a program of this machine; returns its exit code.
    async fn of_this_machine(&self) -> i32 {
        let mut command = tokio::process::Command::new(&self.args[0]);
        command.args(&self.args[1..]).kill_on_drop(true);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let input = async move {
            if let Some(input) = self.received.lock().await.as_mut() {
                while let Some(bytes) = input.recv().await {
                    if stdin.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
            }
            drop(stdin);
            std::future::pending::<()>().await;
        };
        let ended = async {
            tokio::join!(
                child.wait(),
                copy(stdout, &self.stdout),
                copy(stderr, &self.stderr)
            )
        };
        tokio::select! {
            (status, (), ()) = ended => status.unwrap().code().unwrap_or(128),
            () = input => 128,
        }
    }
}

async fn copy(mut from: impl AsyncRead + Unpin, to: &OutputBuffer) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        to.write(&buffer[..length]);
    }
}
