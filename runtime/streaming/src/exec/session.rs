//! A process and its client, from start to status.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::debug;

use super::{
    resize::resize,
    status::{Outcome, Status},
};
use crate::{
    backend::{Backend, BackendError, Exit, Process},
    channel::{Input, Lost},
    output::Output,
    request::Command,
};

/// How much output is read at a time.
const CHUNK: usize = 16 << 10;

/// The client's side of a session.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) stdin: Option<Input>,
    pub(super) stdout: Option<Output>,
    pub(super) stderr: Option<Output>,
    pub(super) resize: Option<Input>,
    pub(super) error: Output,
    pub(super) json_status: bool,
}

/// Gets the process and serves its streams to the end.
pub(super) async fn run(backend: &dyn Backend, command: &Command, mut client: Client) {
    let started = match command {
        Command::Exec(request) => backend.exec(request.clone()).await,
        Command::Attach(request) => backend.attach(request.clone()).await,
    };
    let exit = match started {
        Ok(process) => serve(process, &mut client).await,
        Err(error) => Err(error),
    };
    let outcome = match (exit, command) {
        (Ok(Exit::Code(code)), Command::Exec(_)) => Outcome::of_code(code),
        // How the container ends is in its status.
        (Ok(_), _) => Outcome::Success,
        (Err(error), _) => Outcome::Failure(error),
    };
    debug!(?outcome, "ended");
    let status = Status::new(outcome);
    // Who is gone needs no status.
    let _ = finish(&mut client, &status).await;
}

/// Output ends before the status, also of what never began.
async fn finish(client: &mut Client, status: &Status) -> Result<(), Lost> {
    for output in [&mut client.stdout, &mut client.stderr]
        .into_iter()
        .flatten()
    {
        // The client may have ended one stream and still want the status.
        let _ = output.finish().await;
    }
    let text = status.text(client.json_status);
    if !text.is_empty() {
        client.error.send(Bytes::from(text)).await?;
    }
    client.error.finish().await
}

/// Copies until the process has ended and all its output is sent.
async fn serve(process: Process, client: &mut Client) -> Result<Exit, BackendError> {
    let Process {
        stdin,
        stdout,
        stderr,
        resize: sizes,
        mut exit,
    } = process;
    let output = async {
        tokio::try_join!(
            copy_out(stdout, client.stdout.as_mut()),
            copy_out(stderr, client.stderr.as_mut()),
        )
        .map_err(|error| BackendError::new(format!("read output: {error}")))
    };
    // Ends with the session: a process may run on after the end of its input.
    let input = async {
        tokio::join!(
            copy_in(client.stdin.as_mut(), stdin),
            resize(client.resize.as_mut(), sizes),
        );
        std::future::pending::<()>().await;
    };
    tokio::pin!(output, input);
    let mut output_ended = false;
    let exit = loop {
        tokio::select! {
            exit = &mut exit => break exit,
            ended = &mut output, if !output_ended => {
                ended?;
                output_ended = true;
            }
            () = &mut input => {}
        }
    };
    // Detached, the output goes on elsewhere.
    if !output_ended && !matches!(exit, Ok(Exit::Detached)) {
        tokio::select! {
            ended = &mut output => drop(ended?),
            () = &mut input => {}
        }
    }
    exit
}

/// Copies output; what the client does not want any more is dropped, so that the process goes on.
async fn copy_out(from: Option<impl AsyncRead + Unpin>, to: Option<&mut Output>) -> io::Result<()> {
    let (Some(mut from), Some(to)) = (from, to) else {
        return Ok(());
    };
    let mut buffer = BytesMut::new();
    let mut wanted = true;
    loop {
        buffer.reserve(CHUNK);
        let mut part = (&mut from).take(CHUNK as u64);
        if part.read_buf(&mut buffer).await? == 0 {
            break;
        }
        let chunk = buffer.split().freeze();
        wanted = wanted && to.send(chunk).await.is_ok();
    }
    let _ = to.finish().await;
    Ok(())
}

/// Copies input and shuts the process's down at its end; what the process does not want is dropped.
async fn copy_in(from: Option<&mut Input>, to: Option<impl AsyncWrite + Unpin>) {
    let (Some(from), Some(mut to)) = (from, to) else {
        return;
    };
    let mut wanted = true;
    loop {
        match from.recv().await {
            Ok(Some(bytes)) if wanted => {
                let written = async {
                    to.write_all(&bytes).await?;
                    to.flush().await
                };
                if let Err(error) = written.await {
                    debug!(%error, "the process does not read its input");
                    wanted = false;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            // No end of input, and no process soon.
            Err(Lost) => return,
        }
    }
    if let Err(error) = to.shutdown().await {
        debug!(%error, "close input");
    }
}
