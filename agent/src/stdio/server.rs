//! Accepts the host's stream connections and finds what they are for.

use std::{io, sync::Arc, time::Duration};

use hull_proto_agent::stream::{
    StreamHeader, StreamKind, StreamReply, body_length, decode, encode,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tracing::{debug, warn};

use super::{connection::Connection, dial, process::Directory, shell::Shells};
use crate::transport::Listener;

/// How long a connection may take to say what it is for.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves connections until the agent ends.
pub(crate) async fn serve(
    mut listener: Listener,
    directory: Arc<dyn Directory>,
    shells: Arc<Shells>,
) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                let (directory, shells) = (Arc::clone(&directory), Arc::clone(&shells));
                tokio::spawn(async move {
                    let handled = handle(connection, directory.as_ref(), &shells).await;
                    if let Err(error) = handled {
                        debug!(%error, "stream connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "accept stream connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn handle(
    mut connection: Connection,
    directory: &dyn Directory,
    shells: &Shells,
) -> io::Result<()> {
    let header = timeout(HEADER_TIMEOUT, read_header(&mut connection)).await??;
    debug!(?header, "stream connection");
    match header.kind {
        StreamKind::Dial { port } => match dial::connect(port).await {
            Ok(server) => {
                accept(&mut connection, 0).await?;
                dial::relay(connection, server).await
            }
            Err(e) => refuse(connection, format!("connect to localhost:{port}: {e}")).await,
        },
        StreamKind::Shell { terminal } => match shells.start(terminal) {
            Ok(shell) => {
                accept(&mut connection, 0).await?;
                shell.relay(connection).await
            }
            Err(e) => refuse(connection, format!("start a shell: {e}")).await,
        },
        StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr => {
            of_process(connection, &header, directory).await
        }
    }
}

async fn of_process(
    mut connection: Connection,
    header: &StreamHeader,
    directory: &dyn Directory,
) -> io::Result<()> {
    let Some(stdio) = directory.stdio(&header.container, &header.exec) else {
        let name = [header.container.as_str(), &header.exec].join(" ");
        return refuse(connection, format!("no process {name}")).await;
    };
    let output = match header.kind {
        StreamKind::Stdout => &stdio.stdout,
        StreamKind::Stderr => &stdio.stderr,
        _ => {
            let Some(input) = &stdio.input else {
                return refuse(connection, "the process has no input".to_owned()).await;
            };
            let _counted = stdio.count();
            accept(&mut connection, 0).await?;
            return input.serve(connection).await;
        }
    };
    match output.attach(header.offset) {
        Ok((number, offset)) => {
            let _counted = stdio.count();
            accept(&mut connection, offset).await?;
            output.serve(number, offset, connection).await
        }
        Err(e) => refuse(connection, e.to_string()).await,
    }
}

async fn read_header(connection: &mut Connection) -> io::Result<StreamHeader> {
    let mut prefix = [0; 4];
    connection.read_exact(&mut prefix).await?;
    let mut body = vec![0; body_length(prefix)?];
    connection.read_exact(&mut body).await?;
    decode(&body)
}

async fn accept(connection: &mut Connection, offset: u64) -> io::Result<()> {
    connection
        .write_all(&encode(&StreamReply::Ok { offset })?)
        .await
}

async fn refuse(mut connection: Connection, message: String) -> io::Result<()> {
    connection
        .write_all(&encode(&StreamReply::Error { message })?)
        .await?;
    connection.shutdown().await
}
