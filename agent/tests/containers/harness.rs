//! An agent as PID 1 of namespaces of its own, and a client for it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use hull_proto_agent::{
    agent as proto,
    rpc::AgentClient,
    stream::{ChunkDecoder, StreamHeader, StreamKind, StreamReply, body_length, decode, encode},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};
use ttrpc::context::{Context, with_duration};

/// Generous: emulated machines are slow.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Runs the agent from a read-only file system, and with capabilities to hand on that must not reach
/// containers.
const AS_IN_A_GUEST: &str = r#"
    mount --bind "$0" "$0"
    mount -o remount,bind,ro "$0"
    exec setpriv --inh-caps +all "$0" "$@""#;

/// A running agent; dropping it ends it and checks that nothing is left.
pub struct Agent {
    pub dir: PathBuf,
    process: Child,
    pub client: AgentClient,
}

/// Says why containers cannot run here, or that they can.
pub fn unable() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root");
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers.contains("memory") {
        return Some("no cgroup v2 with a memory controller");
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("no /bin/busybox");
    }
    None
}

pub fn context() -> Context {
    with_duration(LIMIT)
}

impl Agent {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// One whose directory was prepared.
    pub async fn start_with(prepare: impl FnOnce(&Path)) -> Self {
        let base = Path::new("/run/hull-agent-test");
        fs::create_dir_all(base).unwrap();
        let dir = tempfile::Builder::new()
            .prefix("t")
            .tempdir_in(base)
            .unwrap()
            .keep();
        image(&dir.join("image"));
        prepare(&dir);
        let process = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["--net", "--ipc", "--uts", "--propagation", "private"])
            .args(["sh", "-ec", AS_IN_A_GUEST])
            .arg(program(base))
            .arg("--listen")
            .arg(format!("unix:{}", dir.display()))
            .env(
                "HULL_LOG",
                std::env::var("HULL_LOG").unwrap_or_else(|_| "info".to_owned()),
            )
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let client = connect(&dir).await;
        let agent = Self {
            dir,
            process,
            client,
        };
        agent.bind("image", &agent.dir.join("image")).await;
        agent
    }

    /// A second connection, as after a restart of the host's daemon.
    pub async fn connect_again(&self) -> AgentClient {
        connect(&self.dir).await
    }

    pub async fn bind(&self, id: &str, source: &Path) {
        let request = proto::AttachStorageRequest {
            id: id.to_owned(),
            fstype: "bind".to_owned(),
            readonly: true,
            options: vec![source.display().to_string()],
            ..Default::default()
        };
        self.client
            .attach_storage(context(), &request)
            .await
            .unwrap();
    }

    pub async fn create(&self, request: &proto::CreateRequest) -> proto::CreateResponse {
        self.client.create(context(), request).await.unwrap()
    }

    pub async fn start_container(&self, id: &str) -> ttrpc::Result<proto::Empty> {
        let request = proto::StartRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client.start(context(), &request).await
    }

    pub async fn run(&self, id: &str, script: &str) {
        self.create(&container(id, script)).await;
        self.start_container(id).await.unwrap();
    }

    pub async fn delete(&self, id: &str) {
        let request = proto::DeleteRequest {
            container_id: id.to_owned(),
            force: true,
            ..Default::default()
        };
        self.client.delete(context(), &request).await.unwrap();
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) {
        let request = proto::SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal(context(), &request).await.unwrap();
    }

    pub async fn exec(&self, id: &str, exec: &str, script: &str) -> u32 {
        let request = exec_request(id, exec, script);
        self.client.exec(context(), &request).await.unwrap().pid
    }

    /// Waits for the end of a process, from the first event on.
    pub async fn exited(&self, id: &str, exec: &str) -> proto::Exited {
        let wait = async {
            let mut events = self
                .client
                .events(Context::default(), &proto::EventsRequest::default())
                .await
                .unwrap();
            loop {
                let event = events.recv().await.unwrap().unwrap();
                match event.kind {
                    Some(proto::event::Kind::Exited(e))
                        if e.container_id == id && e.exec_id == exec =>
                    {
                        return e;
                    }
                    _ => {}
                }
            }
        };
        timeout(LIMIT, wait).await.expect("no exit event")
    }

    /// Opens a stream of raw bytes.
    pub async fn stream(
        &self,
        kind: StreamKind,
        id: &str,
        exec: &str,
    ) -> Result<UnixStream, String> {
        let stream = UnixStream::connect(self.dir.join("stream.sock")).await;
        open(stream.unwrap(), kind, id, exec, 0)
            .await
            .map(|(stream, _)| stream)
    }

    /// Opens an output and returns it with the offset that the agent names.
    pub async fn open_output(
        &self,
        kind: StreamKind,
        id: &str,
        exec: &str,
        offset: u64,
    ) -> Result<(Output<UnixStream>, u64), String> {
        let stream = UnixStream::connect(self.dir.join("stream.sock")).await;
        let (stream, offset) = open(stream.unwrap(), kind, id, exec, offset).await?;
        Ok((Output::new(stream), offset))
    }

    /// Reads an output stream to its end and acknowledges it.
    pub async fn output(&self, kind: StreamKind, id: &str, exec: &str) -> String {
        let (mut output, offset) = self.open_output(kind, id, exec, 0).await.unwrap();
        let bytes = output.read_to_end().await;
        output.acknowledge(offset + bytes.len() as u64).await;
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs a script in a container and returns its output and end.
    pub async fn exec_sync(&self, id: &str, exec: &str, script: &str) -> (String, proto::Exited) {
        self.exec(id, exec, script).await;
        let output = self.output(StreamKind::Stdout, id, exec).await;
        (output, self.exited(id, exec).await)
    }

    pub fn cgroup(&self) -> PathBuf {
        let name = self.dir.file_name().unwrap().to_string_lossy();
        Path::new("/sys/fs/cgroup").join(format!("hull-{name}"))
    }

    /// Nothing may be left of any container.
    pub fn assert_clean(&self) {
        let containers = self.dir.join("run/containers");
        let left = |dir: &Path| {
            fs::read_dir(dir)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|e| e.file_type().unwrap().is_dir())
                .map(|e| e.path())
                .collect::<Vec<_>>()
        };
        assert_eq!(left(&containers), Vec::<PathBuf>::new());
        assert_eq!(
            left(&self.dir.join("run/scratch/containers")),
            Vec::<PathBuf>::new()
        );
        assert_eq!(left(&self.cgroup()), Vec::<PathBuf>::new());
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.init())).unwrap();
        assert!(!mounts.contains("run/containers"), "{mounts}");
    }

    /// The agent's pid as this process sees it.
    pub fn init(&self) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        let text = fs::read_to_string(children).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let cgroup = self.cgroup();
        let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        for _ in 0..100 {
            let mut dirs = vec![cgroup.clone()];
            let mut i = 0;
            while i < dirs.len() {
                let children: Vec<_> = fs::read_dir(&dirs[i])
                    .into_iter()
                    .flatten()
                    .flatten()
                    .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                    .map(|e| e.path())
                    .collect();
                dirs.extend(children);
                i += 1;
            }
            for dir in dirs.iter().rev() {
                let _ = fs::remove_dir(dir);
            }
            if !cgroup.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let name = cgroup.file_name().unwrap().to_string_lossy().into_owned();
        let _ = fs::remove_dir(cgroup.with_file_name(format!("{name}-agent")));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The agent as it is in a guest, with vsock's loopback in place of a host.
pub struct Guest {
    process: Child,
}

impl Guest {
    /// Where the image lies: not below what the agent mounts over.
    const IMAGE: &str = "/mnt/hull-agent-image";

    /// Starts it, or says why that cannot be.
    pub async fn start() -> Result<(Self, AgentClient), &'static str> {
        let guest = Self::start_for(1)?;
        let client = connect_to("vsock://1:1024").await;
        let request = proto::AttachStorageRequest {
            id: "image".to_owned(),
            fstype: "bind".to_owned(),
            options: vec![Self::IMAGE.to_owned()],
            ..Default::default()
        };
        client.attach_storage(context(), &request).await.unwrap();
        Ok((guest, client))
    }

    /// Starts it for a host with the context id `host`; that of the loopback is 1.
    pub fn start_for(host: u32) -> Result<Self, &'static str> {
        let loaded = Command::new("modprobe").arg("vsock_loopback").status();
        if !loaded.is_ok_and(|s| s.success()) {
            return Err("no vsock loopback");
        }
        let base = Path::new("/run/hull-agent-test");
        fs::create_dir_all(base).unwrap();
        let _ = fs::remove_dir_all(Self::IMAGE);
        image(Path::new(Self::IMAGE));
        let process = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--net"])
            .args(["--ipc", "--uts", "--propagation", "private"])
            .arg(program(base))
            .args(["--listen", &format!("vsock:{host}")])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Ok(Self { process })
    }

    /// Waits for the end that a reset is inside of a pid namespace.
    pub async fn ended(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while self.process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the guest does not end");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(Self::IMAGE);
        for cgroup in ["hull", "hull-agent"] {
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(cgroup));
        }
    }
}

