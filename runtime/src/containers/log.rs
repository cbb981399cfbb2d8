//! Prints a CRI log file while it grows: `<time> <stdout|stderr> <P|F> <text>`.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use hull_base::blocking;
use tokio::{fs::File, io::AsyncReadExt, sync::watch};

/// How often a file that has not grown is looked at.
const POLL: Duration = Duration::from_millis(20);

/// What of a log is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Show {
    /// Tell when each line was written.
    pub(crate) timestamps: bool,
    /// Begin so many lines before the end; none: at the beginning.
    pub(crate) tail: Option<u64>,
}

/// Prints what comes until the sender of `ended` is dropped and the file is read to its end. A file
/// that another one takes the place of, as when logs are rotated, is read to its end before that.
pub(crate) async fn follow(
    path: PathBuf,
    mut ended: watch::Receiver<()>,
    show: Show,
) -> Result<()> {
    let Some(mut file) = appeared(&path, &mut ended).await? else {
        return Ok(());
    };
    if let Some(lines) = show.tail {
        file = skip(file, lines)
            .await
            .with_context(|| format!("read {}", path.display()))?;
    }
    let mut lines = Lines::new(show.timestamps);
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Asked before reading: what was written before the end is read after it.
        let last = ended.has_changed().is_err();
        let replaced = is_replaced(&file, &path).await;
        let count = file
            .read(&mut buffer)
            .await
            .with_context(|| format!("read {}", path.display()))?;
        if count > 0 {
            lines.feed(&buffer[..count], print)?;
        } else if replaced {
            file = File::open(&path)
                .await
                .with_context(|| format!("open {}", path.display()))?;
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

/// The file, as soon as it is there. A container that could not be started may have none.
async fn appeared(path: &Path, ended: &mut watch::Receiver<()>) -> Result<Option<File>> {
    loop {
        let last = ended.has_changed().is_err();
        match File::open(path).await {
            Ok(file) => return Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && last => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tokio::time::sleep(POLL).await;
            }
            Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
        }
    }
}

/// Whether another file is at the path now.
async fn is_replaced(file: &File, path: &Path) -> bool {
    match (file.metadata().await, tokio::fs::metadata(path).await) {
        (Ok(old), Ok(new)) => (old.dev(), old.ino()) != (new.dev(), new.ino()),
        _ => false,
    }
}

/// Skips all but the last lines.
async fn skip(file: File, lines: u64) -> io::Result<File> {
    let mut file = file.into_std().await;
    let file = blocking(move || {
        let start = start_of_last(BufReader::new(&file), lines)?;
        file.seek(SeekFrom::Start(start)).map(|_| file)
    });
    Ok(File::from_std(file.await?))
}

/// Where the last lines of a log begin: the container's own, which may take several of the log's.
fn start_of_last(mut log: impl BufRead, lines: u64) -> io::Result<u64> {
    let mut starts = VecDeque::new();
    let (mut at, mut begins) = (0, true);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = log.read_until(b'\n', &mut line)?;
        if length == 0 {
            break;
        }
        if begins {
            starts.push_back(at);
            if starts.len() as u64 > lines {
                starts.pop_front();
            }
        }
        at += length as u64;
        begins = !parse(&line).is_some_and(|entry| entry.goes_on);
    }
    Ok(starts.front().copied().unwrap_or(at))
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
    timestamps: bool,
    /// Whether a line of standard output, and one of standard error, goes on.
    within: [bool; 2],
}

impl Lines {
    fn new(timestamps: bool) -> Self {
        Self {
            timestamps,
            ..Self::default()
        }
    }

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
            let entry = parse(line)
                .with_context(|| format!("parse log line {:?}", String::from_utf8_lossy(line)))?;
            let within = &mut self.within[entry.stream as usize];
            if self.timestamps && !*within {
                out(entry.stream, &[entry.time, b" "].concat()).context("write output")?;
            }
            *within = entry.goes_on;
            out(entry.stream, entry.text).context("write output")?;
        }
        self.rest = rest;
        Ok(())
    }
}

/// A line of a log.
struct Entry<'a> {
    time: &'a [u8],
    stream: Stream,
    /// The container's own line goes on in the next one of this stream (`P`).
    goes_on: bool,
    /// With the line end, unless it goes on.
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |&byte| byte == b' ');
    let time = parts.next()?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let goes_on = parts.next()? == b"P";
    let text = parts.next()?;
    let text = if goes_on {
        text.strip_suffix(b"\n")?
    } else {
        text
    };
    Some(Entry {
        time,
        stream,
        goes_on,
        text,
    })
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
        let path = directory.path().join("none");
        follow(path, ended, Show::default()).await.unwrap();
    }

    #[test]
    fn each_line_is_told_its_time_once() {
        let file = b"t1 stdout P one \nt2 stderr F oops\nt3 stdout F two\nt4 stdout F x\n";
        let mut all = Vec::new();
        let mut lines = Lines::new(true);
        let out = |_, bytes: &[u8]| {
            all.extend_from_slice(bytes);
            Ok(())
        };
        lines.feed(file, out).unwrap();
        assert_eq!(all, b"t1 one t2 oops\ntwo\nt4 x\n");
    }

    #[test]
    fn the_last_lines_are_those_of_the_container() {
        let file: &[u8] = b"t stdout F a\nt stdout P b\nt stdout F b\nt stdout F c\n";
        for (lines, start) in [(0, 52), (1, 39), (2, 13), (3, 0), (9, 0)] {
            assert_eq!(start_of_last(file, lines).unwrap(), start, "{lines}");
        }
        assert_eq!(file.len(), 52);
        assert_eq!(start_of_last(&b""[..], 3).unwrap(), 0);
    }

    #[tokio::test]
    async fn a_file_is_read_to_its_end_and_then_the_one_that_took_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, "t stdout F one\n").unwrap();
        let old = File::open(&path).await.unwrap();
        assert!(!is_replaced(&old, &path).await);
        std::fs::rename(&path, directory.path().join("log.1")).unwrap();
        assert!(!is_replaced(&old, &path).await);
        std::fs::write(&path, "t stdout F two\n").unwrap();
        assert!(is_replaced(&old, &path).await);
    }
}
