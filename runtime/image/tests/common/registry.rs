//! Debian's docker-registry on a free port, and a small pusher.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Blob, TestImage};

/// A running registry; it ends with the value.
#[derive(Debug)]
pub struct RealRegistry {
    child: Child,
    directory: tempfile::TempDir,
    pub port: u16,
    pub scheme: &'static str,
}

impl RealRegistry {
    /// Starts a registry over plain http; `None`, with a reason printed, when it is not installed.
    pub async fn start() -> Option<Self> {
        Self::start_with("", |_| {}).await
    }

    /// Starts a registry with more lines below `http:` and files in its directory.
    pub async fn start_with(more: &str, prepare: impl FnOnce(&Path)) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let base = directory.path().display();
        let more = more.replace("DIR", &base.to_string());
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {base}/data}}}}\n\
             http:\n  addr: 127.0.0.1:{port}\n{more}"
        );
        let config = directory.path().join("config.yml");
        fs::write(&config, text).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(e) => {
                println!(
                    "SKIPPED: run docker-registry: {e}; install it with: \
                     apt-get install --no-install-recommends docker-registry"
                );
                return None;
            }
        };
        let scheme = if more.contains("tls:") {
            "https"
        } else {
            "http"
        };
        let registry = Self {
            child,
            directory,
            port,
            scheme,
        };
        registry.wait().await;
        Some(registry)
    }

    async fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if tokio::net::TcpStream::connect(("127.0.0.1", self.port))
                .await
                .is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut log = String::new();
        let path = self.directory.path().join("log");
        fs::File::open(path)
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        panic!("docker-registry does not listen: {log}");
    }

    /// `127.0.0.1:port`
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn url(&self, path: &str) -> String {
        format!("{}://{}/v2/{path}", self.scheme, self.address())
    }

    fn client(&self) -> reqwest::Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder();
        if let Ok(pem) = fs::read(self.directory.path().join("client.pem")) {
            builder = builder.identity(reqwest::Identity::from_pem(&pem).unwrap());
        }
        builder
            .no_proxy()
            .tls_danger_accept_invalid_certs(true)
            .build()
            .unwrap()
    }

    /// Puts an image there under a tag.
    pub async fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(repository, blob).await;
        }
        self.push_manifest(repository, tag, &image.manifest).await;
    }

    async fn push_blob(&self, repository: &str, blob: &Blob) {
        let client = self.client();
        let start = client
            .post(self.url(&format!("{repository}/blobs/uploads/")))
            .basic_auth("user", Some("secret"))
            .send()
            .await
            .unwrap();
        assert_eq!(start.status(), 202);
        let location = start.headers()["location"].to_str().unwrap().to_owned();
        let end = client
            .put(format!("{location}&digest={}", blob.digest()))
            .basic_auth("user", Some("secret"))
            .body(blob.bytes.clone())
            .send()
            .await
            .unwrap();
        assert_eq!(end.status(), 201, "push of a blob");
    }

    /// Puts a manifest or an index there.
    pub async fn push_manifest(&self, repository: &str, target: &str, manifest: &Blob) {
        let put = self
            .client()
            .put(self.url(&format!("{repository}/manifests/{target}")))
            .basic_auth("user", Some("secret"))
            .header("content-type", &manifest.media_type)
            .body(manifest.bytes.clone())
            .send()
            .await
            .unwrap();
        let status = put.status();
        assert_eq!(
            status,
            201,
            "push of a manifest: {}",
            put.text().await.unwrap()
        );
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