/// Says what a connection is for, and returns it with the offset that the agent names.
pub async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    kind: StreamKind,
    id: &str,
    exec: &str,
    offset: u64,
) -> Result<(S, u64), String> {
    let header = StreamHeader {
        kind,
        container: id.to_owned(),
        exec: exec.to_owned(),
        offset,
    };
    stream.write_all(&encode(&header).unwrap()).await.unwrap();
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.unwrap();
    let mut body = vec![0; body_length(prefix).unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    match decode(&body).unwrap() {
        StreamReply::Ok { offset } => Ok((stream, offset)),
        StreamReply::Error { message } => Err(message),
    }
}

/// The output of a process, as one connection carries it.
pub struct Output<S> {
    stream: S,
    decoder: ChunkDecoder,
    /// Bytes that were read and not asked for yet.
    ready: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Output<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            decoder: ChunkDecoder::default(),
            ready: Vec::new(),
        }
    }

    /// Reads some bytes; none at the end of the output.
    pub async fn read(&mut self) -> Vec<u8> {
        while self.ready.is_empty() && !self.decoder.has_ended() {
            let mut buffer = vec![0; 30_000];
            let read = timeout(LIMIT, self.stream.read(&mut buffer)).await;
            let length = read.expect("the output does not end").unwrap();
            assert_ne!(length, 0, "the connection was lost");
            let length = self.decoder.decode(&mut buffer[..length]).unwrap();
            self.ready.extend_from_slice(&buffer[..length]);
        }
        std::mem::take(&mut self.ready)
    }

    pub async fn read_exact(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let more = self.read().await;
            assert_ne!(more, b"", "the output ended");
            bytes.extend(more);
        }
        self.ready = bytes.split_off(length);
        bytes
    }

    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let more = self.read().await;
            if more.is_empty() {
                return bytes;
            }
            bytes.extend(more);
        }
    }

    /// Tells the agent that the first `total` bytes are safe.
    pub async fn acknowledge(&mut self, total: u64) {
        self.stream.write_all(&total.to_le_bytes()).await.unwrap();
    }
}

