//! Which streams a session has.

use tokio::io::AsyncRead;

use hull_spec::{error::PodError, field::Field};

/// Output of a process; its end is the end of the output.
pub type SessionOutput = Box<dyn AsyncRead + Send + Unpin>;

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStreams {
    /// Input of the process.
    pub stdin: bool,
    /// Its output, or that of its terminal.
    pub stdout: bool,
    /// Its error output; never with a terminal.
    pub stderr: bool,
    /// It has a terminal.
    pub tty: bool,
}

impl SessionStreams {
    /// Refuses what no client can want.
    pub(super) fn check(self) -> Result<(), PodError> {
        if self.tty && self.stderr {
            return Err(PodError::invalid(
                Field::Stderr,
                "a terminal has no error output of its own",
            ));
        }
        if !(self.stdin || self.stdout || self.stderr) {
            return Err(PodError::invalid(Field::Streams, "none of them is wanted"));
        }
        Ok(())
    }
}
