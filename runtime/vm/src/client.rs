//! The control socket of a VMM.
//!
//! One task owns the connection: it sends a request with its file descriptors, reads the answer,
//! and in between waits for end of file. Only end of file and the end of the process tell that the
//! VM is gone. After an answer that came too late or could not be decoded, the position in the byte
//! stream is unknown, so the next request takes a new connection.

use std::{
    io::{self, IoSlice, Read},
    ops::Range,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use backon::{ConstantBuilder, Retryable};
use hull_proto_vmm::{
    CopiedMemory, DeviceConfig, ErrorKind, ExitReport, FdIndex, Metrics, Request, Response,
    RestoreConfig, VERSION, VmConfig, VmState,
};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::OFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use hull_base::{
    beneath,
    faults::{self, Point},
    panics::caught,
    stages::stage,
};

use crate::{error::VmError, process::Process};

const GREET: &str = "greet the VMM";
/// How long the VMM may take to answer; it allocates memory and loads a kernel in this time.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a device that is to be taken out may be busy.
const BUSY: Duration = Duration::from_secs(10);
/// The pauses before it is tried again: the VMM speaks only when asked.
const WHILE_BUSY: ConstantBuilder = ConstantBuilder::new()
    .with_delay(Duration::from_millis(50))
    .without_max_times();
/// Longest part of an exit report that is shown.
const REPORT_MAX: usize = 2048;

/// A VMM's control connection. Clones share it.
#[derive(Debug, Clone)]
pub struct VmClient {
    calls: mpsc::Sender<Call>,
    gone: watch::Receiver<bool>,
    exit_report: PathBuf,
}

#[derive(Debug)]
struct Call {
    action: &'static str,
    request: Request,
    fds: Vec<OwnedFd>,
    since: Instant,
    /// After what time its caller gives up.
    limit: Duration,
    reply: oneshot::Sender<Result<Response, VmError>>,
}

/// How long a VMM may take to end after it closed the connection, until it is said to be gone all the same.
const UNTIL_NOTED: Duration = Duration::from_secs(1);

/// The connection, and how to get another.
#[derive(Debug)]
struct Line {
    socket: PathBuf,
    /// None: the last call failed, and the next one connects again.
    stream: Option<UnixStream>,
}

impl VmClient {
    /// Connects to the VMM `process`, waiting for it to listen until `deadline`, and shakes hands.
    ///
    /// # Errors
    /// When the VMM ends or does not listen by then, or has another contract version.
    pub async fn connect(
        socket: &Path,
        exit_report: &Path,
        deadline: Instant,
        process: &Process,
    ) -> Result<(Self, VmState), VmError> {
        let connected = process.connect(socket, deadline).await;
        let stream = connected.map_err(|source| {
            if process.is_alive() {
                VmError::Connect {
                    path: socket.to_owned(),
                    source,
                }
            } else {
                VmError::Gone {
                    action: "connect to the VMM",
                    report: read_report(exit_report),
                }
            }
        })?;
        let (calls, receiver) = mpsc::channel(16);
        let (gone_sender, gone) = watch::channel(false);
        let line = Line {
            socket: socket.to_owned(),
            stream: Some(stream),
        };
        let process = process.clone();
        tokio::spawn(async move {
            // However the task ends, nothing can be asked of the VM any more.
            if let Err(panic) = caught(serve(line, receiver, process.clone())).await {
                tracing::error!(%panic, "connection to a VMM");
            }
            // How a process ended is known a moment after its connection is closed.
            let _ = timeout(UNTIL_NOTED, process.ended()).await;
            gone_sender.send_replace(true);
        });
        let client = Self {
            calls,
            gone,
            exit_report: exit_report.to_owned(),
        };
        let hello = Request::Hello { version: VERSION };
        let answer = client.call(GREET, hello, Vec::new(), CALL_TIMEOUT).await?;
        Ok((client, greeted(&answer)?))
    }

    /// Whether the VMM answers within this time.
    pub async fn answers(&self, limit: Duration) -> bool {
        let hello = Request::Hello { version: VERSION };
        let answer = self.call(GREET, hello, Vec::new(), limit).await;
        answer.is_ok()
    }

    /// Describes the VM.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn configure(&self, config: VmConfig, fds: Vec<OwnedFd>) -> Result<(), VmError> {
        let request = Request::Configure(Box::new(config));
        self.done("configure the VM", request, fds).await
    }

    /// Makes the VM from a snapshot, or nothing.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn restore(&self, config: RestoreConfig, fds: Vec<OwnedFd>) -> Result<(), VmError> {
        let request = Request::Restore(Box::new(config));
        self.done("restore the VM", request, fds).await
    }

    /// Stops the VM's processors and devices.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer, or a device is busy.
    pub async fn pause(&self) -> Result<(), VmError> {
        self.done("pause the VM", Request::Pause, Vec::new()).await
    }

    /// Lets the VM's processors and devices go on, within this time.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn resume(&self, limit: Duration) -> Result<(), VmError> {
        const ACTION: &str = "resume the VM";
        let answer = self.call(ACTION, Request::Resume, Vec::new(), limit);
        done(ACTION, &answer.await?)
    }

    /// Writes the VM's memory to an empty file while it goes on, within this time. Returns where it stands in the
    /// VMM, which answers nothing else meanwhile.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn copy(
        &self,
        memory: OwnedFd,
        limit: Duration,
    ) -> Result<Vec<CopiedMemory>, VmError> {
        const ACTION: &str = "copy the VM's memory";
        let request = Request::Copy { memory: FdIndex(0) };
        match self.call(ACTION, request, vec![memory], limit).await? {
            Response::Copied(parts) => Ok(parts),
            _ => Err(VmError::Unexpected { action: ACTION }),
        }
    }

    /// Writes a snapshot of the paused VM to two files, within this time. That for its memory is empty, or
    /// [`VmClient::copy`] wrote it and this much has `changed`. The VMM answers nothing else meanwhile.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn save(
        &self,
        label: String,
        state: OwnedFd,
        memory: OwnedFd,
        changed: Option<Vec<Range<u64>>>,
        limit: Duration,
    ) -> Result<(), VmError> {
        const ACTION: &str = "save the VM";
        let request = Request::Save {
            label,
            state: FdIndex(0),
            memory: FdIndex(1),
            changed,
        };
        let answer = self.call(ACTION, request, vec![state, memory], limit);
        done(ACTION, &answer.await?)
    }

    /// Boots the VM, or lets one that was restored go on.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn start(&self) -> Result<(), VmError> {
        self.done("start the VM", Request::Start, Vec::new()).await
    }

    /// Puts a device behind a slot.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn attach(
        &self,
        slot: u8,
        device: DeviceConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        let request = Request::Attach { slot, device };
        self.done("attach a device to the VM", request, fds).await
    }

    /// Bounds how much pluggable memory the guest has, within this time.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn plug(
        &self,
        least_mib: u64,
        most_mib: u64,
        limit: Duration,
    ) -> Result<(), VmError> {
        const ACTION: &str = "change the VM's memory";
        let request = Request::Plug {
            least_mib,
            most_mib,
        };
        let answer = self.call(ACTION, request, Vec::new(), limit);
        done(ACTION, &answer.await?)
    }

    /// Takes the device out of a slot; a device that is busy is asked for again for 10 s.
    ///
    /// # Errors
    /// When the device stays busy, or the VMM refuses or does not answer.
    pub async fn detach(&self, slot: u8) -> Result<(), VmError> {
        let begin = Instant::now();
        let detach = || {
            let request = Request::Detach { slot };
            self.done("detach a device from the VM", request, Vec::new())
        };
        let is_busy = |error: &VmError| {
            matches!(
                error,
                VmError::Refused {
                    kind: ErrorKind::Busy,
                    ..
                }
            )
        };
        detach
            .retry(WHILE_BUSY)
            .when(|error| is_busy(error) && begin.elapsed() < BUSY)
            .await
    }

    /// Reads the VM's counters, within this time.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn metrics(&self, limit: Duration) -> Result<Metrics, VmError> {
        const ACTION: &str = "read the VM's counters";
        let answer = self.call(ACTION, Request::Metrics, Vec::new(), limit);
        match answer.await? {
            Response::Metrics(metrics) => Ok(*metrics),
            _ => Err(VmError::Unexpected { action: ACTION }),
        }
    }

    /// Has the VMM end the VM, within this time.
    ///
    /// # Errors
    /// When the VMM refuses or does not answer.
    pub async fn stop(&self, limit: Duration) -> Result<(), VmError> {
        const ACTION: &str = "stop the VM";
        let answer = self.call(ACTION, Request::Stop, Vec::new(), limit);
        done(ACTION, &answer.await?)
    }

    /// Waits until the VMM closed the connection, or has ended.
    pub async fn gone(&self) {
        let mut gone = self.gone.clone();
        // An error means that the task of the connection is gone, and so is the connection.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Whether the VMM closed the connection, or has ended.
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Why the VM ended, for a person.
    pub fn report(&self) -> String {
        read_report(&self.exit_report)
    }

    async fn done(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        done(
            action,
            &self.call(action, request, fds, CALL_TIMEOUT).await?,
        )
    }

    async fn call(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Response, VmError> {
        let asked = self.ask(action, request, fds, limit);
        stage(format!("vmm: {action}"), asked).await
    }

    async fn ask(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Response, VmError> {
        let gone = || VmError::Gone {
            action,
            report: self.report(),
        };
        let point = point_of(&request);
        let (reply, answer) = oneshot::channel();
        let call = Call {
            action,
            request,
            fds,
            since: Instant::now(),
            limit,
            reply,
        };
        let asked = async {
            self.calls.send(call).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        // Calls of others may have to be answered first.
        let answer = timeout(limit, asked).await;
        faults::point(point);
        match answer.unwrap_or_else(|_| Err(late(action, limit))) {
            Ok(Response::Error { kind, message }) => Err(VmError::Refused {
                action,
                kind,
                message: clean(&message),
            }),
            Err(VmError::Socket { .. }) => Err(gone()),
            other => other,
        }
    }
}

fn point_of(request: &Request) -> Point {
    match request {
        Request::Configure(_) | Request::Restore(_) => Point::VmConfigured,
        Request::Start => Point::VmStarted,
        Request::Attach { .. } => Point::VmAttached,
        Request::Plug { .. } => Point::VmPlugged,
        Request::Detach { .. } => Point::VmDetached,
        Request::Stop => Point::VmStopped,
        Request::Pause => Point::VmPaused,
        Request::Save { .. } => Point::VmSaved,
        Request::Resume => Point::VmResumed,
        Request::Hello { .. } | Request::Metrics | Request::Copy { .. } => Point::VmAsked,
    }
}

fn late(action: &'static str, limit: Duration) -> VmError {
    VmError::Timeout {
        action,
        seconds: limit.as_secs(),
    }
}

fn greeted(answer: &Response) -> Result<VmState, VmError> {
    match answer {
        Response::Hello { version, state } if *version == VERSION => Ok(*state),
        Response::Hello { version, .. } => Err(VmError::Version { theirs: *version }),
        _ => Err(VmError::Unexpected { action: GREET }),
    }
}

fn done(action: &'static str, answer: &Response) -> Result<(), VmError> {
    match answer {
        Response::Ok => Ok(()),
        _ => Err(VmError::Unexpected { action }),
    }
}

/// Owns the connection until the VMM is gone or nobody has a handle any more.
async fn serve(mut line: Line, mut calls: mpsc::Receiver<Call>, process: Process) {
    loop {
        tokio::select! {
            call = calls.recv() => {
                let Some(call) = call else { return };
                let left = call.limit.saturating_sub(call.since.elapsed());
                let answer = timeout(left, line.exchange(&call)).await;
                let ended = match answer.ok() {
                    Some(Ok(response)) => {
                        let _ = call.reply.send(Ok(response));
                        continue;
                    }
                    Some(Err(error)) => {
                        let ended = matches!(error, VmError::Socket { .. });
                        let _ = call.reply.send(Err(error));
                        ended
                    }
                    None => {
                        // The caller's own time may not be over yet.
                        let _ = call.reply.send(Err(late(call.action, call.limit)));
                        false
                    }
                };
                // The VMM may have done what was asked, or do it yet, and answer that.
                line.stream = None;
                if ended {
                    break;
                }
            }
            ended = line.ended() => if ended { break },
            () = process.ended() => break,
        }
    }
}

impl Line {
    /// Waits until the connection has ended (true), or has brought bytes that nobody asked for.
    async fn ended(&mut self) -> bool {
        let Some(stream) = &mut self.stream else {
            return std::future::pending().await;
        };
        if matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)) {
            return true;
        }
        // The VMM never speaks first.
        self.stream = None;
        false
    }

    async fn exchange(&mut self, call: &Call) -> Result<Response, VmError> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = beneath::connect(&self.socket).await;
                let mut stream = stream.map_err(|source| VmError::Connect {
                    path: self.socket.clone(),
                    source,
                })?;
                let hello = Request::Hello { version: VERSION };
                greeted(&exchange(&mut stream, GREET, &hello, &[]).await?)?;
                self.stream.insert(stream)
            }
        };
        exchange(stream, call.action, &call.request, &call.fds).await
    }
}

