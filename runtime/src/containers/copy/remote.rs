//! The `tar` of a container.

use anyhow::{Result, bail};
use hull_base::printable::one_line;
use hull_streaming::client::Ended;

use crate::containers::streams::Streams;

/// Most characters that are told of what the container's `tar` says.
const SAID: usize = 300;

/// What happens to links at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    Kept,
    Followed,
}

/// A container and its `tar`.
pub(super) struct Tar<'a> {
    pub(super) streams: &'a Streams,
    pub(super) id: &'a str,
}

/// Refuses what did not go well in the container.
pub(super) fn check(ended: Ended) -> Result<()> {
    let Some(status) = ended.status else {
        bail!("the daemon does not tell how the command in the container ended");
    };
    if status.not_executed() == Some(127) {
        bail!("there is no tar in the container, and nothing can be copied without it");
    }
    match status.exit_code() {
        Some(0) => Ok(()),
        Some(code) => {
            let said = String::from_utf8_lossy(&ended.stderr);
            bail!(
                "the container's tar ended with {code}: {}",
                one_line(&said, SAID)
            )
        }
        None => bail!("{}", status.message),
    }
}
