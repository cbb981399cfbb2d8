//! File servers: whose shares each has, and what goes wrong in them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::Path,
};

use hull_proto_vmm::fs::{ErrorKind, Request, Response, VERSION};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

use crate::{
    dice, kernel,
    trace::{fault, trace},
};

thread_local! {
    /// Who has shares of a server of a number.
    static OWNERS: RefCell<BTreeMap<u32, BTreeSet<String>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Whether somebody has shares of a server.
pub fn has_shares(server: u32, owner: &str) -> bool {
    OWNERS.with_borrow(|owners| owners.get(&server).is_some_and(|of| of.contains(owner)))
}

/// Serves until the VM has closed its end.
pub async fn serve(pid: u32, socket: &Path, fuse: OwnedFd) {
    // As hull-fs does.
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(answer(pid, stream));
        }
    });
    let fuse = StdUnixStream::from(fuse);
    fuse.set_nonblocking(true).unwrap();
    // Guests send nothing here.
    let _ = UnixStream::from_std(fuse).unwrap().read(&mut [0]).await;
    kernel::exit();
}

/// Answers the one request of a connection, unless the daemon is gone by then.
async fn answer(pid: u32, mut stream: UnixStream) -> Option<()> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut body = vec![0; hull_proto_vmm::body_length(prefix).unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    let request = hull_proto_vmm::decode(&body).unwrap();
    if dice::fault_in(40) {
        trace(format_args!("file server {pid} does not hear {request:?}"));
        std::future::pending::<()>().await;
    }
    let response = if dice::fault_in(20) {
        Response::Error {
            kind: ErrorKind::Internal,
            share: None,
            message: "as the seed says".into(),
        }
    } else {
        handle(pid, request)
    };
    if dice::fault_in(20) {
        trace(format_args!("file server {pid} loses its answer"));
        return None;
    }
    let frame = hull_proto_vmm::encode(&response).unwrap();
    stream.write_all(&frame).await.ok()
}

fn handle(pid: u32, request: Request) -> Response {
    OWNERS.with_borrow_mut(|owners| {
        let owners = owners.entry(pid).or_default();
        match request {
            Request::Hello { .. } => Response::Hello {
                version: VERSION,
                owners: owners.iter().cloned().collect(),
            },
            Request::Add { owner, shares, .. } => {
                let places = (0..shares.len()).map(|n| format!("{owner}/{n}")).collect();
                if !owners.insert(owner.clone()) {
                    fault(format!("{owner} has shares twice"));
                }
                Response::Added {
                    directories: vec![true; shares.len()],
                    places,
                }
            }
            Request::Remove { owner } => {
                owners.remove(&owner);
                Response::Ok
            }
            // Nobody here asks for a checkpoint.
            Request::Save | Request::Resume { .. } => Response::Error {
                kind: ErrorKind::Invalid,
                share: None,
                message: "this guest can't be saved".into(),
            },
        }
    })
}
