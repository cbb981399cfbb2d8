//! A VM without a daemon: `hull-vmm` and the agent, driven by their contracts.

use std::{
    fs::{self, File},
    io::{self, IoSlice, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hull_proto_agent::{GUEST_CID, RPC_PORT, VERSION, agent::HelloRequest, rpc::AgentClient};
use hull_proto_vmm::{
    DeviceConfig, ExitReport, Extent, FdIndex, Metrics, Request, Response, VmConfig, body_length,
    decode, encode,
};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::Context,
};

use super::wait::PATIENCE;

/// A running VM; killed when dropped.
pub struct Vm {
    /// The VMM.
    pub child: Child,
    control: UnixStream,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Starts the VMM, without configuring it.
    pub fn spawn() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("hull-vm-")
            .tempdir()
            .unwrap();
        let socket = dir.path().join("vmm.sock");
        let mut child = Command::new(asset("hull-vmm"))
            .args(["run", "--id", "test", "--socket"])
            .arg(&socket)
            .arg("--exit-report")
            .arg(dir.path().join("exit.json"))
            .args(["--user", "1879048192"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let deadline = Instant::now() + PATIENCE;
        let control = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut vm = Self {
            child,
            control,
            dir,
        };
        let hello = vm.request(
            &Request::Hello {
                version: hull_proto_vmm::VERSION,
            },
            &[],
        );
        assert!(matches!(hello, Response::Hello { .. }), "{hello:?}");
        vm
    }

    /// Boots the guest image and waits for the agent.
    pub async fn boot() -> (Self, AgentClient) {
        let mut vm = Self::spawn();
        let listener = UnixListener::bind(vm.vsock()).unwrap();
        let (root, extents) = disk(&asset("root.erofs"), 1);
        let config = VmConfig {
            vcpus: 1,
            boot_vcpus: 1,
            memory_mib: 256,
            pluggable: None,
            kernel: FdIndex(0),
            initrd: None,
            cmdline: "root=/dev/vda rootfstype=erofs ro init=/init".into(),
            serial: None,
            devices: vec![
                (
                    0,
                    DeviceConfig::Vsock {
                        cid: GUEST_CID,
                        listener: FdIndex(2),
                    },
                ),
                (1, DeviceConfig::Rng),
                (2, block("root", extents)),
            ],
        };
        let kernel = File::open(asset("vmlinux")).unwrap();
        let fds = [kernel.into(), root, listener.into()];
        vm.done(&Request::Configure(Box::new(config)), &fds);
        vm.done(&Request::Start, &[]);
        let agent = vm.agent().await;
        (vm, agent)
    }

    /// Connects to the agent when it is ready.
    async fn agent(&self) -> AgentClient {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match self.dial(RPC_PORT) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "dial the agent: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        let agent = AgentClient::new(Client::new(Socket::new(stream)));
        let request = HelloRequest {
            version: VERSION,
            ..Default::default()
        };
        let hello = agent.hello(Context::default(), &request).await.unwrap();
        assert_eq!(hello.version, VERSION);
        agent
    }

    /// Connects to a vsock port of the guest.
    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(self.vsock())?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut byte = [0];
        while byte != *b"\n" {
            stream.read_exact(&mut byte)?;
        }
        Ok(stream)
    }

    fn vsock(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    /// Sends a request and returns the answer.
    pub fn request(&mut self, request: &Request, fds: &[OwnedFd]) -> Response {
        let frame = encode(request).unwrap();
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[] } else { &rights[..] };
        let fd = self.control.as_raw_fd();
        let sent = sendmsg::<()>(fd, &[IoSlice::new(&frame)], rights, MsgFlags::empty(), None);
        self.control.write_all(&frame[sent.unwrap()..]).unwrap();
        let mut prefix = [0; 4];
        self.control.read_exact(&mut prefix).unwrap();
        let mut body = vec![0; body_length(prefix).unwrap()];
        self.control.read_exact(&mut body).unwrap();
        decode(&body).unwrap()
    }

    /// Sends a request that must succeed.
    pub fn done(&mut self, request: &Request, fds: &[OwnedFd]) {
        assert_eq!(self.request(request, fds), Response::Ok, "{request:?}");
    }

    /// Asks for counters.
    pub fn metrics(&mut self) -> Metrics {
        match self.request(&Request::Metrics, &[]) {
            Response::Metrics(metrics) => *metrics,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the end of the VMM and returns its report.
    pub fn exit_report(&mut self) -> ExitReport {
        self.child.wait().unwrap();
        let text = fs::read(self.dir.path().join("exit.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of the build.
pub fn asset(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("HULL_ASSETS").expect("HULL_ASSETS is set")).join(name)
}

/// Opens a file as a disk at index `fd` of a request.
pub fn disk(path: &Path, fd: u32) -> (OwnedFd, Vec<Extent>) {
    let file = File::open(path).unwrap();
    let extent = Extent {
        file: FdIndex(fd),
        offset: 0,
        length: file.metadata().unwrap().len() / 512 * 512,
    };
    (file.into(), vec![extent])
}

/// A read-only disk.
pub fn block(serial: &str, extents: Vec<Extent>) -> DeviceConfig {
    DeviceConfig::Block {
        serial: serial.into(),
        readonly: true,
        extents,
    }
}
