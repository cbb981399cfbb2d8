//! How far a pull or import is, shown to a person.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use hull_proto_images::v1::{Progress, PullRequest};
use tonic::Streaming;

use crate::{
    client::{Client, refused},
    table::size,
};

/// How often a log is told.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Where progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Nowhere.
    Nothing,
    /// One line that changes.
    Terminal,
    /// A line now and then.
    Log,
}

impl Show {
    /// What suits standard error.
    pub(crate) fn unless(quiet: bool) -> Self {
        if quiet {
            Self::Nothing
        } else if io::stderr().is_terminal() {
            Self::Terminal
        } else {
            Self::Log
        }
    }
}

/// Pulls an image; returns its id.
pub(crate) async fn pull(client: &Client, request: PullRequest, show: Show) -> Result<String> {
    let answer = client.images.clone().pull(request).await;
    let messages = answer.map_err(refused("pull"))?.into_inner();
    let ids = follow(messages, show, "pull").await?;
    let id = ids.into_iter().next();
    id.ok_or_else(|| anyhow!("pull: the daemon named no image"))
}

/// Shows messages as they come; returns the ids in the last one.
pub(super) async fn follow(
    mut messages: Streaming<Progress>,
    show: Show,
    action: &'static str,
) -> Result<Vec<String>> {
    let mut line = Line::new(show, io::stderr());
    let mut ids = Vec::new();
    while let Some(progress) = messages.message().await.map_err(refused(action))? {
        if let Some(text) = text(&progress) {
            line.show(text);
        }
        ids = progress.image_ids;
    }
    Ok(ids)
}

/// `None` as long as nothing is known.
fn text(progress: &Progress) -> Option<String> {
    let (done, all) = (size(progress.bytes_done), size(progress.bytes));
    if progress.layers == 0 {
        return (progress.bytes_done > 0).then(|| format!("read {done} of the archive"));
    }
    let layers = format!("layers {}/{}", progress.layers_done, progress.layers);
    if progress.bytes == 0 {
        return Some(layers);
    }
    Some(format!("{layers}, {done} of {all}"))
}

/// What is shown at present. At its end the last of it is there to read.
struct Line<W: Write> {
    show: Show,
    out: W,
    last: String,
    /// When something was shown, and whether that was the last.
    at: Option<Instant>,
    pending: bool,
}

impl<W: Write> Line<W> {
    fn new(show: Show, out: W) -> Self {
        Self {
            show,
            out,
            last: String::new(),
            at: None,
            pending: false,
        }
    }

    fn show(&mut self, text: String) {
        if text == self.last {
            return;
        }
        self.last = text;
        self.pending = true;
        let due = self.at.is_none_or(|at| at.elapsed() >= LOG_EVERY);
        if due || self.show == Show::Terminal {
            self.write();
        }
    }

    fn write(&mut self) {
        // Progress that cannot be shown is no reason to end.
        let _ = match self.show {
            Show::Nothing => Ok(()),
            Show::Terminal => write!(self.out, "\r\x1b[K{}", self.last),
            Show::Log => writeln!(self.out, "hull: {}", self.last),
        };
        self.at = Some(Instant::now());
        self.pending = false;
    }
}

impl<W: Write> Drop for Line<W> {
    fn drop(&mut self) {
        if self.pending {
            self.write();
        }
        if self.show == Show::Terminal && self.at.is_some() {
            let _ = writeln!(self.out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_as_soon_as_something_is_known() {
        let mut progress = Progress::default();
        assert_eq!(text(&progress), None);
        progress.bytes_done = 1 << 20;
        assert_eq!(text(&progress).unwrap(), "read 1.0 MiB of the archive");
        progress.layers = 3;
        progress.layers_done = 1;
        progress.bytes = 3 << 20;
        assert_eq!(text(&progress).unwrap(), "layers 1/3, 1.0 MiB of 3.0 MiB");
        // Every layer is on the node.
        progress.bytes = 0;
        assert_eq!(text(&progress).unwrap(), "layers 1/3");
    }

    fn shown(show: Show) -> String {
        let mut out = Vec::new();
        let mut line = Line::new(show, &mut out);
        for text in ["one", "two", "two", "three"] {
            line.show(text.to_owned());
        }
        drop(line);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_log_gets_the_first_and_the_last_a_terminal_each_once() {
        assert_eq!(shown(Show::Nothing), "");
        assert_eq!(shown(Show::Log), "hull: one\nhull: three\n");
        let expected = "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[Kthree\n";
        assert_eq!(shown(Show::Terminal), expected);
    }
}
