//! The privileged part: makes shares and hands them to the server. It has one thread, because a
//! thread among others can't change its mount namespace, and reads nothing that a guest wrote.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

use error_reporter::Report;
use hull_jail::JailError;
use hull_proto_vmm::fs::{
    ErrorKind, MAX_SHARES, MAX_STATE, Owner, Request, Response, Share, VERSION,
};
use hull_proto_vmm::{CodecError, body_length, decode, encode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::umask;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::jail;
use crate::owners::Owners;
use crate::private;
use crate::server::{OK, READY};
use crate::share::{Detached, Identity, MountNamespace, ShareError};

/// How long the daemon may take to send a request, or to take the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the server may take to start, or for a command.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long no connections are taken when the process has no descriptor for one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The host's mounts, see proc_pid_mountinfo(5).
const MOUNTS: &str = "/proc/self/mountinfo";
/// Longest name of an owner, in bytes.
const OWNER_MAX: usize = 128;

/// Why the manager ended, or could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// A system call failed.
    #[error("{action}")]
    Io {
        /// The call, as a verb.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A path can't be shared.
    #[error("share {index}")]
    Share {
        /// Its position in the request.
        index: usize,
        /// Why.
        #[source]
        source: ShareError,
    },
    /// A share could not be mounted for the server.
    #[error("mount share {} for the server", path.display())]
    Mount {
        /// Its path on the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The server refused a command.
    #[error("the server answered: {0}")]
    Server(String),
    /// Its own powers could not be dropped.
    #[error("lock the manager in")]
    Jail(#[from] JailError),
    /// The bytes received are not a message.
    #[error("read request")]
    Codec(#[from] CodecError),
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> ManagerError {
    move |source| ManagerError::Io { action, source }
}

/// Listens on `socket` until the server ends, which it does with the VM. Both run in `cgroup`.
///
/// # Errors
/// [`ManagerError`]
pub fn run(socket: &Path, cgroup: Option<&Path>) -> Result<(), ManagerError> {
    if let Some(cgroup) = cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0").map_err(io_error("enter the cgroup"))?;
    }
    let mut server = ServerProcess::start(socket)?;
    umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    // One that was killed left its own, and the daemon starts the next when that one has ended.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove an earlier socket")(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(io_error("listen on the socket"))?;
    // The way to a share is for all users of the guest, whatever mask this process was started with.
    umask(Mode::WGRP | Mode::WOTH);
    jail::confine_manager()?;
    let done = serve(&listener, &mut server);
    // The directory may be gone with the pod.
    let _ = fs::remove_file(socket);
    done
}

fn serve(listener: &UnixListener, server: &mut ServerProcess) -> Result<(), ManagerError> {
    let mut shares = Shares::open()?;
    loop {
        let mut waiting = vec![
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(server.commands.get_ref(), PollFlags::RDHUP),
        ];
        // Whether others mount them matters to volumes that nobody else has.
        if !shares.private.is_empty() {
            waiting.push(PollFd::new(&shares.mounts, PollFlags::PRI));
        }
        match poll(&mut waiting, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(io_error("wait")(error.into())),
        }
        let happened = |at: usize| waiting.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let [connection, end, mounts] = [0, 1, 2].map(happened);
        if end {
            return Ok(());
        }
        if mounts {
            shares.find_private(server)?;
        }
        if !connection {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = handle_connection(&stream, server, &mut shares) {
                    eprintln!("hull-fs: {}", Report::new(error));
                }
            }
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
    }
}

/// Answers the one request of a connection.
fn handle_connection(
    mut stream: &UnixStream,
    server: &mut ServerProcess,
    shares: &mut Shares,
) -> Result<(), ManagerError> {
    stream
        .set_read_timeout(Some(REQUEST_TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(REQUEST_TIMEOUT)))
        .map_err(io_error("prepare connection"))?;
    let mut prefix = [0; 4];
    stream
        .read_exact(&mut prefix)
        .map_err(io_error("read request"))?;
    let mut body = vec![0; body_length(prefix)?];
    stream
        .read_exact(&mut body)
        .map_err(io_error("read request"))?;
    let mut state = Vec::new();
    let response = match decode(&body) {
        Ok(Request::Save) => save(server, shares, &mut state),
        Ok(Request::Resume { owners, uid, bytes }) => {
            let (read, mut limited) = (&mut state, stream.take(bytes.min(MAX_STATE)));
            limited
                .read_to_end(read)
                .map_err(io_error("read request"))?;
            let resumed = resume(owners, uid, &state, server, shares);
            state.clear();
            resumed
        }
        Ok(request) => answer(request, server, shares),
        Err(error) => Err(error.into()),
    };
    let response = response.unwrap_or_else(|error| refusal(&error));
    let mut send = |bytes: &[u8]| stream.write_all(bytes).map_err(io_error("send answer"));
    send(&encode(&response)?)?;
    send(&state)
}

/// Tells of all shares, and writes what the guest knows of them to `state`.
fn save(
    server: &mut ServerProcess,
    shares: &Shares,
    state: &mut Vec<u8>,
) -> Result<Response, ManagerError> {
    let owners = shares
        .owners
        .all()
        .map(|(name, mounted, uses, has_ended)| Owner {
            name: name.to_owned(),
            shares: mounted
                .iter()
                .map(|m| (m.number, m.share.clone()))
                .collect(),
            uses: uses.iter().cloned().collect(),
            has_ended,
        });
    let owners = owners.collect();
    *state = server.save()?;
    let bytes = state.len() as u64;
    Ok(Response::Saved { owners, bytes })
}

/// Mounts all shares that a guest had, and goes on with what it knew of them.
fn resume(
    owners: Vec<Owner>,
    uid: String,
    state: &[u8],
    server: &mut ServerProcess,
    all: &mut Shares,
) -> Result<Response, ManagerError> {
    if all.owners.shares().next().is_some() {
        return Err(ManagerError::Invalid("there are shares".into()));
    }
    for owner in owners {
        check_owner(&owner.name)?;
        let numbers = owner.shares.iter().map(|(number, _)| *number);
        check_count(numbers.max().map_or(0, |last| last.saturating_add(1)))?;
        let mut own = Vec::new();
        for (number, share) in &owner.shares {
            own.push((*number, share, clone_of(*number, share)?));
        }
        if !own.is_empty() {
            server.add(&owner.name, &own)?;
        }
        let mounted = own.into_iter().map(Mounted::of).collect();
        let uses = owner.uses.into_iter().collect();
        all.owners.add(owner.name.clone(), mounted, uses);
        if owner.has_ended {
            all.owners.end(&owner.name);
        }
    }
    let lost = server.resume(state)?;
    all.uid = uid;
    all.find_private(server)?;
    Ok(Response::Resumed { lost })
}

fn answer(
    request: Request,
    server: &mut ServerProcess,
    all: &mut Shares,
) -> Result<Response, ManagerError> {
    match request {
        Request::Hello { .. } => Ok(Response::Hello {
            version: VERSION,
            owners: all.owners.names().map(str::to_owned).collect(),
        }),
        Request::Add { owner, shares, uid } => {
            let added = add(owner, &shares, server, &mut all.owners)?;
            all.uid = uid;
            all.find_private(server)?;
            Ok(added)
        }
        Request::Remove { owner } => {
            check_owner(&owner)?;
            end(&owner, server, &mut all.owners)?;
            all.find_private(server)?;
            Ok(Response::Ok)
        }
        Request::Save | Request::Resume { .. } => {
            Err(ManagerError::Invalid("it has more to it".into()))
        }
    }
}

/// A share that is mounted.
#[derive(Debug)]
struct Mounted {
    /// Its index among its owner's.
    number: usize,
    /// As it was asked for.
    share: Share,
    identity: Identity,
}

impl Mounted {
    fn of((number, share, clone): (usize, &Share, Detached)) -> Self {
        Self {
            number,
            share: share.clone(),
            identity: clone.identity,
        }
    }
}

/// All shares of the guest.
#[derive(Debug)]
struct Shares {
    owners: Owners<Mounted>,
    /// kubelet's id of the pod.
    uid: String,
    /// The devices of volumes that no other pod has, as the server knows them.
    private: BTreeSet<String>,
    /// The host's mounts, by which changes of them are noticed.
    mounts: fs::File,
}

impl Shares {
    fn open() -> Result<Self, ManagerError> {
        Ok(Self {
            owners: Owners::default(),
            uid: String::new(),
            private: BTreeSet::new(),
            mounts: fs::File::open(MOUNTS).map_err(io_error("watch the host's mounts"))?,
        })
    }

    /// Finds out which volumes no other pod has, and tells the server of changes.
    fn find_private(&mut self, server: &mut ServerProcess) -> Result<(), ManagerError> {
        // Of what can't be read none are.
        let table = fs::read(MOUNTS).unwrap_or_default();
        let shares = self.owners.shares().map(|mounted| &mounted.identity);
        let found = private::devices(&table, &self.uid, shares);
        if found != self.private {
            let told: Vec<_> = found.iter().map(String::as_str).collect();
            server.command("private", &told.join(" "))?;
            self.private = found;
        }
        Ok(())
    }
}

/// Mounts those of an owner's shares that no other owner has mounted in the same way.
fn add(
    owner: String,
    shares: &[Share],
    server: &mut ServerProcess,
    owners: &mut Owners<Mounted>,
) -> Result<Response, ManagerError> {
    check_owner(&owner)?;
    check_count(shares.len())?;
    // Asked again by a daemon that did not get the answer.
    end(&owner, server, owners)?;
    if owners.knows(&owner) {
        let message = format!("{owner} has ended, and others use its shares");
        return Err(ManagerError::Invalid(message));
    }
    let clones = shares.iter().enumerate();
    let clones = clones.map(|(index, share)| clone_of(index, share));
    let clones = clones.collect::<Result<Vec<_>, _>>()?;
    let directories = clones.iter().map(|clone| clone.directory).collect();
    let (mut own, mut places, mut uses) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (share, clone) in shares.iter().zip(clones) {
        if let Some((other, mounted)) = owners.find(|mounted| mounted.identity == clone.identity) {
            places.push(format!("{other}/{}", mounted.number));
            uses.insert(other.to_owned());
        } else {
            places.push(format!("{owner}/{}", own.len()));
            own.push((own.len(), share, clone));
        }
    }
    if !own.is_empty() {
        server.add(&owner, &own)?;
    }
    let own = own.into_iter().map(Mounted::of);
    owners.add(owner, own.collect(), uses);
    Ok(Response::Added {
        directories,
        places,
    })
}

fn clone_of(index: usize, share: &Share) -> Result<Detached, ManagerError> {
    Detached::clone_of(share).map_err(|source| ManagerError::Share { index, source })
}

fn check_count(shares: usize) -> Result<(), ManagerError> {
    if shares > MAX_SHARES {
        let message = format!("{shares} shares are more than {MAX_SHARES}");
        return Err(ManagerError::Invalid(message));
    }
    Ok(())
}

/// Ends an owner. Its shares are unmounted once nobody uses them, and so are those that it used of others.
fn end(
    owner: &str,
    server: &mut ServerProcess,
    owners: &mut Owners<Mounted>,
) -> Result<(), ManagerError> {
    owners.end(owner);
    while let Some((unused, mounted)) = owners.unused() {
        let numbers: Vec<_> = mounted.iter().map(|mounted| mounted.number).collect();
        server.remove(&unused, &numbers)?;
        owners.forget(&unused);
    }
    Ok(())
}

fn check_owner(owner: &str) -> Result<(), ManagerError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    // The server's own mount is not a name to have.
    if owner.is_empty() || owner.len() > OWNER_MAX || owner == "proc" || !owner.bytes().all(good) {
        return Err(ManagerError::Invalid(format!("{owner:?} is no owner")));
    }
    Ok(())
}

fn refusal(error: &ManagerError) -> Response {
    let (kind, share, message) = match error {
        ManagerError::Share { index, source } => {
            (source.kind(), Some(*index), Report::new(source).to_string())
        }
        ManagerError::Invalid(_) | ManagerError::Codec(_) => {
            (ErrorKind::Invalid, None, Report::new(error).to_string())
        }
        _ => (ErrorKind::Internal, None, Report::new(error).to_string()),
    };
    Response::Error {
        kind,
        share,
        message,
    }
}

/// The process that faces the guest, and its mount namespace.
#[derive(Debug)]
struct ServerProcess {
    process: Child,
    commands: BufReader<UnixStream>,
    theirs: MountNamespace,
    ours: MountNamespace,
}

impl ServerProcess {
    /// Starts the server with our standard input, which is not kept open here: when the VM closes its
    /// end, the server is to notice.
    fn start(socket: &Path) -> Result<Self, ManagerError> {
        let root = socket.parent().filter(|root| root.is_absolute());
        let root =
            root.ok_or_else(|| ManagerError::Invalid("the socket has no directory".into()))?;
        let ours = MountNamespace::of("self").map_err(io_error("name our mount namespace"))?;
        let fuse = take_stdin().map_err(io_error("take standard input"))?;
        let (command, answer) = UnixStream::pair().map_err(io_error("make a socket"))?;
        // SAFETY: the table of file descriptors is not unshared. What is, is the pid namespace of
        // children to come: of the server, which is then alone in it.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
            .map_err(|error| io_error("make a pid namespace")(error.into()))?;
        let process = Command::new("/proc/self/exe")
            .arg("serve")
            .arg("--root")
            .arg(root)
            .env_clear()
            .stdin(Stdio::from(fuse))
            .stdout(Stdio::from(OwnedFd::from(answer)))
            .spawn()
            .map_err(io_error("start the server"))?;
        command
            .set_read_timeout(Some(SERVER_TIMEOUT))
            .map_err(io_error("prepare the server's socket"))?;
        let mut server = Self {
            // Until the server is ready, and in a namespace of its own.
            theirs: MountNamespace::of("self").map_err(io_error("name our mount namespace"))?,
            process,
            commands: BufReader::new(command),
            ours,
        };
        server.expect(READY)?;
        server.theirs = MountNamespace::of(&server.process.id().to_string())
            .map_err(io_error("name the server's mount namespace"))?;
        Ok(server)
    }

    /// Mounts an owner's shares in the server's namespace and has the server serve them; all or none.
    fn add(
        &mut self,
        owner: &str,
        shares: &[(usize, &Share, Detached)],
    ) -> Result<(), ManagerError> {
        let mounted = self.inside(|| mount(owner, shares));
        let added = mounted.and_then(|()| self.command("add", owner));
        if added.is_err() {
            // What failed is told; what is left of it is not reachable, and goes with the server.
            let numbers: Vec<_> = shares.iter().map(|(number, ..)| *number).collect();
            let _ = self.inside(|| clear(owner, &numbers));
        }
        added
    }

    /// Ends the use of an owner's shares, then unmounts them.
    fn remove(&mut self, owner: &str, numbers: &[usize]) -> Result<(), ManagerError> {
        self.command("remove", owner)?;
        self.inside(|| clear(owner, numbers))
    }

    /// Runs `work` in the server's mount namespace.
    fn inside<T>(&self, work: impl FnOnce() -> Result<T, ManagerError>) -> Result<T, ManagerError> {
        self.theirs
            .enter()
            .map_err(io_error("enter the server's mount namespace"))?;
        let result = work();
        if let Err(error) = self.ours.enter() {
            // Elsewhere it is of no use, and might do harm: paths mean something else.
            eprintln!("hull-fs: return to the host's mount namespace: {error}");
            std::process::abort();
        }
        result
    }

    fn command(&mut self, verb: &str, what: &str) -> Result<(), ManagerError> {
        self.send(format!("{verb} {what}\n").as_bytes())?;
        self.expect(OK).map(drop)
    }

    /// Asks what the guest knows of all shares.
    fn save(&mut self) -> Result<Vec<u8>, ManagerError> {
        self.send(b"save all\n")?;
        let length = self.expect(OK)?;
        let length = length.parse().ok().filter(|length| *length <= MAX_STATE);
        let length = length.ok_or_else(|| ManagerError::Server("no length".into()))?;
        let mut state = Vec::new();
        let read = self.commands.by_ref().take(length).read_to_end(&mut state);
        read.map_err(io_error("listen to the server"))?;
        Ok(state)
    }

    /// Has the server go on with what a guest knew; returns how much of that is not there.
    fn resume(&mut self, state: &[u8]) -> Result<u64, ManagerError> {
        self.send(format!("resume {}\n", state.len()).as_bytes())?;
        self.send(state)?;
        Ok(self.expect(OK)?.parse().unwrap_or_default())
    }

    fn send(&self, bytes: &[u8]) -> Result<(), ManagerError> {
        let mut stream: &UnixStream = self.commands.get_ref();
        let sent = stream.write_all(bytes);
        sent.map_err(io_error("command the server"))
    }

    /// Waits for a line that begins with this word; returns the rest.
    fn expect(&mut self, wanted: &str) -> Result<String, ManagerError> {
        let mut line = String::new();
        // What the server says is bounded by what it is: ours, if it is not lost to its guest.
        let mut limited = self.commands.by_ref().take(4096);
        limited
            .read_line(&mut line)
            .map_err(io_error("listen to the server"))?;
        let line = line.trim_end();
        match line.split_once(' ').unwrap_or((line, "")) {
            (word, rest) if word == wanted => Ok(rest.to_owned()),
            ("", _) => Err(ManagerError::Server("nothing, it is gone".into())),
            _ => Err(ManagerError::Server(line.to_owned())),
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Takes standard input, and leaves /dev/null in its place.
fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let null = fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(taken)
}

/// Mounts `/<owner>/<index>` for each clone, in the server's namespace.
fn mount(owner: &str, shares: &[(usize, &Share, Detached)]) -> Result<(), ManagerError> {
    let directory = Path::new("/").join(owner);
    fs::DirBuilder::new()
        .mode(0o755)
        .create(&directory)
        .map_err(io_error("make the owner's directory"))?;
    for (number, share, clone) in shares {
        let target = directory.join(number.to_string());
        let made = if clone.directory {
            fs::create_dir(&target)
        } else {
            fs::File::create_new(&target).map(drop)
        };
        made.and_then(|()| clone.mount(&target))
            .map_err(|source| ManagerError::Mount {
                path: share.path.clone(),
                source,
            })?;
    }
    Ok(())
}

/// Unmounts an owner's shares and removes their mount points, as far as there are any.
fn clear(owner: &str, numbers: &[usize]) -> Result<(), ManagerError> {
    let directory = Path::new("/").join(owner);
    for number in numbers {
        let target = directory.join(number.to_string());
        match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
            Err(error) => return Err(io_error("unmount a share")(error.into())),
        }
        let removed = fs::remove_dir(&target).or_else(|_| fs::remove_file(&target));
        ignore_absent(removed).map_err(io_error("remove a mount point"))?;
    }
    ignore_absent(fs::remove_dir(&directory)).map_err(io_error("remove the owner's directory"))
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