/// Copies the agent into memory: from a shared directory it starts slowly.
fn program(base: &Path) -> PathBuf {
    let (built, copy) = (
        Path::new(env!("CARGO_BIN_EXE_hull-agent")),
        base.join("hull-agent"),
    );
    let age = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
    if age(&copy).ok() < age(built).ok() {
        fs::copy(built, base.join("hull-agent.new")).unwrap();
        fs::rename(base.join("hull-agent.new"), &copy).unwrap();
    }
    copy
}

async fn connect(dir: &Path) -> AgentClient {
    connect_to(&format!("unix://{}", dir.join("rpc.sock").display())).await
}

async fn connect_to(address: &str) -> AgentClient {
    let deadline = Instant::now() + LIMIT;
    loop {
        match ttrpc::r#async::Client::connect(address).await {
            Ok(client) => return AgentClient::new(client),
            Err(e) if Instant::now() > deadline => panic!("connect to the agent: {e}"),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A root file system around busybox.
fn image(dir: &Path) {
    for sub in [
        "bin", "etc", "root", "tmp", "proc", "sys", "dev", "home/app", "data",
    ] {
        fs::create_dir_all(dir.join(sub)).unwrap();
    }
    fs::copy("/bin/busybox", dir.join("bin/busybox")).unwrap();
    for tool in [
        "sh", "cat", "echo", "sleep", "id", "ls", "env", "pwd", "yes", "head", "ps", "stty", "dd",
        "grep", "kill", "touch", "nc", "seq", "tail", "hostname", "mount", "wc", "mknod", "setsid",
        "true", "printf", "chmod", "chown", "ip", "tr", "cut", "ln", "rm", "stat", "uniq",
    ] {
        symlink("busybox", dir.join("bin").join(tool)).unwrap();
    }
    fs::write(
        dir.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        dir.join("etc/group"),
        "root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
    )
    .unwrap();
    fs::write(dir.join("etc/not-executable"), "#!/bin/sh\n").unwrap();
}

const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// The specification as the host makes it.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "cwd": "/",
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "FROM=spec"],
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES
            },
            "oomScoreAdj": 1000
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"]}
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 67_108_864, "swap": 67_108_864},
                "pids": {"limit": 200}
            },
            "maskedPaths": ["/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys"]
        }
    })
}

pub fn container_with(id: &str, spec: &Value) -> proto::CreateRequest {
    proto::CreateRequest {
        container_id: id.to_owned(),
        spec: spec.to_string().into_bytes(),
        lower: vec!["image".to_owned()],
        writable: true,
        ..Default::default()
    }
}

pub fn container(id: &str, script: &str) -> proto::CreateRequest {
    container_with(id, &spec(&["sh", "-c", script]))
}

pub fn exec_request(id: &str, exec: &str, script: &str) -> proto::ExecRequest {
    proto::ExecRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        ..Default::default()
    }
}
