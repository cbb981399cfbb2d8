//! The control socket of a VMM.
//!
//! One task owns the connection: it sends a request with its file descriptors, reads the answer,
//! and in between waits for the end of file that tells that the VM is gone.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::{
    io::{self, IoSlice, Read},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use hull_proto_vmm::{
    DeviceConfig, ExitReport, Metrics, Request, Response, VERSION, VmConfig, VmState,
};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::OFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};

use super::VmError;
use crate::{beneath, panics::caught};

/// How long the VMM may take to answer; it allocates memory and loads a kernel in this time.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest part of an exit report that is shown.
const REPORT_MAX: usize = 2048;

/// A VMM's control connection. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct VmClient {
    calls: mpsc::Sender<Call>,
    gone: watch::Receiver<bool>,
    exit_report: PathBuf,
}

#[derive(Debug)]
struct Call {
    action: &'static str,
    request: Request,
    fds: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<Response, VmError>>,
}

impl VmClient {
    /// Connects, waiting for the VMM to listen until `deadline`, and shakes hands.
    ///
    /// `alive` tells whether the VMM is still there to be waited for.
    pub(crate) async fn connect(
        socket: &Path,
        exit_report: &Path,
        deadline: Instant,
        alive: impl Fn() -> bool,
    ) -> Result<(Self, VmState), VmError> {
        let stream = loop {
            match beneath::connect(socket).await {
                Ok(stream) => break stream,
                Err(_) if alive() && Instant::now() < deadline => {
                    sleep(Duration::from_millis(1)).await;
                }
                Err(_) if !alive() => {
                    return Err(VmError::Gone {
                        action: "connect to the VMM",
                        report: read_report(exit_report),
                    });
                }
                Err(source) => {
                    return Err(VmError::Connect {
                        path: socket.to_owned(),
                        source,
                    });
                }
            }
        };
        let (calls, receiver) = mpsc::channel(16);
        let (gone_sender, gone) = watch::channel(false);
        tokio::spawn(async move {
            // However it ends, the VM can't be spoken with any more.
            if let Err(panic) = caught(serve(stream, receiver)).await {
                tracing::error!(%panic, "connection to a VMM");
            }
            gone_sender.send_replace(true);
        });
        let client = Self {
            calls,
            gone,
            exit_report: exit_report.to_owned(),
        };
        let hello = Request::Hello { version: VERSION };
        match client.call("greet the VMM", hello, Vec::new()).await? {
            Response::Hello { version, state } if version == VERSION => Ok((client, state)),
            Response::Hello { version, .. } => Err(VmError::Version { theirs: version }),
            _ => Err(VmError::Unexpected {
                action: "greet the VMM",
            }),
        }
    }

    /// Describes the VM.
    pub(crate) async fn configure(
        &self,
        config: VmConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        let request = Request::Configure(Box::new(config));
        self.done("configure the VM", request, fds).await
    }

    /// Boots the VM.
    pub(crate) async fn start(&self) -> Result<(), VmError> {
        self.done("start the VM", Request::Start, Vec::new()).await
    }

    /// Puts a device behind a slot.
    pub(crate) async fn attach(
        &self,
        slot: u8,
        device: DeviceConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        let request = Request::Attach { slot, device };
        self.done("attach a device to the VM", request, fds).await
    }

    /// Takes the device out of a slot.
    pub(crate) async fn detach(&self, slot: u8) -> Result<(), VmError> {
        let request = Request::Detach { slot };
        self.done("detach a device from the VM", request, Vec::new())
            .await
    }

    /// Asks for counters.
    pub(crate) async fn metrics(&self) -> Result<Metrics, VmError> {
        const ACTION: &str = "read the VM's counters";
        match self.call(ACTION, Request::Metrics, Vec::new()).await? {
            Response::Metrics(metrics) => Ok(*metrics),
            _ => Err(VmError::Unexpected { action: ACTION }),
        }
    }

