//! What the guest is given to attack, and what must not change.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hull_hostile_guest::attack::{CID, DISK_SECTORS, PATTERN, TARGETS};
use hull_proto_vmm::{DeviceConfig, Extent, FdIndex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use tempfile::TempDir;

use crate::support::content;
use crate::support::linux::tap;

/// Half of a disk in bytes; each is an extent.
const HALF: u64 = DISK_SECTORS * 512 / 2;
/// Bytes around the extents, which are nobody's to change.
const AROUND: u64 = 1 << 16;
const CANARY: u8 = 0xc5;
const PMEM: usize = 8192;
/// Clients of the guest at a time.
const CLIENTS: usize = 2;
/// The guest's port that they connect to.
const PORT: u32 = 1024;

/// Requests of FUSE that have no answer, and one that never comes.
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;
const INTERRUPT: u32 = 36;

/// The host's side of all devices.
pub struct World {
    disk: File,
    fixed: File,
    pmem: File,
    taps: Vec<File>,
    listener: File,
    server: File,
    faults: Arc<Mutex<Vec<String>>>,
    peers: Peers,
    _directory: TempDir,
}

impl World {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = File::from(OwnedFd::from(UnixListener::bind(&path).unwrap()));
        let flags = SocketFlags::CLOEXEC;
        let (server, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let faults = Arc::default();
        let ended = Arc::new(AtomicBool::new(false));
        let (end, seen) = (Arc::clone(&ended), Arc::clone(&faults));
        let files = thread::spawn(move || serve_files(&theirs, &end, &seen));
        let end = Arc::clone(&ended);
        let clients = thread::spawn(move || connect_clients(&path, &end));
        let world = Self {
            disk: tempfile::tempfile().unwrap(),
            fixed: pattern(2 * HALF as usize),
            pmem: pattern(PMEM),
            taps: taps(),
            listener,
            server: File::from(server),
            faults,
            peers: Peers {
                ended,
                threads: vec![files, clients],
            },
            _directory: directory,
        };
        let size = 3 * AROUND + 2 * HALF;
        world
            .disk
            .write_all_at(&vec![CANARY; size as usize], 0)
            .unwrap();
        for start in extents() {
            world
                .disk
                .write_all_at(&bytes(HALF as usize), start)
                .unwrap();
        }
        world
    }

    /// Returns the devices by slot, and the descriptors that they name from `first` on.
    pub fn devices(&self, first: u32) -> (Vec<(u8, DeviceConfig)>, Vec<&File>) {
        let mut fds = vec![
            &self.disk,
            &self.fixed,
            &self.pmem,
            &self.listener,
            &self.server,
        ];
        let index = |at: u32| FdIndex(first + at);
        let block = |serial: &str, readonly, extents| DeviceConfig::Block {
            serial: serial.into(),
            readonly,
            extents,
        };
        let part = |file, offset, length| Extent {
            file: index(file),
            offset,
            length,
        };
        let halves = extents().map(|start| part(0, start, HALF)).to_vec();
        let mut devices = vec![
            (1, DeviceConfig::Rng),
            (8, DeviceConfig::Balloon),
            (9, DeviceConfig::Memory),
            (2, block("disk", false, halves)),
            (3, block("fixed", true, vec![part(1, 0, 2 * HALF)])),
            (
                4,
                DeviceConfig::Pmem {
                    extents: vec![part(2, 0, PMEM as u64)],
                },
            ),
            (
                6,
                DeviceConfig::Vsock {
                    cid: CID,
                    listener: index(3),
                },
            ),
            (
                7,
                DeviceConfig::Fs {
                    tag: "files".into(),
                    socket: index(4),
                },
            ),
        ];
        if !self.taps.is_empty() {
            let taps = (0..self.taps.len() as u32)
                .map(|at| index(5 + at))
                .collect();
            let mac = [2, 0, 0, 0, 0, 9];
            devices.push((
                5,
                DeviceConfig::Net {
                    taps,
                    mac,
                    mtu: None,
                },
            ));
            fds.extend(&self.taps);
        }
        (devices, fds)
    }

    /// Returns the bits of the devices that are there.
    pub fn there(&self) -> u16 {
        let bits = TARGETS.iter().enumerate();
        let there = bits.filter(|(_, target)| target.name != "net" || !self.taps.is_empty());
        there.map(|(bit, _)| 1u16 << bit).sum()
    }

    /// Ends the clients, so that their descriptors go.
    pub fn hang_up(&mut self) {
        self.peers.end();
    }

    /// Returns what is not as it was, or came to the host as it never should.
    pub fn damage(&self) -> Vec<String> {
        let mut damage = self.faults.lock().unwrap().clone();
        let disk = content(&self.disk);
        let is_inside = |at: usize| {
            extents()
                .iter()
                .any(|start| (*start..start + HALF).contains(&(at as u64)))
        };
        if disk.len() as u64 != 3 * AROUND + 2 * HALF {
            damage.push(format!("the disk's file has {} bytes", disk.len()));
        }
        let mut around = disk.iter().enumerate().filter(|(at, _)| !is_inside(*at));
        if let Some((at, byte)) = around.find(|(_, byte)| **byte != CANARY) {
            damage.push(format!(
                "byte {at} of the disk's file, outside of the disk, is {byte:#x}"
            ));
        }
        if content(&self.fixed) != bytes(2 * HALF as usize) {
            damage.push("the read-only disk was changed".into());
        }
        if content(&self.pmem) != bytes(PMEM) {
            damage.push("the file of the read-only memory was changed".into());
        }
        damage
    }
}

struct Peers {
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Peers {
    fn end(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.threads
            .drain(..)
            .for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.end();
    }
}

fn extents() -> [u64; 2] {
    [AROUND, 2 * AROUND + HALF]
}

fn bytes(length: usize) -> Vec<u8> {
    PATTERN.to_le_bytes().repeat(length / 4)
}

fn pattern(length: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes(length), 0).unwrap();
    file
}

/// Makes the two queues of a tap in a network namespace of its own; none where that can't be.
fn taps() -> Vec<File> {
    let make = || {
        // SAFETY: this thread alone gets another network namespace, and ends soon.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || File::open("/dev/net/tun").is_err()
        {
            println!(
                "SKIPPED: network card: there is no tap: {}",
                io::Error::last_os_error()
            );
            return Vec::new();
        }
        let taps = tap("hostile", 2);
        bring_up("hostile");
        taps
    };
    thread::spawn(make).join().unwrap()
}

fn bring_up(name: &str) {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

/// The file server: refuses all that is a request of FUSE, and notes what is none.
fn serve_files(socket: &OwnedFd, ended: &AtomicBool, faults: &Mutex<Vec<String>>) {
    let mut packet = vec![0; 4 << 20];
    while !ended.load(Ordering::SeqCst) {
        if !is_ready(socket) {
            continue;
        }
        let Ok((length, _)) = recv(socket, &mut packet, RecvFlags::DONTWAIT) else {
            continue;
        };
        if length == 0 {
            return;
        }
        let word = |at: usize| u32::from_le_bytes(*packet[at..].first_chunk().unwrap());
        if length < 40 || word(0) as usize != length || word(4) == INTERRUPT {
            let start = packet.get(..length.min(40)).unwrap();
            let mut faults = faults.lock().unwrap();
            faults.push(format!("the file server got {length} bytes: {start:02x?}"));
            continue;
        }
        if [FORGET, BATCH_FORGET].contains(&word(4)) {
            continue;
        }
        let mut reply = [0; 16];
        reply[0] = 16;
        reply[4..8].copy_from_slice(&(-libc::ENOSYS).to_le_bytes());
        // Now and then an answer to what nobody asked.
        for stray in [word(4) % 8 == 5, false] {
            reply[8..16].copy_from_slice(&packet[8..16]);
            reply[15] = if stray { 0xff } else { packet[15] };
            if stray || reply[15] != 0xff {
                let _ = send(socket, &reply, SendFlags::NOSIGNAL);
            }
        }
    }
}

/// Clients of the guest that say something, and read nothing.
fn connect_clients(path: &std::path::Path, ended: &AtomicBool) {
    let mut clients: Vec<UnixStream> = Vec::new();
    while !ended.load(Ordering::SeqCst) {
        // What was hung up may still have bytes to read.
        clients.retain(|client| {
            !events(client, Duration::ZERO).intersects(PollFlags::HUP | PollFlags::ERR)
        });
        if clients.len() < CLIENTS
            && let Ok(client) = UnixStream::connect(path)
        {
            let hello = format!("CONNECT {PORT}\nabc");
            let _ = send(&client, hello.as_bytes(), SendFlags::NOSIGNAL);
            clients.push(client);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_ready(socket: &impl AsFd) -> bool {
    !events(socket, Duration::from_millis(50)).is_empty()
}

fn events(socket: &impl AsFd, limit: Duration) -> PollFlags {
    let limit = Timespec::try_from(limit).ok();
    let mut sockets = [PollFd::new(socket, PollFlags::IN)];
    let _ = poll(&mut sockets, limit.as_ref());
    sockets[0].revents()
}
