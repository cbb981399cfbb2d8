//! The part that faces the guest: threads that take a request each, and a file system for each
//! owner's shares.
//!
//! Each owner has a file system of its own, so that all that the guest holds of an owner's files
//! is let go of when its shares end: else the host could not take away what is mounted there.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fuse_backend_rs::api::Vfs;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};
use hull_jail::JailError;
use hull_proto_vmm::fs::MAX_PACKET;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::process::umask;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::files::{Files, WithoutFsetid};
use crate::filter::{self, Verdict};
use crate::jail;
use crate::packet::{self, IN_HEADER};
use crate::renumber::{Known, Renumbered};
use crate::saved;
use crate::seccomp::REQUESTS;
use crate::session;

/// Requests at a time: a slow one, of a network file system, must not hold up all others.
const THREADS: usize = 4;
/// The stack of such a thread. Only what is touched costs memory.
const STACK: usize = 512 << 10;
/// How often files are let go of that the host deleted. For each that the guest holds and has not open,
/// it takes a microsecond or two.
const SWEEP: Duration = Duration::from_secs(5);
/// What the server says when it is ready for commands.
pub const READY: &str = "ready";
/// How the server's answer to a command begins that it carried out.
pub const OK: &str = "ok";

/// Why the server ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The process can't be locked in.
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
    jail::enter(root)?;
    bound_arenas();
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(ServerError::Start);
    let fuse = Arc::new(own(io::stdin().as_fd())?);
    let manager = Arc::new(UnixStream::from(own(io::stdout().as_fd())?));
    let files = Arc::new(Files::default());
    let server = Arc::new(Server::new(Arc::clone(&files.vfs)));
    for number in 0..THREADS {
        let (fuse, files) = (Arc::clone(&fuse), Arc::clone(&files));
        let (server, manager) = (Arc::clone(&server), Arc::clone(&manager));
        thread::Builder::new()
            .name(format!("fuse{number}"))
            .stack_size(STACK)
            .spawn(move || {
                // SAFETY: the table of file descriptors is not unshared. What is, are the mask and
                // the directories of the process.
                let own = unsafe { unshare_unsafe(UnshareFlags::FS) };
                match own.and_then(|()| Inside::new()) {
                    Ok(inside) => {
                        REQUESTS.apply_or_abort();
                        serve(&fuse, &files, &server, &inside);
                    }
                    Err(error) => eprintln!("hull-fs: prepare a thread: {error}"),
                }
                // The VM is gone: this ends the loop below, and with it the process.
                let _ = manager.shutdown(Shutdown::Both);
            })
            .map_err(ServerError::Start)?;
    }
    let serving = Serving {
        files: &files,
        server: &server,
        inside: Inside::new().map_err(|error| ServerError::Start(error.into()))?,
    };
    serve_manager(&manager, &serving).map_err(ServerError::Manager)
}

/// Has the C library's allocator keep one arena for all threads. To give back memory of another, it would
/// read whether the host overcommits, which a thread that takes requests may not.
fn bound_arenas() {
    // SAFETY: there is one thread, and the setting is one of mallopt(3).
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        eprintln!("hull-fs: the allocator takes no bound of its arenas");
    }
}

/// What the manager's commands are about.
struct Serving<'a> {
    files: &'a Files,
    server: &'a Server<Arc<Vfs>>,
    inside: Inside,
}

impl Serving<'_> {
    /// Goes on with what a guest knew of another server; returns how much of it is not there.
    fn resume(&self, state: &[u8]) -> Result<String, String> {
        let mut reply = vec![0; MAX_PACKET];
        let begin = |init: &mut [u8]| {
            self.files.begin(init);
            self.inside
                .carry_out(self.server, init, &mut reply)
                .is_some()
        };
        let (numbers, lost) = saved::resume(self.files, state, begin)?;
        self.files.renumber(numbers);
        Ok(lost.to_string())
    }
}

