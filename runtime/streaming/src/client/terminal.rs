//! A process's streams at our own: standard input, output and error output, and the terminal that they
//! may be.

use std::io::{self, IsTerminal, Read};

use bytes::Bytes;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::{
    command::{Session, Wants},
    detach::Keys,
    error::ClientError,
};
use crate::{channel::Input, output::Output};

/// How much is read at a time.
const CHUNK: usize = 32 << 10;

/// Why a person is back at the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The output has ended, and with it the process, or the connection.
    Ended,
    /// The detach keys were typed. The process goes on.
    Detached,
}

/// Whether a process that is detached from with keys goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detach {
    /// Ctrl-P Ctrl-Q at a terminal leaves it.
    Keys,
    /// All that is typed is its own.
    Never,
}

/// Passes our input to a process and shows what it writes, until one of them has had enough. A
/// terminal is raw meanwhile, and as it was before afterwards, also when this future is dropped.
///
/// # Errors
/// [`ClientError::Own`], when our streams fail.
pub async fn interact(
    session: &mut Session,
    wants: Wants,
    detach: Detach,
) -> Result<Left, ClientError> {
    let at_terminal = wants.stdin && wants.tty && io::stdin().is_terminal();
    let _raw = if at_terminal { Some(Raw::set()?) } else { None };
    let keys = (at_terminal && detach == Detach::Keys).then(Keys::default);
    let stdin = session.stdin.take();
    let (stdout, stderr) = (session.stdout.take(), session.stderr.take());
    let input = async {
        match stdin {
            Some(stdin) => feed(stdin, keys).await,
            None => Ok(Left::Ended),
        }
    };
    let output = async {
        tokio::try_join!(
            show(stdout, tokio::io::stdout()),
            show(stderr, tokio::io::stderr()),
        )
    };
    tokio::pin!(input, output);
    let has_size = wants.tty && io::stdout().is_terminal();
    let mut window =
        signal(SignalKind::window_change()).map_err(own("watch the terminal's size"))?;
    let mut typing = true;
    let mut sized = false;
    loop {
        if has_size && !sized {
            let size = tcgetwinsize(io::stdout())
                .map_err(|error| own("ask for the terminal's size")(error.into()))?;
            // Its output tells of a process that is gone.
            let _ = session.resize(size.ws_col, size.ws_row).await;
            sized = true;
        }
        tokio::select! {
            done = &mut output => {
                done?;
                return Ok(Left::Ended);
            }
            left = &mut input, if typing => match left? {
                Left::Detached => return Ok(Left::Detached),
                Left::Ended => typing = false,
            },
            _ = window.recv() => sized = false,
        }
    }
}

/// Passes our input to what takes bytes, and shows those that come from it, to their end. At a terminal that is
/// raw meanwhile, Ctrl-P Ctrl-Q ends it too.
///
/// # Errors
/// [`ClientError::Own`], when our streams fail.
pub async fn relay(
    with: impl AsyncRead + AsyncWrite,
    at_terminal: bool,
) -> Result<Left, ClientError> {
    let _raw = if at_terminal { Some(Raw::set()?) } else { None };
    let mut keys = at_terminal.then(Keys::default);
    let (mut from, mut to) = split(with);
    let up = async {
        let mut input = input();
        while let Some(bytes) = input.recv().await {
            let bytes = bytes.map_err(own("read standard input"))?;
            let (bytes, left) = match &mut keys {
                Some(keys) => keys.pass(&bytes),
                None => (bytes, false),
            };
            // What comes tells of one that takes no more.
            if left || to.write_all(&bytes).await.is_err() {
                return Ok::<_, ClientError>(left);
            }
        }
        let _ = to.shutdown().await;
        Ok(false)
    };
    let down = async {
        let (mut buffer, mut out) = (vec![0; CHUNK], tokio::io::stdout());
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let written = async {
                out.write_all(&buffer[..length]).await?;
                out.flush().await
            };
            written.await.map_err(own("write output"))?;
        }
        Ok(Left::Ended)
    };
    tokio::pin!(up, down);
    tokio::select! {
        left = &mut up => if left? {
            return Ok(Left::Detached);
        },
        ended = &mut down => return ended,
    }
    down.await
}

/// Passes our input on to its end and says so, or to the keys that detach.
///
/// # Errors
/// [`ClientError::Own`], when our input can't be read.
pub async fn feed(mut to: Output, mut keys: Option<Keys>) -> Result<Left, ClientError> {
    let mut input = input();
    while let Some(bytes) = input.recv().await {
        let bytes = bytes.map_err(own("read standard input"))?;
        let (bytes, detached) = match &mut keys {
            Some(keys) => keys.pass(&bytes),
            None => (bytes, false),
        };
        // Its output tells of a process that takes no more.
        if to.send(bytes).await.is_err() {
            return Ok(Left::Ended);
        }
        if detached {
            return Ok(Left::Detached);
        }
    }
    let _ = to.finish().await;
    Ok(Left::Ended)
}

/// What comes from standard input. Nobody waits for the thread that reads: a read can't be given up.
fn input() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            let piece = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => Ok(Bytes::copy_from_slice(&buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

/// Copies to the end. A WebSocket has no end of single streams: it is the connection's.
async fn show(from: Option<Input>, mut to: impl AsyncWrite + Unpin) -> Result<(), ClientError> {
    let Some(mut from) = from else {
        return Ok(());
    };
    while let Ok(Some(bytes)) = from.recv().await {
        let written = async {
            to.write_all(&bytes).await?;
            to.flush().await
        };
        written.await.map_err(own("write output"))?;
    }
    Ok(())
}

fn own(action: &'static str) -> impl FnOnce(io::Error) -> ClientError {
    move |source| ClientError::Own { action, source }
}

/// Our terminal, without line editing and echo; as it was when dropped.
#[derive(Debug)]
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self, ClientError> {
        let failed = |error: rustix::io::Errno| own("set the terminal")(error.into());
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Whoever closed our terminal does not need it.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
