//! Prints a CRI log file while it grows: `<time> <stdout|stderr> <P|F> <text>`.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{fs::File, io::AsyncReadExt, sync::watch};

/// How often a file that has not grown is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Prints what comes until the sender of `ended` is dropped and the file is read to its end.
pub(super) async fn follow(path: PathBuf, mut ended: watch::Receiver<()>) -> Result<()> {
    let mut file = loop {
        match File::open(&path).await {
            Ok(file) => break file,
            // A container that could not be started may have no log.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if ended.has_changed().is_err() {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            }
            Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
        }
    };
    let mut lines = Lines::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Asked before reading: what was written before the end is read after it.
        let last = ended.has_changed().is_err();
        let count = file
            .read(&mut buffer)
            .await
            .with_context(|| format!("read {}", path.display()))?;
        if count > 0 {
            lines.feed(&buffer[..count], print)?;
        } else if last {
            return Ok(());
        } else {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                _ = ended.changed() => {}
            }
        }
    }
}

/// Which of our streams a piece of output goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

fn print(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    let write = |mut out: Box<dyn Write>| out.write_all(bytes).and_then(|()| out.flush());
    match stream {
        Stream::Stdout => write(Box::new(io::stdout().lock())),
        Stream::Stderr => write(Box::new(io::stderr().lock())),
    }
}

/// Cuts a growing file into lines.
#[derive(Debug, Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn feed(
        &mut self,
        bytes: &[u8],
        mut out: impl FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<()> {
        self.rest.extend_from_slice(bytes);
        let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') else {
            return Ok(());
        };
        let rest = self.rest.split_off(end + 1);
        for line in self.rest.split_inclusive(|&byte| byte == b'\n') {
            let (stream, text) = parse(line)
                .with_context(|| format!("parse log line {:?}", String::from_utf8_lossy(line)))?;
            out(stream, text).context("write output")?;
        }
        self.rest = rest;
        Ok(())
    }
}

/// The text of a line, with its line end unless the container's own line goes on (`P`).
fn parse(line: &[u8]) -> Option<(Stream, &[u8])> {
    let mut parts = line.splitn(4, |&byte| byte == b' ');
    let _time = parts.next()?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let partial = parts.next()? == b"P";
    let text = parts.next()?;
    let text = if partial {
        text.strip_suffix(b"\n")?
    } else {
        text
    };
    Some((stream, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_put_together_however_they_come() {
        let file: &[u8] = b"t stdout P one \nt stderr F oops\nt stdout F two\nt stdout F \n";
        for size in [1, 5, 16, file.len()] {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            let mut lines = Lines::default();
            for chunk in file.chunks(size) {
                lines
                    .feed(chunk, |stream, bytes| {
                        match stream {
                            Stream::Stdout => stdout.extend_from_slice(bytes),
                            Stream::Stderr => stderr.extend_from_slice(bytes),
                        }
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(stdout, b"one two\n\n");
            assert_eq!(stderr, b"oops\n");
        }
    }

    #[test]
    fn other_text_is_refused() {
        let mut lines = Lines::default();
        assert!(lines.feed(b"hello\n", |_, _| Ok(())).is_err());
    }

    #[tokio::test]
    async fn a_log_that_never_came_ends_with_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let (exited, ended) = watch::channel(());
        drop(exited);
        follow(directory.path().join("none"), ended).await.unwrap();
    }
}
