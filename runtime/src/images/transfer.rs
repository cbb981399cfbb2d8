//! Archives on their way between a file and the daemon.

use std::{
    fs::{self, File},
    io::{self, IsTerminal, Read, Write},
    path::Path,
};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use hull_proto_images::PIECE;
use hull_proto_images::v1::{ExportRequest, ImportRequest, Piece};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::progress::{self, Show};
use crate::client::{Client, refused};

/// Stands for standard input or output.
const STANDARD: &str = "-";

/// Sends an archive; returns the ids of its images.
pub(super) async fn import(
    client: &Client,
    file: &Path,
    name: String,
    show: Show,
) -> Result<Vec<String>> {
    let source: Box<dyn Read + Send> = if file == Path::new(STANDARD) {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(file).with_context(|| format!("open {}", file.display()))?)
    };
    let (sender, requests) = mpsc::channel(2);
    let (failed, failure) = oneshot::channel();
    // A thread that nobody waits for: a read of standard input can't be given up.
    std::thread::spawn(move || {
        if let Err(error) = send(source, name, &sender) {
            // While the archive goes on: its end brings an answer, which is not the cause.
            let _ = failed.send(error);
        }
    });
    // Dropped with this call, it ends the stream, whatever the thread waits for.
    let (_waited_for, given_up) = oneshot::channel::<()>();
    let requests = ReceiverStream::new(requests).take_until(given_up);
    let receive = async {
        let mut images = client.images.clone();
        let answer = images.import(requests).await;
        let messages = answer.map_err(refused("import"))?.into_inner();
        progress::follow(messages, show, "import").await
    };
    tokio::select! {
        biased;
        // Without an error the thread has sent all.
        Ok(error) = failure => Err(error).context("read the archive"),
        ids = receive => ids,
    }
}

fn send(
    mut source: impl Read,
    mut name: String,
    sender: &mpsc::Sender<ImportRequest>,
) -> io::Result<()> {
    loop {
        let mut data = Vec::with_capacity(PIECE);
        let count = source.by_ref().take(PIECE as u64).read_to_end(&mut data)?;
        let request = ImportRequest {
            name: std::mem::take(&mut name),
            data,
        };
        // A daemon that takes no more has answered already, and that answer counts.
        if sender.blocking_send(request).is_err() || count == 0 {
            return Ok(());
        }
    }
}

/// Writes an archive of images. A file is there as a whole or not at all.
pub(super) async fn export(client: &Client, images: Vec<String>, output: &Path) -> Result<()> {
    if output == Path::new(STANDARD) && io::stdout().is_terminal() {
        bail!("an archive is nothing for a terminal: name a file, or redirect the output");
    }
    let mut service = client.images.clone();
    let answer = service.export(ExportRequest { images }).await;
    let pieces = answer.map_err(refused("export"))?.into_inner();
    if output == Path::new(STANDARD) {
        return receive(pieces, &mut io::stdout(), output).await;
    }
    // What a link leads to is replaced, not the link.
    let path = fs::canonicalize(output).unwrap_or_else(|_| output.to_owned());
    if path.exists() && !path.is_file() {
        let device = File::options().write(true).open(&path);
        let mut device = device.with_context(|| format!("open {}", output.display()))?;
        return receive(pieces, &mut device, output).await;
    }
    let failed = || format!("write {}", output.display());
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(failed)?;
    receive(pieces, &mut file, output).await?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(&path).with_context(failed)?;
    Ok(())
}

async fn receive(mut pieces: Streaming<Piece>, out: &mut impl Write, output: &Path) -> Result<()> {
    let failed = || format!("write {}", output.display());
    while let Some(piece) = pieces.message().await.map_err(refused("export"))? {
        out.write_all(&piece.data).with_context(failed)?;
    }
    out.flush().with_context(failed)
}
