//! The file server, as which the same program is started: it says yes to everything, until its VM
//! is gone. Its guest knows nothing of files, and all that is noted is which shares there are.

use std::{
    io::{Read, stdin},
    path::Path,
};

use hull_proto_vmm::fs::{Owner, Request, Response, VERSION};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

/// What a guest knows of all shares.
const STATE: &[u8] = b"what the guest knows";

pub async fn serve(socket: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    let gone = tokio::task::spawn_blocking(|| stdin().read(&mut [0]));
    let answers = async {
        let mut all: Vec<Owner> = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut prefix = [0; 4];
            // A daemon may be killed at any point.
            if stream.read_exact(&mut prefix).await.is_err() {
                continue;
            }
            let mut body = vec![0; hull_proto_vmm::body_length(prefix).unwrap()];
            stream.read_exact(&mut body).await.unwrap();
            let mut more = Vec::new();
            let response = match hull_proto_vmm::decode(&body).unwrap() {
                Request::Hello { .. } => Response::Hello {
                    version: VERSION,
                    owners: Vec::new(),
                },
                Request::Add { owner, shares, .. } => {
                    let places = (0..shares.len()).map(|n| format!("{owner}/{n}")).collect();
                    let directories = vec![true; shares.len()];
                    all.push(Owner {
                        name: owner,
                        shares: shares.into_iter().enumerate().collect(),
                        uses: Vec::new(),
                        has_ended: false,
                    });
                    Response::Added {
                        directories,
                        places,
                    }
                }
                Request::Remove { owner } => {
                    all.retain(|other| other.name != owner);
                    Response::Ok
                }
                Request::Save => {
                    more = STATE.to_vec();
                    Response::Saved {
                        owners: all.clone(),
                        bytes: more.len() as u64,
                    }
                }
                Request::Resume { owners, bytes, .. } => {
                    let mut state = vec![0; usize::try_from(bytes).unwrap()];
                    stream.read_exact(&mut state).await.unwrap();
                    assert_eq!(state, STATE);
                    let paths = owners.iter().flat_map(|owner| &owner.shares);
                    let paths = paths.map(|(_, share)| format!("{}\n", share.path.display()));
                    std::fs::write(socket.with_file_name("shares"), paths.collect::<String>())
                        .unwrap();
                    all = owners;
                    Response::Resumed { lost: 0 }
                }
            };
            let frame = hull_proto_vmm::encode(&response).unwrap();
            let _ = stream.write_all(&[frame, more].concat()).await;
        }
    };
    tokio::select! {
        _ = gone => {}
        () = answers => {}
    }
}
