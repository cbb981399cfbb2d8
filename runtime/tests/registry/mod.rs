//! A registry with one image, in the network of another process, for who has its password.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use nix::sched::{CloneFlags, setns};
use serde_json::json;
use sha2::{Digest, Sha256};

pub struct Registry {
    pub address: SocketAddr,
    let_in: Arc<AtomicBool>,
}

impl Registry {
    /// Somebody came with the right password.
    pub fn was_let_in(&self) -> bool {
        self.let_in.load(Ordering::SeqCst)
    }
}

/// User and password, as HTTP has them.
pub fn basic(user: &str, password: &str) -> String {
    BASE64_STANDARD.encode(format!("{user}:{password}"))
}

/// Serves `app:1` on loopback of the network of process `pid` until the test ends.
pub fn serve(pid: u32, user: &str, password: &str) -> Registry {
    serve_at(pid, ([127, 0, 0, 1], 0).into(), user, password)
}

/// The same at an address; port 0 takes a free one.
pub fn serve_at(pid: u32, at: SocketAddr, user: &str, password: &str) -> Registry {
    let let_in = Arc::new(AtomicBool::new(false));
    let (told, address) = mpsc::channel();
    let (wanted, seen) = (basic(user, password), Arc::clone(&let_in));
    thread::spawn(move || {
        let network = fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind(at).unwrap();
        told.send(listener.local_addr().unwrap()).unwrap();
        let content = content();
        for stream in listener.incoming() {
            answer(stream.unwrap(), &content, &wanted, &seen);
        }
    });
    Registry {
        address: address.recv().unwrap(),
        let_in,
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    format!("sha256:{hex}")
}

/// What is at the end of each path, and its type.
fn content() -> HashMap<String, (&'static str, Vec<u8>)> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o755);
    tar.append_data(&mut header, "file", b"text".as_slice())
        .unwrap();
    let layer = tar.into_inner().unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    })
    .to_string();
    let described = |kind: &str, bytes: &[u8]| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest(bytes), "size": bytes.len(),
        })
    };
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type,
        "config": described("config.v1+json", config.as_bytes()),
        "layers": [described("layer.v1.tar", &layer)],
    })
    .to_string()
    .into_bytes();
    let blob = |bytes: Vec<u8>| (digest(&bytes), ("application/octet-stream", bytes));
    HashMap::from([
        ("1".to_owned(), (manifest_type, manifest.clone())),
        (digest(&manifest), (manifest_type, manifest)),
        // What it says of itself.
        (String::new(), ("application/json", b"{}".to_vec())),
        blob(config.into_bytes()),
        blob(layer),
    ])
}

fn answer(
    mut stream: TcpStream,
    content: &HashMap<String, (&'static str, Vec<u8>)>,
    wanted: &str,
    let_in: &AtomicBool,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let head: Vec<String> = lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();
    let allowed = head.iter().any(|line| {
        line.split_once(": ").is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("authorization") && value == format!("Basic {wanted}")
        })
    });
    let path = first.split(' ').nth(1).unwrap_or_default();
    let found = content.get(path.rsplit('/').next().unwrap_or_default());
    let head = match (allowed, found) {
        (false, _) => "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"r\"".to_owned(),
        (true, Some((kind, bytes))) => {
            let_in.store(true, Ordering::SeqCst);
            format!(
                "200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}",
                bytes.len()
            )
        }
        (true, None) => "404 Not Found".to_owned(),
    };
    let body = found.filter(|_| allowed && first.starts_with("GET"));
    let _ = write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(body.map_or(&[], |(_, bytes)| bytes));
}
