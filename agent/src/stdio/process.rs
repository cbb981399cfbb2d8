//! The standard streams of one process.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::{sync::watch, time::timeout};

use super::{
    fd::Fd,
    input::{Input, InputEnd},
    output::{Output, pipe},
};

/// What a process has as standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// A terminal for all three instead of pipes.
    pub(crate) tty: bool,
    /// An input; otherwise `/dev/null`.
    pub(crate) stdin: bool,
    /// What the end of a connection's input means.
    pub(crate) end: InputEnd,
}

/// The standard streams of one process.
#[derive(Debug)]
pub(crate) struct Stdio {
    pub(super) stdout: Arc<Output>,
    pub(super) stderr: Arc<Output>,
    pub(super) input: Option<Input>,
    terminal: OnceLock<Arc<Fd>>,
    /// Size that was asked for before there was a terminal.
    early_size: Mutex<Option<(u16, u16)>>,
    /// How many connections serve the streams, and whether there ever was one.
    attached: watch::Sender<Attached>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Attached {
    now: usize,
    ever: bool,
}

/// The process's ends of the pipes.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    /// `None`: `/dev/null`.
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Finds the streams of processes.
pub(crate) trait Directory: Send + Sync + 'static {
    /// Returns the streams of the exec, or with an empty `exec` of the
    /// container's first process.
    fn stdio(&self, container: &str, exec: &str) -> Option<Arc<Stdio>>;
}

impl Stdio {
    /// Makes the streams, and the process's pipe ends unless it gets a terminal.
    pub(crate) fn new(wanted: Wanted) -> io::Result<(Arc<Self>, Option<ProcessEnds>)> {
        let (stdout, stderr) = (Output::new(), Output::new());
        let mut ends = None;
        let mut sink = None;
        if wanted.tty {
            stderr.close();
        } else {
            let (out, out_source) = pipe()?;
            let (err, err_source) = pipe()?;
            tokio::spawn(Arc::clone(&stdout).pump(out_source));
            tokio::spawn(Arc::clone(&stderr).pump(err_source));
            let stdin = if wanted.stdin {
                let (reader, writer) = io::pipe()?;
                sink = Some(Arc::new(Fd::new(writer.into())?));
                Some(reader.into())
            } else {
                None
            };
            ends = Some(ProcessEnds {
                stdin,
                stdout: out,
                stderr: err,
            });
        }
        let input = wanted.stdin.then(|| Input::new(sink, wanted.end));
        let stdio = Self {
            stdout,
            stderr,
            input,
            terminal: OnceLock::new(),
            early_size: Mutex::new(None),
            attached: watch::Sender::default(),
        };
        Ok((Arc::new(stdio), ends))
    }

    /// Uses `master` as the process's terminal.
    pub(crate) fn set_terminal(&self, master: OwnedFd) -> io::Result<()> {
        let master = Arc::new(Fd::new(master)?);
        if let Some(input) = &self.input {
            input.set_terminal(Arc::clone(&master));
        }
        tokio::spawn(Arc::clone(&self.stdout).pump(Arc::clone(&master)));
        let early = self
            .early_size
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let _ = self.terminal.set(master);
        match early {
            Some((rows, columns)) => self.resize(rows, columns),
            None => Ok(()),
        }
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let Some(terminal) = self.terminal.get() else {
            *self
                .early_size
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some((rows, columns));
            return Ok(());
        };
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(terminal.get(), size)?)
    }

    /// Ends the outputs of a process that is gone; see [`Output::finish`].
    /// Returns the final lengths of stdout and stderr.
    pub(crate) async fn finish(&self, patience: Duration) -> (u64, u64) {
        if let Some(input) = &self.input {
            input.close();
        }
        tokio::join!(self.stdout.finish(patience), self.stderr.finish(patience))
    }

    /// Ends the streams of a process that never came to be.
    pub(crate) fn abandon(&self) {
        self.stdout.close();
        self.stderr.close();
        if let Some(input) = &self.input {
            input.close();
        }
    }

    /// Returns whether the host has all output and no more can come.
    pub(crate) fn finished(&self) -> bool {
        self.stdout.finished() && self.stderr.finished()
    }

    /// Waits until connections were there and are all gone for `grace`, or none
    /// came within `patience`.
    pub(crate) async fn detached(&self, grace: Duration, patience: Duration) {
        let mut attached = self.attached.subscribe();
        if timeout(patience, attached.wait_for(|a| a.ever))
            .await
            .is_err()
        {
            return;
        }
        loop {
            if attached.wait_for(|a| a.ever && a.now == 0).await.is_err() {
                return;
            }
            let back = attached.wait_for(|a| a.now > 0);
            if timeout(grace, back).await.is_err() {
                return;
            }
        }
    }

    /// Counts a connection until the guard is dropped.
    pub(super) fn count(self: &Arc<Self>) -> Guard {
        self.attached.send_modify(|a| {
            a.now += 1;
            a.ever = true;
        });
        Guard(Arc::clone(self))
    }
}

/// A connection that serves a stream of the process.
pub(super) struct Guard(Arc<Stdio>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.attached.send_modify(|a| a.now -= 1);
    }
}
