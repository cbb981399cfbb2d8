//! Ports of this host that lead to those of a pod.

use std::{io, net::SocketAddr, str::FromStr, sync::Arc};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{
    error::ClientError,
    forward::{Forward, Forwarder},
};

/// How much is read at a time.
const CHUNK: usize = 32 << 10;

/// A port here and one in the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// To listen on; 0: a free one.
    pub local: u16,
    /// To connect to; never 0.
    pub pod: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (local, pod) = text.split_once(':').unwrap_or((text, text));
        match (local.parse(), pod.parse()) {
            (Ok(local), Ok(pod)) if pod != 0 => Ok(Self { local, pod }),
            _ => Err(format!("{text:?} is not [LOCAL:]PORT")),
        }
    }
}

/// Listens on the ports, at 127.0.0.1, and forwards connections until the server hangs up. Each
/// address is told to `listening` when connections are taken there, and what went wrong with one of
/// them to `failed`.
///
/// # Errors
/// Ports that are taken; and the server's end.
pub async fn listen(
    forwarder: Forwarder,
    ports: &[Ports],
    listening: impl Fn(SocketAddr, u16),
    failed: impl Fn(u16, ClientError) + Send + Sync + 'static,
) -> Result<(), ClientError> {
    let (forwarder, failed) = (Arc::new(forwarder), Arc::new(failed));
    let mut tasks = tokio::task::JoinSet::new();
    for &ports in ports {
        let taken = |source| ClientError::Listen(ports.local, source);
        let listener = TcpListener::bind(("127.0.0.1", ports.local));
        let listener = listener.await.map_err(taken)?;
        listening(listener.local_addr().map_err(taken)?, ports.pod);
        let (forwarder, failed) = (Arc::clone(&forwarder), Arc::clone(&failed));
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (forwarder, failed) = (Arc::clone(&forwarder), Arc::clone(&failed));
                tokio::spawn(async move {
                    let copied = match forwarder.open(ports.pod).await {
                        Ok(forward) => copy(stream, forward).await,
                        Err(error) => Err(error.into()),
                    };
                    if let Err(error) = copied {
                        failed(ports.pod, error);
                    }
                });
            }
        });
    }
    forwarder.closed().await;
    Err(ClientError::HungUp)
}

async fn copy(mut stream: TcpStream, forward: Forward) -> Result<(), ClientError> {
    let Forward {
        mut output,
        mut input,
        mut error,
    } = forward;
    let own = |action| move |source: io::Error| ClientError::Own { action, source };
    let (mut reader, mut writer) = stream.split();
    let up = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = reader.read(&mut buffer).await;
            match read.map_err(own("read from a connection"))? {
                0 => return Ok(output.finish().await?),
                length => {
                    output
                        .send(Bytes::copy_from_slice(&buffer[..length]))
                        .await?
                }
            }
        }
    };
    let down = async {
        while let Ok(Some(bytes)) = input.recv().await {
            let written = writer.write_all(&bytes).await;
            written.map_err(own("write to a connection"))?;
        }
        writer.shutdown().await.map_err(own("end a connection"))
    };
    let copied: Result<_, ClientError> = tokio::try_join!(up, down);
    // What the pod's side says counts for more than how its connection ended.
    if let Ok(Some(text)) = error.recv().await {
        return Err(ClientError::Told(
            String::from_utf8_lossy(&text).into_owned(),
        ));
    }
    copied.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_is_both_ports() {
        let ports = |local, pod| Ok(Ports { local, pod });
        assert_eq!("80".parse(), ports(80, 80));
        assert_eq!("8080:80".parse(), ports(8080, 80));
        assert_eq!("0:80".parse(), ports(0, 80));
        for bad in ["", ":", "80:", ":80", "0", "80:0", "65536", "1:2:3", "http"] {
            assert!(bad.parse::<Ports>().is_err(), "{bad}");
        }
    }
}