    /// Ends the VM.
    pub(crate) async fn stop(&self) -> Result<(), VmError> {
        self.done("stop the VM", Request::Stop, Vec::new()).await
    }

    /// Waits until the VMM closed the connection.
    pub(crate) async fn gone(&self) {
        let mut gone = self.gone.clone();
        // An error means that the task of the connection is gone, and so is the connection.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Whether the VMM closed the connection.
    pub(crate) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Why the VM ended, for a person.
    pub(crate) fn report(&self) -> String {
        read_report(&self.exit_report)
    }

    async fn done(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(), VmError> {
        match self.call(action, request, fds).await? {
            Response::Ok => Ok(()),
            _ => Err(VmError::Unexpected { action }),
        }
    }

    async fn call(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Response, VmError> {
        let gone = || VmError::Gone {
            action,
            report: self.report(),
        };
        let (reply, answer) = oneshot::channel();
        let call = Call {
            action,
            request,
            fds,
            reply,
        };
        self.calls.send(call).await.map_err(|_| gone())?;
        match answer.await.map_err(|_| gone())? {
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

/// Owns the connection until it ends or nobody has a handle any more.
async fn serve(mut stream: UnixStream, mut calls: mpsc::Receiver<Call>) {
    loop {
        let mut byte = [0_u8; 1];
        tokio::select! {
            call = calls.recv() => {
                let Some(call) = call else { return };
                let answer = timeout(CALL_TIMEOUT, exchange(&mut stream, &call)).await;
                let answer = answer.unwrap_or(Err(VmError::Timeout {
                    action: call.action,
                    seconds: CALL_TIMEOUT.as_secs(),
                }));
                // After a failure the position in the byte stream is unknown.
                let broken = answer.is_err();
                // The caller may have given up: the request was made all the same.
                let _ = call.reply.send(answer);
                if broken {
                    break;
                }
            }
            // The VMM never speaks first: whatever is read here ends the connection.
            _ = stream.read(&mut byte) => break,
        }
    }
}

async fn exchange(stream: &mut UnixStream, call: &Call) -> Result<Response, VmError> {
    let action = call.action;
    let codec = |source| VmError::Codec { action, source };
    let socket = |source| VmError::Socket { action, source };
    let frame = hull_proto_vmm::encode(&call.request).map_err(codec)?;
    send(stream, &frame, &call.fds).await.map_err(socket)?;
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

/// Reads the last words of a VMM, which is not trusted.
pub(crate) fn read_report(path: &Path) -> String {
    let read = || -> io::Result<ExitReport> {
        let (run, name) = beneath::split(path)?;
        let file = run.file(name, OFlags::RDONLY)?;
        let mut bytes = Vec::new();
        // What is longer is cut, and then no report.
        file.take(hull_proto_vmm::MAX_MESSAGE as u64)
            .read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let report = read().ok();
    match report {
        Some(report) => clean(&format!("{:?}: {}", report.reason, report.message)),
        None => "it left no exit report, so it was killed".into(),
    }
}

fn clean(text: &str) -> String {
    crate::guest::printable(text, REPORT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Receiving file descriptors is tested in `tests/`, against the fake VMM.
    #[tokio::test]
    async fn an_answer_that_is_no_message_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0_u8; 256];
            let _ = stream.read(&mut buffer).await;
            let _ = stream.write_all(&u32::MAX.to_le_bytes()).await;
            std::future::pending::<()>().await;
        });
        let deadline = Instant::now() + Duration::from_secs(5);
        let report = dir.path().join("exit.json");
        let result = VmClient::connect(&path, &report, deadline, || true).await;
        assert!(matches!(result, Err(VmError::Codec { .. })), "{result:?}");
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
        let deadline = Instant::now() + Duration::from_secs(60);
        let socket = dir.path().join("vmm.sock");
        let result = VmClient::connect(&socket, &report, deadline, || false).await;
        match result {
            Err(VmError::Gone { report, .. }) => assert_eq!(report, "KvmError: no\u{fffd} luck"),
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
