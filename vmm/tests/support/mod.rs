//! A `hull-vmm` process, its control socket, and kernels to run in it.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test program uses a part of it"
)]

pub mod linux;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hull_proto_vmm::{
    ExitReport, FdIndex, Metrics, Request, Response, VERSION, VmConfig, body_length, decode, encode,
};
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PATIENCE: Duration = Duration::from_secs(60);
const ENTRY: u64 = 0x10_0000;

/// Tells whether tests with guests can run, and says so if not.
pub fn has_kvm() -> bool {
    let answer = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &answer {
        println!("SKIPPED: /dev/kvm: {error}");
    }
    answer.is_ok()
}

/// As whom VMMs run.
pub const USER: u32 = 1_879_048_192;

/// Tells a VMM that was just started that it is known.
pub fn make_known(child: &mut Child) {
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
}

/// A VMM.
pub struct Vmm {
    directory: TempDir,
    child: Child,
}

impl Vmm {
    /// Starts one and waits for its socket.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_hull-vmm"))
            .args(["run", "--id", "test"])
            .arg("--socket")
            .arg(directory.path().join("vmm.sock"))
            .arg("--exit-report")
            .arg(directory.path().join("exit.json"))
            .args(["--user", &USER.to_string()])
            .env_clear()
            .stdin(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        make_known(&mut child);
        let vmm = Self { directory, child };
        // The file is there a moment before anybody listens.
        wait_until(|| UnixStream::connect(vmm.path("vmm.sock")).is_ok());
        vmm
    }

    /// Returns the path of a file in the VMM's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Opens a connection without a hello.
    pub fn connect_silently(&self) -> Control {
        Control(UnixStream::connect(self.path("vmm.sock")).unwrap())
    }

    /// Opens a connection.
    pub fn connect(&self) -> Control {
        let mut control = self.connect_silently();
        let hello = control.ask(&Request::Hello { version: VERSION }, &[]);
        assert!(
            matches!(
                hello,
                Response::Hello {
                    version: VERSION,
                    ..
                }
            ),
            "{hello:?}"
        );
        control
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the process; returns its report.
    pub fn wait(self) -> (ExitStatus, ExitReport) {
        let (status, report) = self.wait_however_it_ends();
        (status, report.unwrap())
    }

    /// Waits for the end of a process that may have crashed.
    pub fn wait_however_it_ends(mut self) -> (ExitStatus, serde_json::Result<ExitReport>) {
        let status = self.wait_for_exit();
        let report = fs::read(self.path("exit.json")).unwrap();
        (status, serde_json::from_slice(&report))
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A control connection.
pub struct Control(pub UnixStream);

impl Control {
    /// Sends a request with descriptors and returns the answer.
    pub fn ask(&mut self, request: &Request, fds: &[&File]) -> Response {
        self.try_to_ask(request, fds).unwrap()
    }

    /// Sends a request with descriptors to a VMM that may be at its end.
    pub fn try_to_ask(&mut self, request: &Request, fds: &[&File]) -> io::Result<Response> {
        let fds: Vec<_> = fds.iter().map(|file| file.as_raw_fd()).collect();
        let sent = self
            .0
            .send_with_fds(&[encode(request).unwrap().as_slice()], &fds);
        sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        self.answer()
    }

    /// Sends a request that must succeed.
    pub fn order(&mut self, request: &Request, fds: &[&File]) {
        assert_eq!(self.ask(request, fds), Response::Ok, "{request:?}");
    }

    /// Reads an answer.
    pub fn answer(&mut self) -> io::Result<Response> {
        let mut prefix = [0; 4];
        self.0.read_exact(&mut prefix)?;
        let mut body = vec![0; body_length(prefix).unwrap()];
        self.0.read_exact(&mut body)?;
        Ok(decode(&body).unwrap())
    }

    /// Returns the counters.
    pub fn metrics(&mut self) -> Metrics {
        match self.ask(&Request::Metrics, &[]) {
            Response::Metrics(metrics) => *metrics,
            other => panic!("{other:?}"),
        }
    }

    /// Configures and starts a guest; its serial output goes to the file that is returned.
    pub fn boot(&mut self, code: &Code) -> File {
        let serial = tempfile::tempfile().unwrap();
        self.order(
            &Request::Configure(Box::new(config())),
            &[&code.kernel(), &serial],
        );
        self.order(&Request::Start, &[]);
        serial
    }
}

/// A small machine: kernel and serial output are descriptors 0 and 1.
pub fn config() -> VmConfig {
    VmConfig {
        vcpus: 1,
        boot_vcpus: 1,
        memory_mib: 32,
        pluggable: None,
        kernel: FdIndex(0),
        initrd: None,
        cmdline: String::new(),
        serial: Some(FdIndex(1)),
        devices: vec![],
    }
}

/// Waits for something that another process does.
pub fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "this takes too long");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns what is in a file, whatever its offset.
pub fn content(file: &File) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// 64-bit machine code, started with flat segments and identity-mapped memory below 4 GiB.
#[derive(Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// Adds instructions.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov eax, value`
    pub fn load(self, value: u32) -> Self {
        self.raw(&[0xb8]).raw(&value.to_le_bytes())
    }

    /// `mov ebx, address; mov eax, [rbx]`
    pub fn read(self, address: u32) -> Self {
        self.raw(&[0xbb])
            .raw(&address.to_le_bytes())
            .raw(&[0x8b, 0x03])
    }

    /// `mov ebx, address; mov dword [rbx], value`
    pub fn write(self, address: u32, value: u32) -> Self {
        self.raw(&[0xbb])
            .raw(&address.to_le_bytes())
            .raw(&[0xc7, 0x03])
            .raw(&value.to_le_bytes())
    }

    /// Repeats the read until it gives something else than 0 (`test eax, eax; jz`).
    pub fn read_until_nonzero(self, address: u32) -> Self {
        self.raw(&[0xbb])
            .raw(&address.to_le_bytes())
            .raw(&[0x8b, 0x03, 0x85, 0xc0, 0x74, 0xfa])
    }

    /// `mov edx, port; in eax, dx`
    pub fn port_in(self, port: u16) -> Self {
        self.raw(&[0xba])
            .raw(&u32::from(port).to_le_bytes())
            .raw(&[0xed])
    }

    /// `mov edx, port; out dx, al`
    pub fn port_out(self, port: u16) -> Self {
        self.raw(&[0xba])
            .raw(&u32::from(port).to_le_bytes())
            .raw(&[0xee])
    }

    /// Sends the four bytes of eax to COM1.
    pub fn print(self) -> Self {
        (0..4).fold(self, |code, _| {
            code.port_out(0x3f8).raw(&[0xc1, 0xe8, 0x08])
        })
    }

    /// `ud2` without an interrupt table: a triple fault.
    pub fn die(self) -> Self {
        self.raw(&[0x0f, 0x0b])
    }

    /// `jmp $`
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Wraps the code in an ELF file.
    pub fn kernel(&self) -> File {
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        // Executable for x86-64, version 1; entry; program headers at 64; flags, sizes, counts.
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend(ENTRY.to_le_bytes());
        elf.extend(64u64.to_le_bytes());
        elf.extend([0; 12]);
        elf.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // PT_LOAD, RWX; offset, virtual and physical address, sizes in file and memory, alignment.
        elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        let length = self.0.len() as u64;
        for value in [120, ENTRY, ENTRY, length, length, 4096] {
            elf.extend(u64::to_le_bytes(value));
        }
        elf.extend(&self.0);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        file
    }
}
