//! The part that faces the guest: threads that take a request each, and a file system for each
//! owner's shares.
//!
//! Each owner has a file system of its own, so that all that the guest holds of an owner's files
//! is let go of when its shares end: else the host could not take away what is mounted there.

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::api::{Vfs, VfsOptions};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};
use hull_proto_vmm::fs::MAX_PACKET;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use crate::filter::{self, Verdict};
use crate::jail::{self, JailError};
use crate::session;

/// Requests at a time: a slow one, of a network file system, must not hold up all others.
const THREADS: usize = 4;
/// The stack of such a thread. Only what is touched costs memory.
const STACK: usize = 512 << 10;
/// How long a guest may believe in attributes.
const ATTRIBUTES: Duration = Duration::from_secs(1);
/// What the server says when it is ready for commands.
pub const READY: &str = "ready";
/// What the server answers to a command that it carried out.
pub const OK: &str = "ok";

/// Why the server ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It can't be locked in.
    #[error("lock the file server in")]
    Jail(#[from] JailError),
    /// Standard input or output is not what it should be, or there are no threads.
    #[error("start the file server")]
    Start(#[source] io::Error),
    /// The manager's connection failed.
    #[error("speak with the manager")]
    Manager(#[source] io::Error),
}

/// Serves until the VM or the manager is gone: FUSE on standard input, the manager's commands on
/// standard output.
///
/// # Errors
/// [`ServerError`]
pub fn run(root: &Path) -> Result<(), ServerError> {
    // Its file name is that of a link.
    let _ = rustix::thread::set_name(c"hull-fs");
    jail::enter(root)?;
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(ServerError::Start);
    let fuse = Arc::new(own(io::stdin().as_fd())?);
    let manager = Arc::new(UnixStream::from(own(io::stdout().as_fd())?));
    let files = Arc::new(new_vfs());
    let server = Arc::new(Server::new(Arc::clone(&files)));
    for number in 0..THREADS {
        let (fuse, files) = (Arc::clone(&fuse), Arc::clone(&files));
        let (server, manager) = (Arc::clone(&server), Arc::clone(&manager));
        thread::Builder::new()
            .name(format!("fuse{number}"))
            .stack_size(STACK)
            .spawn(move || {
                serve(&fuse, &files, &server);
                // The VM is gone: this ends the loop below, and with it the process.
                let _ = manager.shutdown(Shutdown::Both);
            })
            .map_err(ServerError::Start)?;
    }
    obey(&manager, &files).map_err(ServerError::Manager)
}

fn new_vfs() -> Vfs {
    let mut files = Vfs::new(VfsOptions {
        no_open: false,
        no_opendir: false,
        no_writeback: true,
        killpriv_v2: true,
        out_opts: FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::ASYNC_DIO
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::HANDLE_KILLPRIV_V2,
        ..VfsOptions::default()
    });
    // An owner that is gone is not listed.
    files.set_remove_pseudo_root();
    files
}

/// Carries out commands until there are no more.
fn obey(manager: &UnixStream, files: &Vfs) -> io::Result<()> {
    let mut replies: &UnixStream = manager;
    writeln!(replies, "{READY}")?;
    for line in BufReader::new(manager).lines() {
        let done = match line?.split_once(' ') {
            Some(("add", owner)) => add(files, owner),
            Some(("remove", owner)) => remove(files, owner),
            _ => Err("no such command".to_owned()),
        };
        match done {
            Ok(()) => writeln!(replies, "{OK}")?,
            Err(error) => writeln!(replies, "{}", error.replace('\n', " "))?,
        }
    }
    Ok(())
}

fn add(files: &Vfs, owner: &str) -> Result<(), String> {
    let path = format!("/{owner}");
    let config = Config {
        root_dir: path.clone(),
        do_import: false,
        // Every walk of a path asks here, and brings fresh attributes along: what the host changes
        // is seen at once. An open file's are kept for a moment, or each read would ask for them.
        entry_timeout: Duration::ZERO,
        attr_timeout: ATTRIBUTES,
        cache_policy: CachePolicy::Auto,
        xattr: true,
        killpriv_v2: true,
        ..Config::default()
    };
    let share = PassthroughFs::<()>::new(config).map_err(|e| e.to_string())?;
    share.import().map_err(|e| e.to_string())?;
    let mounted = files.mount(Box::new(share), &path);
    mounted.map(drop).map_err(|e| e.to_string())
}

fn remove(files: &Vfs, owner: &str) -> Result<(), String> {
    let path = format!("/{owner}");
    match files.get_rootfs(&path) {
        Ok(Some(_)) => files.umount(&path).map(drop).map_err(|e| e.to_string()),
        // Never added, or removed before.
        _ => Ok(()),
    }
}

/// Takes and answers requests until the other end is closed.
fn serve(fuse: &OwnedFd, files: &Vfs, server: &Server<Arc<Vfs>>) {
    let mut buffer = vec![0; MAX_PACKET];
    let mut reply = vec![0; MAX_PACKET];
    loop {
        let length = match recv(fuse, buffer.as_mut_slice(), RecvFlags::TRUNC) {
            Ok((_, length)) if length > buffer.len() => 0,
            Ok((_, 0)) => return,
            Ok((_, length)) => length,
            Err(Errno::INTR | Errno::NOMEM | Errno::NOBUFS) => continue,
            Err(_) => return,
        };
        let packet = &mut buffer[..length];
        let verdict = filter::judge(packet);
        match verdict {
            Verdict::Drop => continue,
            Verdict::Refuse(error) => {
                let _ = send(fuse, &filter::refusal(packet, error), SendFlags::NOSIGNAL);
                continue;
            }
            // A session that was not ended goes with the guest's kernel that had it.
            Verdict::Begin => files.destroy(),
            Verdict::Pass => {}
        }
        let header = packet[..filter::IN_HEADER].to_vec();
        let handled = match verdict {
            Verdict::Begin => begin(fuse, server, packet, &mut reply),
            _ => handle(fuse, server, packet, &mut reply),
        };
        if !handled && filter::is_answered(&header) {
            // Not a request, or its answer could not be sent whole. A second answer is ignored.
            let refusal = filter::refusal(&header, libc::EIO);
            let _ = send(fuse, &refusal, SendFlags::NOSIGNAL);
        }
    }
}

/// Has the file system handle a request and send its answer, if it has one, on `socket`. False: it
/// is no request, or the answer could not be sent whole.
fn handle(
    socket: &OwnedFd,
    server: &Server<Arc<Vfs>>,
    packet: &mut [u8],
    reply: &mut [u8],
) -> bool {
    let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(packet));
    let writer = FuseDevWriter::<()>::new(socket.as_raw_fd(), reply);
    let (Ok(reader), Ok(writer)) = (reader, writer) else {
        return false;
    };
    let handled = server.handle_message(reader, writer.into(), None, None);
    handled.is_ok()
}

/// As [`handle`], for the request that begins a session: its answer is seen here first.
fn begin(fuse: &OwnedFd, server: &Server<Arc<Vfs>>, packet: &mut [u8], reply: &mut [u8]) -> bool {
    if !session::offers_mapping(packet) {
        return handle(fuse, server, packet, reply);
    }
    let flags = SocketFlags::CLOEXEC;
    let Ok((ours, theirs)) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
    else {
        return false;
    };
    if !handle(&theirs, server, packet, reply) {
        return false;
    }
    let Ok((_, length)) = recv(&ours, &mut *reply, RecvFlags::DONTWAIT) else {
        return false;
    };
    let answer = &mut reply[..length];
    session::allow_mapping(answer);
    send(fuse, answer, SendFlags::NOSIGNAL).is_ok()
}
