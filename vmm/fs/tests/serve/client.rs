//! A FUSE client for tests: what a guest's kernel says, and what only a hostile one would.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hull_proto_vmm::fs::{
    Access, MAX_PACKET, Owner, Propagation, Request, Response, SEND_BUFFER, Share,
};
use hull_proto_vmm::{body_length, decode, encode};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const CREATE: u32 = 35;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
/// The root of what is served.
pub const ROOT: u64 = 1;

/// What a request came to: the reply's body, or an error number.
pub type Answer = Result<Vec<u8>, i32>;

/// What a guest knew of a server.
pub struct Saved {
    pub owners: Vec<Owner>,
    pub state: Vec<u8>,
}

/// A running server and the other ends of its sockets.
pub struct Server {
    pub process: Child,
    pub run: tempfile::TempDir,
    pub vm: Option<OwnedFd>,
    unique: u64,
    pub uid: u32,
    pub gid: u32,
    /// kubelet's id of the pod whose files are shared next.
    pub pod_uid: String,
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts one that can't have more descriptors than these.
    pub fn start_with_descriptors(count: u64) -> Self {
        Self::start_with(|command| {
            let limit = Rlimit {
                current: Some(count),
                maximum: Some(count),
            };
            let restrict = move || {
                setrlimit(Resource::Nofile, limit)?;
                // Or it would lift the limit.
                remove_capability_from_bounding_set(CapabilitySet::SYS_RESOURCE)?;
                Ok(())
            };
            // SAFETY: nothing but system calls between fork and exec.
            unsafe { command.pre_exec(restrict) };
        })
    }

