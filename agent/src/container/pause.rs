//! The pod's own namespaces, held by a process that does nothing else.
//!
//! A pid namespace is made when the first container asks for it: [`opener`] makes it, and in it
//! [`init`], which collects orphans and so lives as long as the pod.
//!
//! A pod with a user namespace has that, and network, IPC and host name that belong to it, from
//! its configuration on. The agent's thread moves into these three: all that it does from then
//! on, and every process that it starts, happens there.
//!
//! ```text
//! agent ── pause-opener user ──▶ opener: unshare(user)
//!       ◀── ready ──────────────
//!   writes its id maps
//!       ── go on ──────────────▶ unshare(network, IPC, host name, pid), starts init
//!       ◀── pid of init ────────
//! ```

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    os::{fd::AsFd, fd::OwnedFd},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use error_reporter::Report;
use hull_proto_agent::agent::UserNamespace;
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::{Gid, Pid, Uid, chdir, chroot, setgroups, setresgid, setresuid},
};
use oci_spec::runtime::LinuxIdMapping;
use rustix::{
    fs::OFlags,
    process::{WaitOptions, wait},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::Mutex,
    time::timeout,
};
use tracing::warn;

use crate::{pidfd::Process, reaper::Reaper, sandbox::sysctl};

/// How long the process may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// The pod's namespaces.
#[derive(Debug, Default)]
pub(crate) struct PodNamespaces {
    init: Mutex<Option<Arc<Process>>>,
    user: OnceLock<PodUser>,
}

/// The pod's user namespace.
#[derive(Debug, Clone)]
pub(crate) struct PodUser {
    map: UserNamespace,
    init: Arc<Process>,
}

/// A user namespace to make.
#[derive(Debug)]
pub(crate) struct NewUser<'a> {
    pub(crate) map: &'a UserNamespace,
    /// Parameters of its IPC namespace, which the agent itself may not set.
    pub(crate) sysctls: Vec<(String, String)>,
}

impl PodUser {
    /// The namespace as a file of /proc, which is it as long as [`Self::init`] is there.
    pub(crate) fn file(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/user", self.init.pid()))
    }

    /// Opens the namespace.
    pub(crate) fn open(&self) -> io::Result<fs::File> {
        self.init.open_file("ns/user", OFlags::RDONLY)
    }

    /// Returns the process that holds the namespace.
    pub(crate) fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Returns what the user id `uid` of a container is in the guest; `None`: it is not mapped.
    pub(crate) fn uid(&self, uid: u32) -> Option<u32> {
        (uid < self.map.uid_count).then(|| self.map.host_uid.saturating_add(uid))
    }

    /// Returns what the group id `gid` of a container is in the guest; `None`: it is not mapped.
    pub(crate) fn gid(&self, gid: u32) -> Option<u32> {
        (gid < self.map.gid_count).then(|| self.map.host_gid.saturating_add(gid))
    }

    /// Whether these are the mappings that the namespace has.
    pub(crate) fn is_mapped_by(&self, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> bool {
        let is = |mappings: &[LinuxIdMapping], host, count| {
            matches!(mappings, [only]
                if (only.container_id(), only.host_id(), only.size()) == (0, host, count))
        };
        is(uids, self.map.host_uid, self.map.uid_count)
            && is(gids, self.map.host_gid, self.map.gid_count)
    }
}

impl PodNamespaces {
    /// Returns the first process of the pid namespace; makes it when there is none.
    pub(crate) async fn init(&self, reaper: &Reaper) -> io::Result<Arc<Process>> {
        let mut init = self.init.lock().await;
        if let Some(process) = &*init {
            return Ok(Arc::clone(process));
        }
        let started = Arc::new(timeout(START_TIMEOUT, start(reaper, None)).await??);
        Ok(Arc::clone(init.insert(started)))
    }

    /// Returns the pod's user namespace, if it has one.
    pub(crate) fn user(&self) -> Option<&PodUser> {
        self.user.get()
    }

