//! Bytes between a thread that blocks and a session.

use std::io::{self, Read, Write};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

/// Pieces that wait.
const AHEAD: usize = 4;

/// A pipe to read from on a thread.
pub(super) fn to_thread() -> (mpsc::Sender<Bytes>, Reader) {
    let (sender, pieces) = mpsc::channel(AHEAD);
    let current = Bytes::new();
    (sender, Reader { pieces, current })
}

/// A pipe to write to on a thread.
pub(super) fn from_thread() -> (Writer, mpsc::Receiver<Bytes>) {
    let (sender, pieces) = mpsc::channel(AHEAD);
    (Writer(sender), pieces)
}

/// What the session sent.
pub(super) struct Reader {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// What the session is to send.
pub(super) struct Writer(mpsc::Sender<Bytes>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