async fn exchange(
    stream: &mut UnixStream,
    action: &'static str,
    request: &Request,
    fds: &[OwnedFd],
) -> Result<Response, VmError> {
    let codec = |source| VmError::Codec { action, source };
    let socket = |source| VmError::Socket { action, source };
    let frame = hull_proto_vmm::encode(request).map_err(codec)?;
    send(stream, &frame, fds).await.map_err(socket)?;
    let mut prefix = [0_u8; 4];
    stream.read_exact(&mut prefix).await.map_err(socket)?;
    let length = hull_proto_vmm::body_length(prefix).map_err(codec)?;
    let mut body = vec![0_u8; length];
    stream.read_exact(&mut body).await.map_err(socket)?;
    hull_proto_vmm::decode(&body).map_err(codec)
}

/// Sends `frame`, and `fds` with its first byte.
async fn send(stream: &mut UnixStream, frame: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let data = [IoSlice::new(frame)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(stream.as_raw_fd(), &data, control, flags, None).map_err(io::Error::from)
        })
        .await?;
    stream
        .write_all(frame.get(sent..).unwrap_or_default())
        .await
}

/// Reads the exit report of a VMM, which is not trusted, for a person.
#[must_use]
pub fn read_report(path: &Path) -> String {
    let read = || -> io::Result<Option<String>> {
        let (run, name) = beneath::split(path)?;
        let file = run.file(name, OFlags::RDONLY)?;
        let mut bytes = Vec::new();
        // A longer file is cut, and then can't be decoded.
        file.take(hull_proto_vmm::MAX_MESSAGE as u64)
            .read_to_end(&mut bytes)?;
        Ok(last_words(&bytes))
    };
    let report = read().ok().flatten();
    report.unwrap_or_else(|| "it left no exit report, so it was killed".into())
}

