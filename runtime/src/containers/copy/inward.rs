//! From here to a container.

use std::{
    fs,
    io::{self, Write},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use hull_streaming::client::Wants;

use super::{
    pack::pack,
    pipe::{self, Writer},
    place::{InContainer, Place},
    remote::{Links, Tar, check},
};

/// Copies to `target` in the container.
pub(super) async fn copy(
    tar: &Tar<'_>,
    source: &Place,
    target: &InContainer,
    links: Links,
) -> Result<()> {
    let (source, directory) = match source {
        Place::Here(path) => {
            let (name, directory) = destination(tar, path, target).await?;
            (Source::Path(path.clone(), name, links), directory)
        }
        _ => (Source::Standard, target.as_str().to_owned()),
    };
    let command = ["tar", "-xf", "-", "-C", &directory].map(str::to_owned);
    let wants = Wants {
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let mut session = tar.streams.exec(tar.id, command.to_vec(), wants).await?;
    let stdin = session.stdin.take();
    let (writer, mut pieces) = pipe::from_thread();
    let reading = tokio::task::spawn_blocking(move || source.give(writer));
    let send = async move {
        let Some(mut stdin) = stdin else { return };
        while let Some(bytes) = pieces.recv().await {
            // Who takes no more tells why when it ends.
            if stdin.send(bytes).await.is_err() {
                return;
            }
        }
        let _ = stdin.finish().await;
    };
    let (ended, (), read) = tokio::join!(session.end(), send, reading);
    match read.context("read what is to be copied")? {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => check(ended?),
        Err(error) => Err(error).context("read what is to be copied"),
        Ok(left_out) => {
            check(ended?)?;
            for left_out in left_out {
                eprintln!("hull: left out: {left_out}");
            }
            Ok(())
        }
    }
}

/// The name that the archive gives the source, and the directory that it is unpacked in.
async fn destination(
    tar: &Tar<'_>,
    source: &Path,
    target: &InContainer,
) -> Result<(PathBuf, String)> {
    let shown = source.display();
    let found = fs::metadata(source).or_else(|_| fs::symlink_metadata(source));
    let found = found.with_context(|| format!("look at {shown}"))?;
    let bytes = source.as_os_str().as_encoded_bytes();
    let content = found.is_dir() && (bytes == b"." || bytes.ends_with(b"/."));
    if bytes.ends_with(b"/") && !found.is_dir() {
        bail!("{shown} is no directory");
    }
    if is(tar, "-d", target).await? {
        let name = if content {
            PathBuf::from(".")
        } else {
            name_of(source)?
        };
        return Ok((name, target.as_str().to_owned()));
    }
    let path = target.as_str();
    if found.is_dir() && is(tar, "-e", target).await? {
        bail!("{path} is no directory in the container, and one is to be copied to it");
    }
    match target.split() {
        Some((parent, name)) if found.is_dir() || !target.says_directory() => {
            Ok((name.into(), parent.to_owned()))
        }
        _ => bail!("there is no directory {path} in the container"),
    }
}

/// Its own name, also where it is named by dots.
fn name_of(source: &Path) -> Result<PathBuf> {
    if let Some(Component::Normal(name)) = source.components().next_back() {
        return Ok(name.into());
    }
    let whole =
        fs::canonicalize(source).with_context(|| format!("look at {}", source.display()))?;
    // The root has no name.
    Ok(whole
        .file_name()
        .map_or_else(|| PathBuf::from("."), PathBuf::from))
}

/// Asks test(1) of the container.
async fn is(tar: &Tar<'_>, what: &str, path: &InContainer) -> Result<bool> {
    let command = ["test", what, path.as_str()].map(str::to_owned);
    let wants = Wants {
        stdout: true,
        stderr: true,
        ..Wants::default()
    };
    let session = tar.streams.exec(tar.id, command.to_vec(), wants).await?;
    let status = session.end().await?.status;
    let status = status.context("the daemon does not tell how the command ended")?;
    match (status.exit_code(), status.not_executed()) {
        (Some(code), _) => Ok(code == 0),
        (None, Some(127)) => bail!("there is no test(1) in the container, and cp needs it"),
        (None, _) => bail!("{}", status.message),
    }
}

/// Where the archive comes from.
enum Source {
    /// A path, the name that it gets, and what happens to links.
    Path(PathBuf, PathBuf, Links),
    Standard,
}

impl Source {
    /// Returns what was left out.
    fn give(self, writer: Writer) -> io::Result<Vec<String>> {
        let mut writer = io::BufWriter::with_capacity(64 << 10, writer);
        let left_out = match self {
            Self::Path(path, name, links) => pack(&path, &name, links, &mut writer)?,
            Self::Standard => {
                io::copy(&mut io::stdin().lock(), &mut writer)?;
                Vec::new()
            }
        };
        writer.flush()?;
        Ok(left_out)
    }
}
