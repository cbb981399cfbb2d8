//! Registries for a test: Debian's `docker-registry` over the demo images, and
//! one that misbehaves.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::wait::PATIENCE;

/// The image that most tests use, under a name that only a mirror can serve.
pub const BUSYBOX: &str = "registry.test/demo/busybox:latest";
/// busybox with the tools of those who set up networks: ip, iptables, nft, ping, socat; and inotifywait.
pub const NETWORK_TOOLS: &str = "registry.test/demo/network:latest";

/// A `docker-registry` that serves a directory read-only; ended when dropped, if it was started.
pub struct Registry {
    child: Option<Child>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Registry {
    /// Serves the storage directory `images` at an address of this host; its configuration is
    /// kept in `dir`. For `127.0.0.1` there may be one that does already: `HULL_TEST_REGISTRY`.
    pub fn start(images: &Path, dir: &Path, at: IpAddr) -> Self {
        let shared = env::var("HULL_TEST_REGISTRY").ok();
        if let Some(address) = shared.filter(|_| at.is_loopback()) {
            return Self {
                child: None,
                address: address.parse().unwrap(),
            };
        }
        let address = free_address(at);
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  \
             maintenance: {{readonly: {{enabled: true}}}}\nhttp: {{addr: '{address}'}}\n",
            images.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self {
            child: Some(child),
            address,
        };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn free_address(at: IpAddr) -> SocketAddr {
    TcpListener::bind((at, 0))
        .and_then(|l| l.local_addr())
        .unwrap()
}

/// What a [`FaultyRegistry`] does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The layer's bytes are not those of its digest.
    WrongBytes,
    /// The layer has the right digest, but is no archive.
    CorruptLayer,
    /// The layer is a fine archive, but not the one that the config's diff-ID names.
    WrongDiffId,
    /// The connection ends in the middle of the layer, and the registry is gone.
    Dies,
}

/// A registry with one image, `repo/image:latest`, and one fault; ended when dropped.
pub struct FaultyRegistry {
    /// Where it listens.
    pub address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Content {
    fault: Fault,
    manifest: Vec<u8>,
    config: (String, Vec<u8>),
    layer: (String, Vec<u8>),
}

impl FaultyRegistry {
    /// Starts it.
    pub fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let content = content(fault);
        let stop = ended.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) || !serve(&content, stream) {
                    return;
                }
            }
        });
        Self {
            address,
            ended,
            thread: Some(thread),
        }
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread; it is gone already if the registry died.
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Makes the image with tar and gzip from the host, so that nothing of ours checks itself.
fn content(fault: Fault) -> Content {
    let dir = tempfile::tempdir().unwrap();
    // Large enough that a connection can end in the middle.
    fs::write(dir.path().join("file"), vec![7; 3 << 20]).unwrap();
    let archive = shell(dir.path(), "tar -cf - --owner=0 --group=0 file");
    let layer = match fault {
        Fault::CorruptLayer => b"this is not gzip at all".repeat(1000),
        _ => shell(
            dir.path(),
            "tar -cf - --owner=0 --group=0 file | gzip -1 -n --no-name",
        ),
    };
    let diff_id = match fault {
        Fault::WrongDiffId => sha256(b"something else"),
        _ => sha256(&archive),
    };
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/file"]}},"rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
    )
    .into_bytes();
    let (config_digest, layer_digest) = (sha256(&config), sha256(&layer));
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{layer_digest}","size":{}}}]}}"#,
        config.len(),
        layer.len()
    );
    let mut sent = layer;
    if fault == Fault::WrongBytes {
        sent.last_mut().map(|b| *b ^= 1).unwrap();
    }
    Content {
        fault,
        manifest: manifest.into_bytes(),
        config: (config_digest, config),
        layer: (layer_digest, sent),
    }
}

/// Answers one request; false when the registry is to be gone afterwards.
fn serve(content: &Content, mut stream: TcpStream) -> bool {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    if reader.read_line(&mut request).is_err() {
        return true;
    }
    let mut header = String::new();
    while reader.read_line(&mut header).is_ok_and(|n| n > 2) {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    // A mirror is told the registry's name in the query.
    let path = path.split('?').next().unwrap_or_default();
    let (status, kind, body) = if path == "/v2/" {
        ("200 OK", "application/json", b"{}".as_slice())
    } else if path.contains("/manifests/") {
        (
            "200 OK",
            "application/vnd.oci.image.manifest.v1+json",
            content.manifest.as_slice(),
        )
    } else if path.ends_with(&content.config.0) {
        ("200 OK", "application/octet-stream", &*content.config.1)
    } else if path.ends_with(&content.layer.0) {
        ("200 OK", "application/octet-stream", &*content.layer.1)
    } else {
        ("404 Not Found", "application/json", b"{}".as_slice())
    };
    let dies = content.fault == Fault::Dies && path.ends_with(&content.layer.0);
    let sent = if dies { &body[..body.len() / 2] } else { body };
    let sent = if request.starts_with("HEAD") {
        &[]
    } else {
        sent
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nDocker-Content-Digest: {}\r\nConnection: close\r\n\r\n",
        body.len(),
        sha256(body),
    );
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(sent);
    !dies
}

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let mut text = String::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_string(&mut text).unwrap();
    child.wait().unwrap();
    format!("sha256:{}", text.split(' ').next().unwrap())
}

fn shell(dir: &Path, script: &str) -> Vec<u8> {
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}