    /// Gives the pod a user namespace, unless it has one.
    ///
    /// `move_devices` is called with the namespaces' first process, in the guest's network, and
    /// afterwards this thread is in the pod's.
    pub(crate) async fn make_user<E: From<io::Error>>(
        &self,
        reaper: &Reaper,
        user: NewUser<'_>,
        move_devices: impl AsyncFnOnce(Pid) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut init = self.init.lock().await;
        if self.user.get().is_some() {
            return Ok(());
        }
        let started = timeout(START_TIMEOUT, start(reaper, Some(&user))).await;
        let started = Arc::new(started.map_err(io::Error::from)??);
        move_devices(started.pid()).await?;
        join(&started)?;
        *init = Some(Arc::clone(&started));
        // The lock is held, so it was not set meanwhile.
        let _ = self.user.set(PodUser {
            map: user.map.clone(),
            init: started,
        });
        Ok(())
    }
}

/// Moves this thread, which is the only one that starts processes and opens sockets.
fn join(process: &Process) -> io::Result<()> {
    let namespaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    Ok(setns(process, namespaces)?)
}

async fn start(reaper: &Reaper, user: Option<&NewUser<'_>>) -> io::Result<Process> {
    let (ours, theirs) = UnixStream::pair()?;
    let sysctls = user.iter().flat_map(|user| &user.sysctls);
    let sysctls = sysctls.map(|(name, value)| format!("{name}={value}"));
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("pause-opener")
        .args(user.map(|_| USER))
        .args(sysctls)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let (opener, ended) = reaper.spawn(&mut command)?;
    drop(command);
    ours.set_nonblocking(true)?;
    let (reader, mut writer) = tokio::net::UnixStream::from_std(ours)?.into_split();
    let mut reader = tokio::io::BufReader::new(reader);
    if let Some(user) = user {
        map_ids(&opener, user.map, &mut reader, &mut writer).await?;
    }
    let line = said(&mut reader).await?;
    let pid = line.parse().map(Pid::from_raw).map_err(|_| {
        let kind = if line.starts_with("sysctl ") {
            io::ErrorKind::InvalidInput
        } else {
            io::ErrorKind::Other
        };
        io::Error::new(kind, line)
    })?;
    let init = Process::open(pid)?;
    if init.stat()?.parent != opener.pid() {
        return Err(io::Error::other("the opener names a process of another"));
    }
    let exit = reaper.adopt(&init)?;
    writer.shutdown().await?;
    let _ = ended.await;
    tokio::spawn(async move {
        if let Ok(status) = exit.await {
            warn!(?status, "the pod's pid namespace is gone");
        }
    });
    Ok(init)
}

/// Writes the id maps of the opener's user namespace; it lacks the right to do so itself.
async fn map_ids(
    opener: &Process,
    map: &UserNamespace,
    reader: &mut tokio::io::BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> io::Result<()> {
    let line = said(reader).await?;
    if line != READY {
        return Err(io::Error::other(format!(
            "make the pod's user namespace: {line}"
        )));
    }
    for (file, host, count) in [
        ("uid_map", map.host_uid, map.uid_count),
        ("gid_map", map.host_gid, map.gid_count),
    ] {
        opener.write(file, &format!("0 {host} {count}"))?;
    }
    writer.write_all(b"\n").await
}

async fn said(reader: &mut tokio::io::BufReader<OwnedReadHalf>) -> io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    Ok(line.trim().to_owned())
}

/// The argument of an opener that makes a user namespace.
const USER: &str = "user";
/// What the opener says once its user namespace is there.
const READY: &str = "ready";

/// Makes the namespaces and their first process, and tells its pid on the socket that is
/// standard input; ends when that is closed.
pub(crate) fn opener(args: &[String]) -> ExitCode {
    let result = || -> io::Result<()> {
        let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut reader = BufReader::new(socket.try_clone()?);
        let opened = match args.split_first() {
            Some((user, sysctls)) if user == USER => open_user(&socket, &mut reader, sysctls),
            _ => Ok(()),
        };
        let made = opened
            .and_then(|()| Ok(unshare(CloneFlags::CLONE_NEWPID)?))
            .and_then(|()| {
                Command::new("/proc/self/exe")
                    .arg("pause")
                    .env_clear()
                    .stdin(Stdio::null())
                    .spawn()
            });
        match made {
            Ok(child) => writeln!(&socket, "{}", child.id())?,
            Err(e) => writeln!(&socket, "{e}")?,
        }
        reader.read_line(&mut String::new())?;
        Ok(())
    };
    result().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

/// Becomes root of a new user namespace, and makes what else is to belong to it.
fn open_user(
    mut socket: &UnixStream,
    reader: &mut impl BufRead,
    sysctls: &[String],
) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    writeln!(socket, "{READY}")?;
    reader.read_line(&mut String::new())?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    for sysctl in sysctls {
        let (name, value) = sysctl.split_once('=').unwrap_or((sysctl, ""));
        sysctl::set(name, value).map_err(|e| io::Error::other(Report::new(&e).to_string()))?;
    }
    Ok(())
}

/// The first process of the namespace: collects what ends, for ever.
pub(crate) fn init() -> ExitCode {
    // Containers in the namespace may be able to look at its root, which need not be the guest's.
    if chroot("/proc/self/fdinfo")
        .and_then(|()| chdir("/"))
        .is_err()
    {
        return ExitCode::FAILURE;
    }
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let blocked = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None);
    if blocked.is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {}
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
