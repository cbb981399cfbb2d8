//! The daemon's side of `hull images`.

use std::{
    future::Future,
    io::{self, Cursor, Read, Write},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use hull_base::stages::Call;
use hull_image::{Auth, Image, ImageId, ImageStore, PullError, PullProgress, StoreError};
use hull_proto_images::{
    PIECE,
    v1::{self, images_server::Images},
};
use tokio::{
    sync::{mpsc, watch},
    task::unconstrained,
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};
use tracing::{Instrument, Span, info_span};

use crate::cri::{self, Answer};

/// How often a client is told.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// Pieces of an archive that may wait for a slow client or store.
const PIECES_AHEAD: usize = 4;

/// The service.
#[derive(Debug)]
pub(crate) struct ImagesService(pub(crate) ImageStore);

#[async_trait]
impl Images for ImagesService {
    type ListStream = Answer<v1::Image>;

    async fn list(
        &self,
        request: Request<v1::ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let list = async {
            let images = if request.into_inner().all {
                self.0.list_all().await?
            } else {
                self.0.list().await?
            };
            Ok(stream::iter(images.into_iter().map(|image| Ok(listed(image)))).boxed())
        };
        cri::answer(info_span!("Images.List"), list).await
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        let wanted = request.into_inner().image;
        let span = info_span!("Images.Remove", image = wanted);
        let remove = async {
            let image = self.0.get(&wanted).await?;
            let image = image.ok_or(StoreError::NotFound(wanted))?;
            self.0.remove(image.id.as_str()).await?;
            Ok(v1::RemoveResponse {
                image_id: image.id.into(),
                containers: image.leases as u64,
            })
        };
        cri::answer(span, remove).await
    }

    type PullStream = Answer<v1::Progress>;

    async fn pull(
        &self,
        request: Request<v1::PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let v1::PullRequest {
            image,
            username,
            password,
            identity_token,
            registry_token,
            server_address,
        } = request.into_inner();
        let span = info_span!("Images.Pull", image);
        let given = [&username, &identity_token, &registry_token];
        let auth = given.iter().any(|given| !given.is_empty()).then_some(Auth {
            username,
            password,
            server_address,
            identity_token,
            registry_token,
        });
        let store = self.0.clone();
        let (progress, watched) = watch::channel(PullProgress::default());
        let work = async move {
            let id = store.pull_watched(&image, auth, &progress).await?;
            Ok(vec![id])
        };
        Ok(Response::new(told(work, watched, span)))
    }

    async fn login(
        &self,
        request: Request<v1::LoginRequest>,
    ) -> Result<Response<v1::LoginResponse>, Status> {
        let v1::LoginRequest {
            registry,
            username,
            password,
        } = request.into_inner();
        let span = info_span!("Images.Login", registry, username);
        let auth = Auth {
            username,
            password,
            ..Auth::default()
        };
        let login = async {
            let registry = self.0.log_in(&registry, auth).await?;
            Ok(v1::LoginResponse { registry })
        };
        cri::answer(span, login).await
    }

    type ImportStream = Answer<v1::Progress>;

    async fn import(
        &self,
        request: Request<Streaming<v1::ImportRequest>>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        let mut messages = request.into_inner();
        let v1::ImportRequest { name, data } = messages.message().await?.unwrap_or_default();
        let name = (!name.is_empty()).then_some(name);
        let span = info_span!("Images.Import", name);
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        // Ends with the client, or when nobody reads any more.
        tokio::spawn(async move {
            while let Some(piece) = messages.message().await.transpose() {
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
        });
        let (progress, watched) = watch::channel(PullProgress::default());
        let archive = PieceReader {
            pieces,
            current: Cursor::new(data),
            progress: progress.clone(),
        };
        let store = self.0.clone();
        let work = async move { store.import(archive, name.as_deref(), &progress).await };
        Ok(Response::new(told(work, watched, span)))
    }

    type ExportStream = Answer<v1::Piece>;

    async fn export(
        &self,
        request: Request<v1::ExportRequest>,
    ) -> Result<Response<Self::ExportStream>, Status> {
        let images = request.into_inner().images;
        let span = info_span!("Images.Export", ?images);
        let started = Instant::now();
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        let out = PieceWriter {
            pieces: sender.clone(),
            waiting: Vec::with_capacity(PIECE),
        };
        let store = self.0.clone();
        let work = async move {
            if let Err(error) = store.export(&images, out).await {
                // A client that went away needs no error.
                let _ = sender.send(Err(cri::failed(&error.into(), started))).await;
            }
        };
        // Ends with the client: nobody takes the next piece then.
        tokio::spawn(work.instrument(span));
        Ok(Response::new(ReceiverStream::new(pieces).boxed()))
    }
}

fn listed(image: Image) -> v1::Image {
    v1::Image {
        id: image.id.into(),
        tags: image.repo_tags,
        digests: image.repo_digests,
        bytes: image.size,
        pinned: image.pinned,
        containers: image.leases as u64,
        removed: image.removed,
    }
}

/// Tells how far `work` is until it ends. Who drops the stream ends the work.
fn told(
    work: impl Future<Output = Result<Vec<ImageId>, PullError>> + Send + 'static,
    watched: watch::Receiver<PullProgress>,
    span: Span,
) -> Answer<v1::Progress> {
    let started = Instant::now();
    let work = Call::current().of(work.instrument(span.clone()));
    let state = Some((Box::pin(work), watched));
    stream::unfold(state, move |state| {
        let span = span.clone();
        async move {
            let (mut work, mut watched) = state?;
            loop {
                tokio::select! {
                    result = &mut work => {
                        let last = *watched.borrow();
                        let answer = result.map(|ids| message(last, ids)).map_err(|error| {
                            span.in_scope(|| cri::failed(&error.into(), started))
                        });
                        return Some((answer, None));
                    }
                    () = sleep(TELL_EVERY) => {}
                }
                if watched.has_changed().unwrap_or(false) {
                    let progress = *watched.borrow_and_update();
                    return Some((Ok(message(progress, Vec::new())), Some((work, watched))));
                }
            }
        }
    })
    .boxed()
}

fn message(progress: PullProgress, ids: Vec<ImageId>) -> v1::Progress {
    v1::Progress {
        layers: progress.layers as u64,
        layers_done: progress.layers_done as u64,
        bytes: progress.bytes,
        bytes_done: progress.bytes_done,
        image_ids: ids.into_iter().map(String::from).collect(),
    }
}

/// Reads what comes in pieces, and tells how much that was. Blocks while the client is slow.
struct PieceReader {
    pieces: mpsc::Receiver<Result<v1::ImportRequest, Status>>,
    current: Cursor<Vec<u8>>,
    progress: watch::Sender<PullProgress>,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.current.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                self.progress
                    .send_modify(|progress| progress.bytes_done += count as u64);
                return Ok(count);
            }
            match wait(self.pieces.recv()) {
                None => return Ok(0),
                Some(Ok(piece)) => self.current = Cursor::new(piece.data),
                Some(Err(status)) => return Err(io::Error::other(status.message().to_owned())),
            }
        }
    }
}

/// Waits on a thread that may block, but may have an event loop too, for the workers of the image store.
/// Tokio's own waiting refuses that, and its budget for tasks would never be filled up here.
fn wait<T>(work: impl Future<Output = T>) -> T {
    futures::executor::block_on(unconstrained(work))
}

/// Sends what is written in pieces. Blocks while the client is slow.
struct PieceWriter {
    pieces: mpsc::Sender<Result<v1::Piece, Status>>,
    waiting: Vec<u8>,
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE - self.waiting.len());
        self.waiting.extend_from_slice(&bytes[..count]);
        if self.waiting.len() == PIECE {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.waiting, Vec::with_capacity(PIECE));
        wait(self.pieces.send(Ok(v1::Piece { data }))).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
