//! Memory that is written for a checkpoint while the VM goes on, and what it writes to meanwhile.

use std::{fs::File, io, ops::Range, os::fd::OwnedFd, time::Duration};

use hull_proto_vmm::CopiedMemory;

use hull_base::blocking;
use hull_spec::error::PodError;
use hull_vm::{pagemap, running::RunningVm};

use super::aside::{self, Aside};

/// How long the VM may take to write its memory.
pub(crate) const LONGEST: Duration = Duration::from_secs(60);
/// The most parts of memory that are named to a VMM: its messages have room for some more.
const MOST_PARTS: usize = 8192;

/// A checkpoint whose memory was written while the VM went on, if the kernel notes what is written to.
#[derive(Debug)]
pub(crate) struct Ahead {
    pub aside: Aside,
    pub state: File,
    pub memory: File,
    pub scratch: File,
    /// The VMM's process, and where in its memory stands what is in the file.
    pub copied: Option<(u32, Vec<CopiedMemory>)>,
}

/// Makes the files of a checkpoint, and writes memory as far as that helps. What fails of the latter is done
/// while the VM stands still.
///
/// # Errors
/// When the files can't be made.
pub(crate) async fn copy(
    vm: &RunningVm,
    process: Option<u32>,
    aside: Aside,
) -> Result<Ahead, PodError> {
    let ahead = blocking(move || {
        aside.make()?;
        let file = |name| aside.file(name);
        Ok::<_, PodError>(Ahead {
            state: file(aside::STATE)?,
            memory: file(aside::MEMORY)?,
            scratch: file(aside::SCRATCH)?,
            copied: None,
            aside,
        })
    });
    let mut ahead = ahead.await?;
    let Some(process) = process else {
        return Ok(ahead);
    };
    let begun =
        blocking(move || pagemap::notes_writes() && pagemap::forget_writes(process).is_ok());
    if !begun.await {
        return Ok(ahead);
    }
    let emptied = |e| PodError::internal("use the file of a checkpoint", e);
    let file = ahead.memory.try_clone().map_err(emptied)?;
    match vm.control.copy(file.into(), LONGEST).await {
        Ok(parts) => ahead.copied = Some((process, parts)),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(pod = %vm.pod, error, "all memory is written while the VM stands still");
            // It may have begun.
            ahead.memory.set_len(0).map_err(emptied)?;
        }
    }
    Ok(ahead)
}

/// What a VM that stands still has written to since its memory was; none: all is to be written, to an empty file.
/// The guest has at most `bytes` of memory.
///
/// # Errors
/// When the file can't be used.
pub(crate) async fn changed(
    memory: File,
    copied: Option<(u32, Vec<CopiedMemory>)>,
    bytes: u64,
) -> Result<(OwnedFd, Option<Vec<Range<u64>>>), PodError> {
    let Some((process, parts)) = copied else {
        return Ok((memory.into(), None));
    };
    let found = blocking(move || {
        let found = pagemap::written(process, &parts, bytes, MOST_PARTS);
        if found.is_err() {
            memory.set_len(0)?;
        }
        Ok::<_, io::Error>((memory, found))
    });
    let failed = |e| PodError::internal("use the file of a checkpoint", e);
    let (memory, found) = found.await.map_err(failed)?;
    match &found {
        Ok(parts) => {
            let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
            tracing::debug!(bytes, parts = parts.len(), "memory that is written again");
        }
        Err(error) => tracing::warn!(%error, "what was written to is not known"),
    }
    Ok((memory.into(), found.ok()))
}