    /// Starts one where another was killed.
    pub fn start_after_a_killed_one() -> Self {
        let run = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(run.path().join("fs.sock")).unwrap());
        Self::start_in(run, |_| {})
    }

    fn start_with(prepare: impl FnOnce(&mut Command)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), prepare)
    }

    fn start_in(run: tempfile::TempDir, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut server = Self::spawn(run, prepare);
        assert!(server.init(0).is_ok());
        server
    }

    /// Starts one that a guest goes on with which had another. Its shares have these paths instead; returns the
    /// answer, too.
    pub fn resume(saved: &Saved, path: impl Fn(&Path) -> PathBuf) -> (Self, Response) {
        let server = Self::spawn(tempfile::tempdir().unwrap(), |_| {});
        let mut owners = saved.owners.clone();
        for (_, share) in owners.iter_mut().flat_map(|owner| &mut owner.shares) {
            share.path = path(&share.path);
        }
        let state = saved.state.clone();
        let answer = server.resumed(&Saved { owners, state });
        (server, answer)
    }

    /// Asks it to go on with what a guest knew of another.
    pub fn resumed(&self, saved: &Saved) -> Response {
        let request = Request::Resume {
            owners: saved.owners.clone(),
            uid: String::new(),
            bytes: saved.state.len() as u64,
        };
        self.exchange(&request, &saved.state).0
    }

    /// What another is to go on with.
    pub fn save(&self) -> Saved {
        match self.exchange(&Request::Save, &[]) {
            (Response::Saved { owners, bytes }, state) => {
                assert_eq!(state.len() as u64, bytes);
                Saved { owners, state }
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    fn spawn(run: tempfile::TempDir, prepare: impl FnOnce(&mut Command)) -> Self {
        let (vm, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        for end in [&vm, &theirs] {
            sockopt::set_socket_send_buffer_size_force(end, SEND_BUFFER).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull-fs"));
        command
            .args(["run", "--id", "test", "--socket"])
            .arg(run.path().join("fs.sock"))
            .stdin(Stdio::from(theirs));
        prepare(&mut command);
        let process = command.spawn().unwrap();
        // It has the other end of the socket, too.
        drop(command);
        let mut server = Self {
            process,
            run,
            vm: Some(vm),
            unique: 0,
            uid: 0,
            gid: 0,
            pod_uid: String::new(),
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(server.socket()).is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            assert!(server.process.try_wait().unwrap().is_none(), "it ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.run.path().join("fs.sock")
    }

    /// Asks what the daemon asks.
    pub fn ask(&self, request: &Request) -> Response {
        self.exchange(request, &[]).0
    }

    /// Asks with bytes that follow the request; returns those that follow the answer, too.
    fn exchange(&self, request: &Request, more: &[u8]) -> (Response, Vec<u8>) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(&encode(request).unwrap()).unwrap();
        stream.write_all(more).unwrap();
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).unwrap();
        let mut body = vec![0; body_length(prefix).unwrap()];
        stream.read_exact(&mut body).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        (decode(&body).unwrap(), rest)
    }

    pub fn add(&self, owner: &str, shares: &[(&Path, Access, Propagation)]) -> Response {
        self.ask(&Request::Add {
            owner: owner.into(),
            shares: shares
                .iter()
                .map(|(path, access, propagation)| Share {
                    path: path.to_path_buf(),
                    access: *access,
                    propagation: *propagation,
                })
                .collect(),
            uid: self.pod_uid.clone(),
        })
    }

    /// Shares one path read-write; returns its inode.
    pub fn share(&mut self, path: &Path) -> u64 {
        self.share_as(path, Access::ReadWrite, Propagation::Private)
    }

    pub fn share_as(&mut self, path: &Path, access: Access, propagation: Propagation) -> u64 {
        let added = self.add("o", &[(path, access, propagation)]);
        assert!(matches!(added, Response::Added { .. }), "{added:?}");
        let owner = self.lookup(ROOT, "o").unwrap();
        self.lookup(owner, "0").unwrap()
    }

    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.unique += 2;
        let mut packet = ((40 + body.len()) as u32).to_le_bytes().to_vec();
        packet.extend_from_slice(&opcode.to_le_bytes());
        packet.extend_from_slice(&self.unique.to_le_bytes());
        packet.extend_from_slice(&node.to_le_bytes());
        packet.extend_from_slice(&self.uid.to_le_bytes());
        packet.extend_from_slice(&self.gid.to_le_bytes());
        packet.extend_from_slice(&[0; 8]);
        packet.extend_from_slice(body);
        let vm = self.vm.as_ref().unwrap();
        rustix::net::send(vm, &packet, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        self.send(opcode, node, body);
        let reply = loop {
            let mut reply = vec![0; MAX_PACKET];
            let vm = self.vm.as_ref().unwrap();
            let (_, length) =
                rustix::net::recv(vm, reply.as_mut_slice(), RecvFlags::empty()).unwrap();
            reply.truncate(length);
            assert_eq!(u32_at(&reply, 0) as usize, length);
            // What is no request may be answered twice; the VMM ignores the second, too.
            if u64_at(&reply, 8) == self.unique {
                break reply;
            }
        };
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    /// Begins a session with all flags of the lower word, and these of the upper.
    pub fn init(&mut self, upper: u32) -> Answer {
        let mut body = Vec::new();
        for word in [7_u32, 41, 1 << 17, u32::MAX, upper] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(&[0; 44]);
        self.call(INIT, 0, &body)
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let entry = self.call(LOOKUP, parent, &text(name))?;
        Ok(u64_at(&entry, 0))
    }

    /// What a lookup finds.
    pub fn entry(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(LOOKUP, parent, &text(name))
            .map(|entry| Entry::read(&entry))
    }

    /// Mode, user and group of what a lookup finds.
    pub fn attributes(&mut self, parent: u64, name: &str) -> Result<(u32, u32, u32), i32> {
        let entry = self.call(LOOKUP, parent, &text(name))?;
        // 40 bytes of the entry, then 60 of attributes before the mode.
        let at = 40 + 60;
        Ok((
            u32_at(&entry, at),
            u32_at(&entry, at + 8),
            u32_at(&entry, at + 12),
        ))
    }

    /// Opens a file or directory; returns its handle.
    pub fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        Ok(self.opened(opcode, node, flags)?.handle)
    }

    /// Opens a file or directory; returns all that is told of it.
    pub fn opened(&mut self, opcode: u32, node: u64, flags: i32) -> Result<Opened, i32> {
        let body = [(flags as u32).to_le_bytes(), [0; 4]].concat();
        Ok(Opened::read(&self.call(opcode, node, &body)?))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        self.call(READ, node, &transfer(handle, offset, size))
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Answer {
        let mut body = transfer(handle, offset, data.len() as u32);
        // The flags of the open file: checked against those that the server has.
        body[32..36].copy_from_slice(&(libc::O_RDWR as u32).to_le_bytes());
        body.extend_from_slice(data);
        self.call(WRITE, node, &body)
    }

    /// Finds data or a hole.
    pub fn seek(&mut self, node: u64, handle: u64, offset: u64, whence: i32) -> Result<u64, i32> {
        let body = [handle, offset, u64::from(whence as u32)];
        let reply = self.call(LSEEK, node, &body.map(u64::to_le_bytes).concat())?;
        assert_eq!(reply.len(), 8);
        Ok(u64_at(&reply, 0))
    }

    /// Creates and opens a file; returns node and handle.
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        self.create_masked(parent, name, mode, 0)
    }

    /// As [`Server::create`], of a process with this mask.
    pub fn create_masked(
        &mut self,
        parent: u64,
        name: &str,
        mode: u32,
        mask: u32,
    ) -> Result<(u64, u64), i32> {
        let reply = self.request_create(parent, name, mode, mask)?;
        Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
    }

    /// Creates and opens a file; returns all that is told of it.
    pub fn make(&mut self, parent: u64, name: &str) -> Result<(Entry, Opened), i32> {
        let reply = self.request_create(parent, name, 0o100_600, 0)?;
        Ok((Entry::read(&reply), Opened::read(&reply[128..])))
    }

    fn request_create(&mut self, parent: u64, name: &str, mode: u32, mask: u32) -> Answer {
        let mut body = Vec::new();
        for word in [(libc::O_RDWR | libc::O_CREAT) as u32, mode, mask, 0] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(&text(name));
        self.call(CREATE, parent, &body)
    }

    /// The whole of a small file.
    pub fn cat(&mut self, parent: u64, name: &str) -> Result<String, i32> {
        let node = self.lookup(parent, name)?;
        self.cat_node(node)
    }

    pub fn cat_node(&mut self, node: u64) -> Result<String, i32> {
        let handle = self.open(OPEN, node, libc::O_RDONLY)?;
        let data = self.read(node, handle, 0, 4096)?;
        Ok(String::from_utf8(data).unwrap())
    }

    pub fn names(&mut self, node: u64) -> Vec<String> {
        let handle = self.open(OPENDIR, node, libc::O_RDONLY).unwrap();
        let data = self
            .call(READDIR, node, &transfer(handle, 0, 8192))
            .unwrap();
        let mut names = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let length = u32_at(&data, at + 16) as usize;
            let name = &data[at + 24..at + 24 + length];
            names.push(String::from_utf8(name.to_vec()).unwrap());
            at += (24 + length).next_multiple_of(8);
        }
        names
    }

    /// Forgets files, so many times each.
    pub fn forget(&mut self, files: &[(u64, u64)]) {
        if let [(node, count)] = files {
            return self.send(FORGET, *node, &count.to_le_bytes());
        }
        let mut body = (files.len() as u64).to_le_bytes().to_vec();
        for (node, count) in files {
            body.extend_from_slice(&node.to_le_bytes());
            body.extend_from_slice(&count.to_le_bytes());
        }
        self.send(BATCH_FORGET, 0, &body);
    }

    /// Releases what was opened with `opcode`.
    pub fn release(&mut self, opcode: u32, node: u64, handle: u64) -> Answer {
        let body = [&handle.to_le_bytes()[..], &[0; 16]].concat();
        self.call(opcode, node, &body)
    }

    /// The process that serves.
    pub fn serving(&self) -> u32 {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.unwrap().trim().parse().unwrap()
    }

    /// How many descriptors that process has.
    pub fn descriptors(&self) -> usize {
        let directory = std::fs::read_dir(format!("/proc/{}/fd", self.serving()));
        directory.unwrap().count()
    }

    /// What that process has in memory of its own, in KiB.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.serving())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let size = line.unwrap().trim().strip_suffix(" kB").unwrap();
        size.parse().unwrap()
    }

    /// Waits for the process to end by itself.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if self.process.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the guest is told of a file: a `fuse_entry_out`, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub generation: u64,
    /// How long the entry and the attributes may be believed, in nanoseconds.
    pub lives: [u64; 2],
    pub size: u64,
}

impl Entry {
    pub fn read(entry: &[u8]) -> Self {
        let life =
            |seconds, rest| u64_at(entry, seconds) * 1_000_000_000 + u64::from(u32_at(entry, rest));
        Self {
            node: u64_at(entry, 0),
            generation: u64_at(entry, 8),
            lives: [life(16, 32), life(24, 36)],
            size: u64_at(entry, 48),
        }
    }
}

/// A `fuse_open_out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    pub handle: u64,
    /// FOPEN_ flags.
    pub flags: u32,
}

impl Opened {
    fn read(reply: &[u8]) -> Self {
        Self {
            handle: u64_at(reply, 0),
            flags: u32_at(reply, 8),
        }
    }
}

pub fn transfer(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&size.to_le_bytes());
    body.extend_from_slice(&[0; 20]);
    body
}

pub fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Where a directory goes on after these entries of FUSE_READDIRPLUS.
pub fn last_offset(entries: &[u8]) -> Option<u64> {
    let (mut at, mut last) = (0, None);
    while at < entries.len() {
        // 128 bytes of the entry, then number, offset, length of the name and type.
        let listed = at + 128;
        last = Some(u64_at(entries, listed + 8));
        let length = u32_at(entries, listed + 16) as usize;
        at = listed + (24 + length).next_multiple_of(8);
    }
    last
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
