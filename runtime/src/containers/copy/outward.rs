//! From a container to here.

use std::{
    fs,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use hull_streaming::client::Wants;

use super::{
    pipe,
    place::{InContainer, Place},
    remote::{Links, Tar, check},
    unpack::{Kind, Unpack},
};

/// Copies what is at `source` in the container.
pub(super) async fn copy(
    tar: &Tar<'_>,
    source: &InContainer,
    target: &Place,
    links: Links,
) -> Result<()> {
    let sink = Sink::new(source, target)?;
    let mut command = vec![
        "tar",
        if links == Links::Followed {
            "-chf"
        } else {
            "-cf"
        },
        "-",
        "-C",
    ];
    let named;
    match source.split() {
        Some((parent, name)) => {
            named = format!("./{name}");
            command.extend([parent, &named]);
        }
        None => command.extend([source.as_str(), "."]),
    }
    let wants = Wants {
        stdout: true,
        stderr: true,
        ..Wants::default()
    };
    let command = command.into_iter().map(str::to_owned).collect();
    let mut session = tar.streams.exec(tar.id, command, wants).await?;
    let mut stdout = session.stdout.take();
    let (sender, reader) = pipe::to_thread();
    let writing = tokio::task::spawn_blocking(move || sink.take(reader));
    let receive = async move {
        let Some(stdout) = &mut stdout else {
            return Ok(());
        };
        loop {
            tokio::select! {
                // An archive that makes no sense may have no end either.
                () = sender.closed() => bail!(NotTaken),
                bytes = stdout.recv() => match bytes {
                    Ok(Some(bytes)) => drop(sender.send(bytes).await),
                    // Whether it was all, the command's end tells.
                    _ => return Ok(()),
                },
            }
        }
    };
    // Without it, the session goes with this call, and the command with it.
    let ended = tokio::try_join!(receive, async { Ok(session.end().await?) });
    let written = writing.await.context("write what comes")?;
    match ended {
        // Why an archive ends too early is known in the container.
        Ok(((), ended)) => check(ended).and(written),
        Err(error) if error.is::<NotTaken>() => written,
        Err(error) => Err(error),
    }
}

/// Why is told by what should take it.
#[derive(Debug, thiserror::Error)]
#[error("the archive is not taken")]
struct NotTaken;

/// What becomes of the archive.
enum Sink {
    Files(Unpack),
    Standard,
}

impl Sink {
    fn new(source: &InContainer, target: &Place) -> Result<Self> {
        let Place::Here(target) = target else {
            if io::stdout().is_terminal() {
                bail!("an archive is nothing for a terminal: redirect the output");
            }
            return Ok(Self::Standard);
        };
        let content = source.says_content();
        let name = source.split().map(|(_, name)| PathBuf::from(name));
        let shown = target.display();
        match fs::metadata(target) {
            Ok(found) if found.is_dir() => Ok(Self::Files(Unpack::new(
                target,
                name.clone(),
                name,
                Kind::Any,
            )?)),
            Ok(_) if content || source.says_directory() => {
                bail!("{shown} is no directory, and one is to be copied to it")
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if content {
                    fs::create_dir(target).with_context(|| format!("make {shown}"))?;
                    return Ok(Self::Files(Unpack::new(target, None, None, Kind::Any)?));
                }
                let says_directory = target.as_os_str().as_encoded_bytes().ends_with(b"/");
                let kind = if says_directory {
                    Kind::Directory
                } else {
                    Kind::Any
                };
                Self::renamed(target, name, kind)
            }
            Ok(_) => Self::renamed(target, name, Kind::File),
            Err(error) => Err(error).with_context(|| format!("look at {shown}")),
        }
    }

    /// With the name of the target.
    fn renamed(target: &Path, name: Option<PathBuf>, kind: Kind) -> Result<Self> {
        let shown = target.display();
        let own = target
            .file_name()
            .with_context(|| format!("{shown} is no name"))?;
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        Ok(Self::Files(Unpack::new(
            parent,
            name,
            Some(own.into()),
            kind,
        )?))
    }

    fn take(self, mut archive: impl Read) -> Result<()> {
        match self {
            Self::Files(unpack) => {
                for left_out in unpack.run(&mut archive)? {
                    eprintln!("hull: left out: {left_out}");
                }
            }
            Self::Standard => {
                let mut out = io::stdout().lock();
                let copied = io::copy(&mut archive, &mut out).and_then(|_| out.flush());
                copied.context("write to standard output")?;
            }
        }
        Ok(())
    }
}
