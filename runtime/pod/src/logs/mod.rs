//! Log files in CRI's format: `<RFC 3339 time> <stdout|stderr> <F|P> <content>`.
//!
//! ```text
//! agent ──bytes──▶ Output ──▶ LineSplitter ──▶ LogFile ──▶ acknowledge ──▶ agent forgets them
//! ```
//!
//! A copy of the bytes goes to attached clients before they are written ([`fanout`]). All outputs of a
//! pod together get a bounded part of the daemon's time ([`share`]).
//!
//! Nothing is lost or doubled, also when the daemon is killed at any point. A batch of whole
//! lines is (1) appended to the log file, (2) noted in the position file: length of the log and
//! bytes of each output in it, (3) acknowledged to the agent. After a restart the log is cut back
//! to the noted length (a batch that was written but not noted was not acknowledged either), and
//! each output is asked for from its noted byte on. The position file lives as long as the VM: in
//! the pod's run directory.
//!
//! A rotator renames the file and asks for a new one. Until then lines go on into the renamed
//! file; when it was renamed while the daemon was down, the cut is made in the renamed file.

pub(crate) mod fanout;
pub(crate) mod file;
pub(crate) mod line;
pub(crate) mod pump;
pub(crate) mod share;

use std::{io, path::PathBuf};

/// Why a log can't be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}
