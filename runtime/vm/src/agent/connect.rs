//! Connections into the guest: the VMM's Unix socket stands for the guest's vsock.
//!
//! ```text
//! host: connect(vsock.sock), "CONNECT <port>\n"   ◀── VMM: "OK <host port>\n", then bytes
//!                                                 ◀── end of file: nobody listens (yet)
//! ```

use std::{io, path::Path, time::Duration};

use backon::{ExponentialBuilder, Retryable};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout_at},
};

use hull_base::{beneath, clock};

use crate::agent::error::GuestError;

/// Longest answer to `CONNECT`: `OK `, ten digits and the line end.
const ANSWER_MAX: usize = 32;
/// How long one attempt may take before the next, while the guest boots.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Longest pause between attempts: a guest that boots may begin to listen at any time.
const PAUSE_MAX: Duration = Duration::from_millis(50);
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(2))
    .with_max_delay(PAUSE_MAX)
    .without_max_times();

/// Connects, without waiting for somebody to listen.
async fn dial(vsock: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = beneath::connect(vsock).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    accepted(&mut stream).await?;
    Ok(stream)
}

/// Reads the VMM's answer to `CONNECT`, and no byte more.
///
/// # Errors
/// When the connection ends or the answer is not that it is accepted.
pub(crate) async fn accepted(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    // One byte at a time: what follows the line belongs to the caller.
    loop {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            break;
        }
        answer.push(byte);
        if answer.len() == ANSWER_MAX {
            return Err(wrong_answer());
        }
    }
    match answer.strip_prefix(b"OK ") {
        Some(digits) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => Ok(()),
        _ => Err(wrong_answer()),
    }
}

fn wrong_answer() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the answer is not OK <port>")
}

/// Connects as soon as somebody listens in the guest. Whether the VMM ends meanwhile, others see.
///
/// # Errors
/// When nobody does before `deadline`.
pub(crate) async fn dial_until(
    vsock: &Path,
    port: u32,
    deadline: Instant,
) -> Result<UnixStream, GuestError> {
    dial_while(vsock, port, deadline, |_| true).await
}

/// As [`dial_until`], in a guest that runs.
///
/// # Errors
/// As there, and at once when nobody has the socket any more: its VMM is gone.
pub(crate) async fn dial_running(
    vsock: &Path,
    port: u32,
    deadline: Instant,
) -> Result<UnixStream, GuestError> {
    let is_gone = |error: &GuestError| {
        matches!(error, GuestError::Connect { source, .. }
            if source.kind() == io::ErrorKind::ConnectionRefused)
    };
    dial_while(vsock, port, deadline, |error| !is_gone(error)).await
}

async fn dial_while(
    vsock: &Path,
    port: u32,
    deadline: Instant,
    may_come: impl Fn(&GuestError) -> bool,
) -> Result<UnixStream, GuestError> {
    let begin = Instant::now();
    let attempt = async || {
        let until = deadline.min(clock::after(ATTEMPT));
        let dialled = timeout_at(until, dial(vsock, port)).await;
        dialled
            .map_err(|_| GuestError::ConnectTimeout {
                port,
                seconds: begin.elapsed().as_secs(),
            })?
            .map_err(|source| GuestError::Connect { port, source })
    };
    attempt
        .retry(PAUSES)
        .when(|error| may_come(error) && clock::after(PAUSE_MAX) < deadline)
        .await
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answer_with(answers: Vec<&'static [u8]>) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0_u8; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 1024\n");
                stream.write_all(answer).await.unwrap();
            }
        });
        (dir, path)
    }

    #[tokio::test(start_paused = true)]
    async fn a_vmm_that_is_gone_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        drop(UnixListener::bind(&path).unwrap());
        let deadline = clock::after(Duration::from_secs(10));
        let refused = dial_running(&path, 1024, deadline).await;
        assert!(matches!(refused, Err(GuestError::Connect { .. })));
        assert!(Instant::now() < deadline - Duration::from_secs(9));
    }

    #[tokio::test]
    async fn bytes_behind_the_answer_are_not_lost() {
        let (_dir, path) = answer_with(vec![b"OK 7\nhello"]).await;
        let mut stream = dial(&path, 1024).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_guest_that_is_not_ready_is_asked_again() {
        let (_dir, path) = answer_with(vec![b"", b"NO\n", b"OK 1\n"]).await;
        let deadline = Instant::now() + Duration::from_secs(10);
        dial_until(&path, 1024, deadline).await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_never_answers_is_given_up() {
        let (_dir, path) = answer_with(vec![]).await;
        let deadline = Instant::now() + Duration::from_millis(100);
        assert!(dial_until(&path, 1024, deadline).await.is_err());
    }

    #[tokio::test]
    async fn an_endless_answer_is_refused() {
        let (_dir, path) = answer_with(vec![&[b'O'; 64]]).await;
        assert!(dial(&path, 1024).await.is_err());
    }
}
