//! A shell in the guest itself, for a person who looks for what is wrong with it.
//!
//! The program is on the guest's root, which is read-only and the host's choice, and only on that of pods which
//! may be entered. So one that was started without it has nothing to be entered by, and no container can bring it.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, split},
    net::UnixStream,
};
use tracing::{info, warn};

use super::{connection::Connection, dial, fd::Fd};
use crate::{container::Cgroup, layout::Layout, reaper::Reaper};

/// What the shell does first: it leaves the agent's cgroup, and what spares the agent when memory runs out.
const LEAVE: &str =
    r#"echo 0 >"$CGROUP/cgroup.procs" && echo 0 >/proc/self/oom_score_adj && exec sh"#;
const BUFFER: usize = 16 << 10;
/// How long a shell may go on whose host is gone.
const LINGER: Duration = Duration::from_secs(1);

/// Makes shells.
#[derive(Debug)]
pub(crate) struct Shells {
    /// The shell and all of its tools; none: this guest is not to be entered.
    program: Option<PathBuf>,
    layout: Layout,
    reaper: Arc<Reaper>,
    made: AtomicU64,
}

/// A shell that runs.
#[derive(Debug)]
pub(crate) struct Shell {
    streams: Streams,
    _all: All,
}

#[derive(Debug)]
enum Streams {
    Terminal(Fd),
    /// One socket for all three.
    Socket(UnixStream),
}

/// The shell and all that it started, which are killed when this is dropped.
#[derive(Debug)]
struct All(Cgroup);

impl Shells {
    /// What there is when the guest boots is what there will be.
    pub(crate) fn new(program: &Path, layout: Layout, reaper: Arc<Reaper>) -> Self {
        Self {
            program: program.exists().then(|| program.to_owned()),
            layout,
            reaper,
            made: AtomicU64::new(0),
        }
    }

    /// Starts a shell; with a terminal of these rows and columns, or none.
    ///
    /// # Errors
    /// `Unsupported` in a guest that is not to be entered.
    pub(crate) fn start(&self, terminal: Option<(u16, u16)>) -> io::Result<Shell> {
        let program = self.program.as_ref();
        let program = program.ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "the pod was started without one",
            )
        })?;
        let (streams, theirs) = match terminal {
            Some((rows, columns)) => {
                let (master, slave) = terminal_of(rows, columns)?;
                (Streams::Terminal(Fd::new(master)?), slave)
            }
            None => {
                let (ours, theirs) = StdStream::pair()?;
                ours.set_nonblocking(true)?;
                let ours = UnixStream::from_std(ours)?;
                (Streams::Socket(ours), OwnedFd::from(theirs))
            }
        };
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let path = self.layout.shell_cgroup(number);
        let all = All(Cgroup::create(path.clone())?);
        let mut command = Command::new(program);
        if terminal.is_some() {
            // A session of its own, of which the terminal is the controlling one.
            command.args(["setsid", "-c", "sh"]);
        } else {
            command.arg("sh");
        }
        command
            .args(["-c", LEAVE])
            .env_clear()
            .env("CGROUP", path)
            .env("HOME", "/")
            .env("TERM", "xterm")
            // What is in it are all tools.
            .env("PATH", program.parent().unwrap_or(program))
            .current_dir("/")
            .stdin(Stdio::from(theirs.try_clone()?))
            .stdout(Stdio::from(theirs.try_clone()?))
            .stderr(Stdio::from(theirs));
        let (process, _) = self.reaper.spawn(&mut command)?;
        info!(pid = %process.pid(), "a shell in the guest");
        Ok(Shell { streams, _all: all })
    }
}

impl Drop for All {
    fn drop(&mut self) {
        let cgroup = self.0.clone();
        tokio::spawn(async move {
            let ended = match cgroup.kill() {
                Ok(()) if cgroup.empty().await => cgroup.remove(),
                Ok(()) => Err(io::ErrorKind::TimedOut.into()),
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                warn!(%error, "end a shell");
            }
        });
    }
}

impl Shell {
    /// Moves bytes both ways until the shell ends or the host is gone.
    pub(crate) async fn relay(self, connection: Connection) -> io::Result<()> {
        match self.streams {
            Streams::Socket(socket) => dial::relay_for(connection, socket, LINGER).await,
            Streams::Terminal(terminal) => relay(connection, &terminal).await,
        }
    }
}

/// Relays a terminal. It has no end of file that could be passed on.
async fn relay(connection: Connection, terminal: &Fd) -> io::Result<()> {
    let (mut from_host, mut to_host) = split(connection);
    let up = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            match from_host.read(&mut buffer).await? {
                0 => return Ok(()),
                length => terminal.write_all(&buffer[..length]).await?,
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            match terminal.read(&mut buffer).await {
                // Nobody has it any more.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Ok(0) => break,
                Ok(length) => to_host.write_all(&buffer[..length]).await?,
                Err(error) => return Err(error),
            }
        }
        to_host.shutdown().await
    };
    tokio::select! {
        ended = up => ended,
        ended = down => ended,
    }
}

/// A new terminal: its master, and what a process gets of it.
fn terminal_of(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, size)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}
