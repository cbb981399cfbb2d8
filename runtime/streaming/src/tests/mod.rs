//! The server over real TCP, with processes and pods that are only in memory.

mod backend;
mod command;
mod forward;
mod hostile;
mod requests;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use self::backend::Memory;
use crate::{
    AttachRequest, Config, ExecRequest, Input, PortForwardRequest, Streaming,
    client::{Transport, Wants},
};

/// All that exec and attach can be spoken in.
const TRANSPORTS: [Transport<'static>; 10] = [
    Transport::Spdy(&[
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "v3.channel.k8s.io",
    ]),
    Transport::Spdy(&["v3.channel.k8s.io"]),
    Transport::Spdy(&["v2.channel.k8s.io"]),
    Transport::Spdy(&["channel.k8s.io"]),
    Transport::WebSocket("v5.channel.k8s.io"),
    Transport::WebSocket("v4.channel.k8s.io"),
    Transport::WebSocket("v4.base64.channel.k8s.io"),
    Transport::WebSocket("channel.k8s.io"),
    Transport::WebSocket("base64.channel.k8s.io"),
    Transport::WebSocket(""),
];

/// Those whose status is JSON and whose input has an end.
const FULL: [Transport<'static>; 2] = [TRANSPORTS[0], TRANSPORTS[4]];

/// Longer than anything takes, and shorter than a person's patience.
const PATIENCE: Duration = Duration::from_secs(30);

const ALL: Wants = Wants {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};

const TTY: Wants = Wants {
    stdin: true,
    stdout: true,
    stderr: false,
    tty: true,
};

struct Server {
    streaming: Streaming,
    memory: Arc<Memory>,
}

impl Server {
    async fn start() -> Self {
        Self::start_with(Config::default()).await
    }

    async fn start_with(config: Config) -> Self {
        let memory = Arc::new(Memory::default());
        let streaming = Streaming::start(config, Arc::clone(&memory) as _)
            .await
            .unwrap();
        Self { streaming, memory }
    }

    fn exec(&self, cmd: &[&str], wants: Wants) -> String {
        let request = ExecRequest {
            container_id: "container".into(),
            cmd: cmd.iter().map(|&arg| arg.into()).collect(),
            tty: wants.tty,
            stdin: wants.stdin,
            stdout: wants.stdout,
            stderr: wants.stderr,
        };
        self.streaming.exec(request).unwrap()
    }

    fn attach(&self, wants: Wants) -> String {
        let request = AttachRequest {
            container_id: "container".into(),
            tty: wants.tty,
            stdin: wants.stdin,
            stdout: wants.stdout,
            stderr: wants.stderr,
        };
        self.streaming.attach(request).unwrap()
    }

    fn forward(&self, ports: &[u16]) -> String {
        let request = PortForwardRequest {
            pod_sandbox_id: "pod".into(),
            ports: ports.to_vec(),
        };
        self.streaming.port_forward(request).unwrap()
    }

    /// Waits until no process, connection or session is left.
    async fn assert_idle(&self) {
        self.memory.assert_none_left().await;
        // The listener's.
        wait("sessions end", || self.streaming.tasks() == 1).await;
    }
}

/// Waits for something that happens soon.
async fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(waited.is_ok(), "waited in vain: {what}");
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .expect("it takes too long")
}

/// Bytes that differ from place to place.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(next).collect()
}

async fn read_exactly(input: &mut Input, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        match within(input.recv()).await {
            Ok(Some(bytes)) => all.extend_from_slice(&bytes),
            other => panic!("{other:?} after {} bytes", all.len()),
        }
    }
    all
}

async fn read_to_end(input: &mut Input) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = within(input.recv()).await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}
