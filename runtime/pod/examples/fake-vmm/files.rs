//! The file server, as which the same program is started: it says yes to everything, until its VM
//! is gone.

use std::{
    io::{Read, stdin},
    path::Path,
};

use hull_proto_vmm::fs::{Request, Response, VERSION};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

pub async fn serve(socket: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    let gone = tokio::task::spawn_blocking(|| stdin().read(&mut [0]));
    let answers = async {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut prefix = [0; 4];
            // A daemon may be killed at any point.
            if stream.read_exact(&mut prefix).await.is_err() {
                continue;
            }
            let mut body = vec![0; hull_proto_vmm::body_length(prefix).unwrap()];
            stream.read_exact(&mut body).await.unwrap();
            let response = match hull_proto_vmm::decode(&body).unwrap() {
                Request::Hello { .. } => Response::Hello {
                    version: VERSION,
                    owners: Vec::new(),
                },
                Request::Add { owner, shares, .. } => Response::Added {
                    directories: vec![true; shares.len()],
                    places: (0..shares.len()).map(|n| format!("{owner}/{n}")).collect(),
                },
                Request::Remove { .. } => Response::Ok,
            };
            let frame = hull_proto_vmm::encode(&response).unwrap();
            let _ = stream.write_all(&frame).await;
        }
    };
    tokio::select! {
        _ = gone => {}
        () = answers => {}
    }
}
