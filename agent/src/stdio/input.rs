//! The input of a process, written by whichever connections there are.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{io::AsyncReadExt, sync::watch};

use super::{connection::Connection, fd::Fd};

/// The terminal's end-of-file character, Ctrl-D (termios(3), `VEOF`).
const END_OF_FILE: &[u8] = &[4];

/// What happens to the process's input when the host half-closes its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputEnd {
    /// The process sees the end of file.
    Closes,
    /// The input stays open for the next connection.
    Stays,
}

/// Where the host's bytes go.
#[derive(Debug)]
pub(crate) struct Input {
    sink: Mutex<Sink>,
    end: InputEnd,
    /// Whether the process's input was closed; all connections end then.
    closed: watch::Sender<bool>,
}

#[derive(Debug, Clone)]
enum Sink {
    /// The terminal is made by the process and arrives later.
    NotYet,
    Pipe(Arc<Fd>),
    Terminal(Arc<Fd>),
    Closed,
}

impl Input {
    /// Writes to `pipe`, or to a terminal that is set later.
    pub(crate) fn new(pipe: Option<Arc<Fd>>, end: InputEnd) -> Self {
        Self {
            sink: Mutex::new(pipe.map_or(Sink::NotYet, Sink::Pipe)),
            end,
            closed: watch::Sender::new(false),
        }
    }

    fn sink(&self) -> Sink {
        self.sink
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, sink: Sink) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    /// Uses `master` as the sink.
    pub(crate) fn set_terminal(&self, master: Arc<Fd>) {
        self.set(Sink::Terminal(master));
    }

    /// Closes the process's input for good.
    pub(crate) fn close(&self) {
        self.set(Sink::Closed);
        self.closed.send_replace(true);
    }

    /// Writes the bytes of `connection` to the process until their end.
    pub(crate) async fn serve(&self, mut connection: Connection) -> io::Result<()> {
        let mut closed = self.closed.subscribe();
        let copy = async {
            let mut chunk = vec![0; 16 << 10];
            loop {
                // A connection that breaks brings no more bytes either.
                let n = connection.read(&mut chunk).await.unwrap_or(0);
                match (self.sink(), n) {
                    (Sink::Closed, _) => return Ok(()),
                    (Sink::NotYet, 0) => return Ok(()),
                    (Sink::NotYet, _) => return Err(io::ErrorKind::NotConnected.into()),
                    (Sink::Pipe(_), 0) => {
                        if self.end == InputEnd::Closes {
                            self.close();
                        }
                        return Ok(());
                    }
                    (Sink::Terminal(master), 0) => {
                        if self.end == InputEnd::Closes {
                            master.write_all(END_OF_FILE).await?;
                        }
                        return Ok(());
                    }
                    (Sink::Pipe(fd) | Sink::Terminal(fd), n) => fd.write_all(&chunk[..n]).await?,
                }
            }
        };
        tokio::select! {
            result = copy => result,
            _ = closed.wait_for(|closed| *closed) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::OwnedFd};

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn pipe_input(end: InputEnd) -> (Input, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let fd = Fd::new(OwnedFd::from(writer)).unwrap();
        (Input::new(Some(Arc::new(fd)), end), reader)
    }

    async fn send(input: &Input, bytes: &[u8]) {
        let (mut ours, theirs) = tokio::io::duplex(100);
        let (served, ()) = tokio::join!(input.serve(Box::new(theirs)), async {
            ours.write_all(bytes).await.unwrap();
            ours.shutdown().await.unwrap();
        });
        served.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn half_close_is_end_of_file() {
        let (input, mut process) = pipe_input(InputEnd::Closes);
        send(&input, b"line\n").await;
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "line\n");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_input_that_stays_takes_the_next_connection() {
        let (input, mut process) = pipe_input(InputEnd::Stays);
        send(&input, b"one ").await;
        send(&input, b"two").await;
        input.close();
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "one two");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn several_connections_write_and_end_with_the_input() {
        let (input, mut process) = pipe_input(InputEnd::Closes);
        let (mut waiting, theirs) = tokio::io::duplex(100);
        waiting.write_all(b"one ").await.unwrap();
        let second = async {
            tokio::task::yield_now().await;
            send(&input, b"two").await;
        };
        let (served, ()) = tokio::join!(input.serve(Box::new(theirs)), second);
        served.unwrap();
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "one two");
        assert!(waiting.write_all(b"x").await.is_err());
    }
}
