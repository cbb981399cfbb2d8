//! CRI log files: `<time> <stdout|stderr> <P|F> <text>` per line.

use anyhow::{Context, Result, bail};

/// Which stream a piece of output was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// RFC 3339 with nanoseconds, as written.
    pub time: &'a str,
    /// Where it was written to.
    pub stream: Stream,
    /// The container's own line goes on in the next entry of this stream (tag `P`).
    pub partial: bool,
    /// The text, without a line end.
    pub text: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Parses a line, given without its line end.
    ///
    /// # Errors
    /// When it has not the form of a CRI log.
    pub fn parse(line: &'a [u8]) -> Result<Self> {
        let mut parts = line.splitn(4, |&byte| byte == b' ');
        let mut next = |what| {
            parts
                .next()
                .with_context(|| format!("log line has no {what}"))
        };
        let time = std::str::from_utf8(next("time")?).context("time of a log line")?;
        let stream = match next("stream")? {
            b"stdout" => Stream::Stdout,
            b"stderr" => Stream::Stderr,
            other => bail!("unknown stream {:?}", String::from_utf8_lossy(other)),
        };
        let partial = match next("tag")? {
            b"P" => true,
            b"F" => false,
            other => bail!("unknown tag {:?}", String::from_utf8_lossy(other)),
        };
        Ok(Self {
            time,
            stream,
            partial,
            text: next("text")?,
        })
    }
}

/// Gives back what the container wrote to `stream`.
///
/// # Errors
/// When a line has not the form of a CRI log.
pub fn output(file: &[u8], stream: Stream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for line in file.split_inclusive(|&byte| byte == b'\n') {
        let entry = Entry::parse(line.strip_suffix(b"\n").context("log ends within a line")?)?;
        if entry.stream == stream {
            bytes.extend_from_slice(entry.text);
            if !entry.partial {
                bytes.push(b'\n');
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_joined_and_streams_told_apart() {
        let file = b"2026-01-01T00:00:00.000000001Z stdout P one \n\
                     2026-01-01T00:00:00.000000002Z stderr F oops\n\
                     2026-01-01T00:00:00.000000003Z stdout F two\n\
                     2026-01-01T00:00:00.000000003Z stdout F \n";
        assert_eq!(output(file, Stream::Stdout).unwrap(), b"one two\n\n");
        assert_eq!(output(file, Stream::Stderr).unwrap(), b"oops\n");
    }

    #[test]
    fn other_text_is_refused() {
        for bad in ["", "x", "t stdin F x", "t stdout X x", "t stdout F"] {
            assert!(Entry::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(output(b"t stdout F cut", Stream::Stdout).is_err());
    }
}