/// Carries out the manager's commands until there are no more. Between them, lets go of what the host
/// deleted: on this thread, so that a share is not removed meanwhile.
///
/// A command is a line; so is the answer, which begins with [`OK`] or says why not. After the lines of `resume` and
/// `save` there are as many bytes as they say.
fn serve_manager(manager: &UnixStream, serving: &Serving<'_>) -> io::Result<()> {
    let files = serving.files;
    let mut replies: &UnixStream = manager;
    writeln!(replies, "{READY}")?;
    let mut commands = BufReader::new(manager);
    let mut line = String::new();
    let mut next = Instant::now() + SWEEP;
    loop {
        if commands.buffer().is_empty() && !wait(manager, next)? {
            files.let_go_of_deleted();
            next = Instant::now() + SWEEP;
            continue;
        }
        line.clear();
        if commands.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut state = Vec::new();
        let done = match line.trim_end_matches('\n').split_once(' ') {
            Some(("add", owner)) => files.add(owner).map(|()| String::new()),
            Some(("remove", owner)) => files.remove(owner).map(|()| String::new()),
            Some(("private", devices)) => files.private.set(devices).map(|()| String::new()),
            Some(("save", _)) => saved::save(files).map(|saved| {
                state = saved;
                state.len().to_string()
            }),
            Some(("resume", length)) => {
                let length = length.parse().unwrap_or_default();
                commands.by_ref().take(length).read_to_end(&mut state)?;
                serving.resume(&std::mem::take(&mut state))
            }
            _ => Err("no such command".to_owned()),
        };
        match done {
            Ok(answer) => writeln!(replies, "{OK} {answer}")?,
            Err(error) => writeln!(replies, "{}", error.replace('\n', " "))?,
        }
        replies.write_all(&state)?;
    }
}

/// Waits until something is there to read, or its end. False: it is `end` first.
fn wait(manager: &UnixStream, end: Instant) -> io::Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(manager, PollFlags::IN)], left.as_ref()) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes and answers requests until the other end is closed.
fn serve(fuse: &OwnedFd, files: &Files, server: &Server<Arc<Vfs>>, inside: &Inside) {
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
                let _ = send(fuse, &packet::refusal(packet, error), SendFlags::NOSIGNAL);
                continue;
            }
            Verdict::Begin => files.begin(packet),
            Verdict::Pass | Verdict::Lower | Verdict::Seek | Verdict::Acl => {}
        }
        let header = packet[..IN_HEADER].to_vec();
        let numbers = files.renumbered();
        match numbers.as_ref().map(|numbers| numbers.request(packet)) {
            None | Some(Known::All) => {}
            Some(Known::Nothing) => continue,
            Some(Known::Lost(error)) => {
                let _ = send(fuse, &packet::refusal(&header, error), SendFlags::NOSIGNAL);
                continue;
            }
        }
        if let Some(mask) = filter::take_mask(packet) {
            umask(Mode::from_raw_mode(mask));
        }
        let handled = match verdict {
            Verdict::Begin if session::offers_mapping(packet) => {
                let change = session::allow_mapping;
                inside.handle(fuse, server, packet, &mut reply, change)
            }
            Verdict::Acl => inside.handle(fuse, server, packet, &mut reply, filter::report_no_acl),
            Verdict::Seek => {
                let answer = packet::answer(packet, files.seek(packet));
                send(fuse, &answer, SendFlags::NOSIGNAL).is_ok()
            }
            Verdict::Lower => match WithoutFsetid::begin() {
                Ok(_until_answered) => handle(fuse, server, packet, &mut reply),
                Err(_) => false,
            },
            _ => match numbers.filter(|_| Renumbered::is_told(&header)) {
                Some(numbers) => {
                    let change = |answer: &mut [u8]| numbers.answer(&header, answer);
                    inside.handle(fuse, server, packet, &mut reply, change)
                }
                None => handle(fuse, server, packet, &mut reply),
            },
        };
        if !handled && filter::is_answered(&header) {
            // Not a request, or its answer could not be sent whole. A second answer is ignored.
            let refusal = packet::refusal(&header, libc::EIO);
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

/// Where answers go that are changed before they are sent.
#[derive(Debug)]
struct Inside {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Inside {
    fn new() -> rustix::io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok(Self { ours, theirs })
    }

    /// Handles a request as [`handle`] does, and sends its answer as `change` leaves it.
    fn handle(
        &self,
        fuse: &OwnedFd,
        server: &Server<Arc<Vfs>>,
        packet: &mut [u8],
        reply: &mut [u8],
        change: impl FnOnce(&mut [u8]),
    ) -> bool {
        let Some(length) = self.carry_out(server, packet, reply) else {
            return false;
        };
        let answer = &mut reply[..length];
        change(answer);
        send(fuse, answer, SendFlags::NOSIGNAL).is_ok()
    }

    /// Handles a request as [`handle`] does; returns how long its answer is, in `reply`.
    fn carry_out(
        &self,
        server: &Server<Arc<Vfs>>,
        packet: &mut [u8],
        reply: &mut [u8],
    ) -> Option<usize> {
        if !handle(&self.theirs, server, packet, reply) {
            // If there is an answer all the same, it is not that to the next request.
            while recv(&self.ours, &mut *reply, RecvFlags::DONTWAIT).is_ok() {}
            return None;
        }
        let received = recv(&self.ours, &mut *reply, RecvFlags::DONTWAIT);
        received.ok().map(|(_, length)| length)
    }
}