/// What an exit report says; none: it is no report.
pub(crate) fn last_words(report: &[u8]) -> Option<String> {
    let report: ExitReport = serde_json::from_slice(report).ok()?;
    Some(clean(&format!("{}: {}", report.reason, report.message)))
}

/// A text of the VMM, made printable.
pub(crate) fn clean(text: &str) -> String {
    hull_base::printable::printable(text, REPORT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    /// A process that stands for the VMM, and is killed with this.
    struct Vmm(std::process::Child);

    impl Vmm {
        fn start() -> (Self, Process) {
            let child = std::process::Command::new("sleep").arg("1000").spawn();
            let vmm = Self(child.unwrap());
            let identity = Identity::of(vmm.0.id()).unwrap();
            (vmm, Process::find(identity).unwrap())
        }

        fn kill(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    impl Drop for Vmm {
        fn drop(&mut self) {
            self.kill();
        }
    }

    async fn receive(stream: &mut UnixStream) -> io::Result<Request> {
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).await?;
        let mut body = vec![0; hull_proto_vmm::body_length(prefix).unwrap()];
        stream.read_exact(&mut body).await?;
        Ok(hull_proto_vmm::decode(&body).unwrap())
    }

    async fn answer(stream: &mut UnixStream, response: &Response) {
        let frame = hull_proto_vmm::encode(response).unwrap();
        // The daemon may have given up.
        let _ = stream.write_all(&frame).await;
    }

    const HELLO: Response = Response::Hello {
        version: VERSION,
        state: VmState::Running,
    };

    /// Serves connections one after another: greets, and answers to metrics with what `script` says,
    /// in order; none: never, until the connection ends.
    fn serve_script(path: &Path, script: Vec<Option<Vec<u8>>>) {
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        let mut script = script.into_iter();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                while let Ok(request) = receive(&mut stream).await {
                    match request {
                        Request::Hello { .. } => answer(&mut stream, &HELLO).await,
                        _ => match script.next() {
                            Some(Some(bytes)) => drop(stream.write_all(&bytes).await),
                            Some(None) => {}
                            None => {
                                let metrics = Response::Metrics(Box::default());
                                answer(&mut stream, &metrics).await;
                            }
                        },
                    }
                }
            }
        });
    }

    async fn connect(dir: &Path, process: &Process) -> Result<(VmClient, VmState), VmError> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let (socket, report) = (dir.join("vmm.sock"), dir.join("exit.json"));
        VmClient::connect(&socket, &report, deadline, process).await
    }

    // Receiving file descriptors is tested in `tests/`, against the fake VMM.
    #[tokio::test]
    async fn a_vmm_that_answers_too_late_or_with_garbage_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut vmm, process) = Vmm::start();
        let too_long = u32::MAX.to_le_bytes().to_vec();
        let no_json = vec![1, 0, 0, 0, b'?'];
        let script = vec![None, Some(too_long), Some(no_json), None];
        serve_script(&dir.path().join("vmm.sock"), script);
        let (client, _) = connect(dir.path(), &process).await.unwrap();
        let ask = async || client.metrics(Duration::from_millis(200)).await;
        let late = ask().await;
        assert!(matches!(late, Err(VmError::Timeout { .. })), "{late:?}");
        for _ in 0..2 {
            let wrong = ask().await;
            assert!(matches!(wrong, Err(VmError::Codec { .. })), "{wrong:?}");
        }
        let late = ask().await;
        assert!(matches!(late, Err(VmError::Timeout { .. })), "{late:?}");
        assert!(!client.is_gone());
        client.metrics(Duration::from_secs(10)).await.unwrap();
        // Without a connection too its end is noticed.
        let ended = timeout(Duration::from_millis(100), client.gone());
        assert!(ended.await.is_err());
        vmm.kill();
        let ended = timeout(Duration::from_secs(10), client.gone());
        ended.await.unwrap();
        let gone = ask().await;
        assert!(matches!(gone, Err(VmError::Gone { .. })), "{gone:?}");
    }

    #[tokio::test]
    async fn who_still_waits_when_a_vmm_is_late_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let (_vmm, process) = Vmm::start();
        serve_script(&dir.path().join("vmm.sock"), vec![None]);
        let (client, _) = connect(dir.path(), &process).await.unwrap();
        let (reply, answer) = oneshot::channel();
        let call = Call {
            action: "read the VM's counters",
            request: Request::Metrics,
            fds: Vec::new(),
            since: Instant::now(),
            limit: Duration::from_millis(50),
            reply,
        };
        client.calls.send(call).await.unwrap();
        let late = answer.await.unwrap();
        assert!(matches!(late, Err(VmError::Timeout { .. })), "{late:?}");
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_that_of_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let (_vmm, process) = Vmm::start();
        let listener = tokio::net::UnixListener::bind(dir.path().join("vmm.sock")).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            receive(&mut stream).await.unwrap();
            answer(&mut stream, &HELLO).await;
        });
        let (client, _) = connect(dir.path(), &process).await.unwrap();
        let ended = timeout(Duration::from_secs(10), client.gone());
        ended.await.unwrap();
        assert!(client.is_gone());
    }

    #[tokio::test]
    async fn a_vmm_that_died_before_it_listened_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let report = dir.path().join("exit.json");
        std::fs::write(
            &report,
            r#"{"reason":"kvm_error","message":"no\u0007 luck"}"#,
        )
        .unwrap();
        let (mut vmm, process) = Vmm::start();
        vmm.kill();
        match connect(dir.path(), &process).await {
            Err(VmError::Gone { report, .. }) => {
                assert_eq!(report, "KVM can't go on: no\u{fffd} luck")
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_exit_report_that_is_none_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (report, other) = (dir.path().join("exit.json"), dir.path().join("other.json"));
        let text = br#"{"reason":"guest_panic","message":"x"}"#;
        std::fs::write(&other, text).unwrap();
        let absent = read_report(&report);
        nix::unistd::mkfifo(&report, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_report(&report), absent);
        std::fs::remove_file(&report).unwrap();
        std::os::unix::fs::symlink(&other, &report).unwrap();
        assert_eq!(read_report(&report), absent);
        std::fs::remove_file(&report).unwrap();
        // More than memory has.
        let endless = std::fs::File::create(&report).unwrap();
        endless.set_len(1 << 40).unwrap();
        assert_eq!(read_report(&report), absent);
        std::fs::rename(&other, &report).unwrap();
        assert_ne!(read_report(&report), absent);
    }
}
