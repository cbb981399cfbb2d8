//! A registry that does what it is told, right or wrong.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::TestImage;

/// What the registry does with a path.
#[derive(Debug, Clone)]
pub enum Answer {
    /// 200 with a content type and a body.
    Body(String, Vec<u8>),
    /// A status, more header lines (each with its line end), and a body.
    Status(u16, String, String),
    /// 200 and the announced length, but only this many bytes; then the connection ends.
    Cut(Vec<u8>, usize),
    /// 206 for the rest from a byte on, but only this many bytes of it.
    CutFrom(Vec<u8>, usize, usize),
    /// As [`Answer::Cut`], but then the connection stays open.
    Stall(Vec<u8>, usize),
    /// Whole body, some bytes at a time with a pause.
    Slow(Vec<u8>, usize, Duration),
    /// One byte of a header at a time with a pause, without end.
    SlowHead(Duration),
    /// Nothing, ever.
    Hang,
    /// Asks for `Authorization` of this value, then goes on.
    Guarded {
        authorization: String,
        challenge: String,
        then: Box<Answer>,
    },
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With its query.
    pub target: String,
    pub headers: HashMap<String, String>,
    pub body: String,
    pub at: Instant,
}

/// The server; it ends with the test's runtime.
#[derive(Debug, Clone)]
pub struct Faulty {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Answers by path; one after the other, the last one for ever.
    answers: HashMap<String, Vec<Answer>>,
    requests: Vec<Request>,
    ranges: bool,
}

impl Faulty {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    /// As [`Faulty::start`], at all addresses of this machine.
    pub async fn start_for_all() -> Self {
        Self::start_at("0.0.0.0:0").await
    }

    async fn start_at(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let faulty = Self {
            port: listener.local_addr().unwrap().port(),
            state: Arc::default(),
        };
        let state = Arc::clone(&faulty.state);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    let _ = serve(stream, state).await;
                });
            }
        });
        faulty
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Serves the image properly, for later damage.
    pub fn put(&self, repository: &str, tag: &str, image: &TestImage) {
        let manifest = Answer::Body(
            image.manifest.media_type.clone(),
            image.manifest.bytes.clone(),
        );
        self.set(
            &format!("/v2/{repository}/manifests/{tag}"),
            vec![manifest.clone()],
        );
        self.set(
            &format!("/v2/{repository}/manifests/{}", image.manifest.digest()),
            vec![manifest],
        );
        for blob in image.layers.iter().chain([&image.config]) {
            let answer = Answer::Body("application/octet-stream".into(), blob.bytes.clone());
            self.set(
                &format!("/v2/{repository}/blobs/{}", blob.digest()),
                vec![answer],
            );
        }
    }

    /// Sets the answers for a path.
    pub fn set(&self, path: &str, answers: Vec<Answer>) {
        self.state
            .lock()
            .unwrap()
            .answers
            .insert(path.into(), answers);
    }

    /// Sets whether parts of bodies can be asked for.
    pub fn do_ranges(&self) {
        self.state.lock().unwrap().ranges = true;
    }

    /// The requests for paths that contain this.
    pub fn requests(&self, part: &str) -> Vec<Request> {
        let state = self.state.lock().unwrap();
        state
            .requests
            .iter()
            .filter(|request| request.target.contains(part))
            .cloned()
            .collect()
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>) -> std::io::Result<()> {
    let request = read_request(&mut stream).await?;
    let path = request.target.split('?').next().unwrap().to_owned();
    let (answer, ranges) = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        let ranges = state.ranges;
        let missing = Answer::Status(404, String::new(), String::new());
        let answer = match state.answers.get_mut(&path) {
            None => missing,
            Some(answers) if answers.len() > 1 => answers.remove(0),
            Some(answers) => answers.first().cloned().unwrap_or(missing),
        };
        (answer, ranges)
    };
    reply(&mut stream, &request, answer, ranges).await
}

async fn reply(
    stream: &mut TcpStream,
    request: &Request,
    mut answer: Answer,
    ranges: bool,
) -> std::io::Result<()> {
    while let Answer::Guarded {
        authorization,
        challenge,
        then,
    } = answer
    {
        answer = if request.headers.get("authorization") == Some(&authorization) {
            *then
        } else {
            Answer::Status(
                401,
                format!("WWW-Authenticate: {challenge}\r\n"),
                "{}".into(),
            )
        };
    }
    let head = |status: u16, length: usize, more: &str| {
        format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
        )
    };
    match answer {
        Answer::Body(media_type, body) => {
            let from = request.headers.get("range").filter(|_| ranges).and_then(
                |range| -> Option<usize> {
                    range
                        .strip_prefix("bytes=")?
                        .strip_suffix('-')?
                        .parse()
                        .ok()
                },
            );
            let mut more = format!("Content-Type: {media_type}\r\n");
            let (status, body) = match from {
                Some(from) => {
                    let (last, all): (usize, usize) = (body.len() - 1, body.len());
                    more += &format!("Content-Range: bytes {from}-{last}/{all}\r\n");
                    (206, &body[from..])
                }
                None => (200, &body[..]),
            };
            let head = head(status, body.len(), &more);
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body).await?;
        }
        Answer::Status(status, more, body) => {
            stream
                .write_all(head(status, body.len(), &more).as_bytes())
                .await?;
            stream.write_all(body.as_bytes()).await?;
        }
        Answer::Cut(body, count) => {
            stream
                .write_all(head(200, body.len(), "").as_bytes())
                .await?;
            stream.write_all(&body[..count]).await?;
        }
        Answer::CutFrom(body, from, count) => {
            let range = format!(
                "Content-Range: bytes {from}-{}/{}\r\n",
                body.len() - 1,
                body.len()
            );
            let head = head(206, body.len() - from, &range);
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&body[from..from + count]).await?;
        }
        Answer::Stall(body, count) => {
            stream
                .write_all(head(200, body.len(), "").as_bytes())
                .await?;
            stream.write_all(&body[..count]).await?;
            std::future::pending::<()>().await;
        }
        Answer::Slow(body, count, pause) => {
            stream
                .write_all(head(200, body.len(), "").as_bytes())
                .await?;
            for part in body.chunks(count) {
                stream.write_all(part).await?;
                tokio::time::sleep(pause).await;
            }
        }
        Answer::SlowHead(pause) => {
            stream.write_all(b"HTTP/1.1 200 X\r\nX-Y: ").await?;
            loop {
                stream.write_all(b"z").await?;
                tokio::time::sleep(pause).await;
            }
        }
        Answer::Hang => std::future::pending::<()>().await,
        Answer::Guarded { .. } => {}
    }
    stream.shutdown().await
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Request> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = text.lines();
    let mut first = lines.next().unwrap_or_default().split(' ');
    let method = first.next().unwrap_or_default().to_owned();
    let target = first.next().unwrap_or_default().to_owned();
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers
        .get("content-length")
        .and_then(|length| length.parse().ok())
        .unwrap_or(0);
    while bytes.len() < end + 4 + length {
        if stream.read_buf(&mut bytes).await? == 0 {
            break;
        }
    }
    let body = String::from_utf8_lossy(&bytes[end + 4..]).into_owned();
    Ok(Request {
        method,
        target,
        headers,
        body,
        at: Instant::now(),
    })
}
