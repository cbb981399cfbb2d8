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

use super::{connection::Connection, dial, process::Stdio};
use crate::transport::Listener;

/// How long a connection may take to say what it is for.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Finds the streams of processes.
pub(crate) trait Directory: Send + Sync + 'static {
    /// Returns the streams of the exec, or with an empty `exec` of the
    /// container's first process.
    fn stdio(&self, container: &str, exec: &str) -> Option<Arc<Stdio>>;
}

/// Serves connections until the agent ends.
pub(crate) async fn serve(mut listener: Listener, directory: Arc<dyn Directory>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                let directory = Arc::clone(&directory);
                tokio::spawn(async move {
                    if let Err(error) = handle(connection, directory.as_ref()).await {
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

async fn handle(mut connection: Connection, directory: &dyn Directory) -> io::Result<()> {
    let header = timeout(HEADER_TIMEOUT, read_header(&mut connection)).await??;
    debug!(?header, "stream connection");
    if let StreamKind::Dial { port } = header.kind {
        return match dial::connect(port).await {
            Ok(server) => {
                accept(&mut connection, 0).await?;
                dial::relay(connection, server).await
            }
            Err(e) => refuse(connection, format!("connect to localhost:{port}: {e}")).await,
        };
    }
    let Some(stdio) = directory.stdio(&header.container, &header.exec) else {
        let name = [header.container.as_str(), &header.exec].join(" ");
        return refuse(connection, format!("no process {name}")).await;
    };
    let output = match header.kind {
        StreamKind::Stdout => &stdio.stdout,
        StreamKind::Stderr => &stdio.stderr,
        StreamKind::Stdin | StreamKind::Dial { .. } => {
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
