//! The task that writes frames.

use bytes::{Buf, BytesMut};
use hull_spdy::{Encoder, Frame};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::activity::Activity;

/// More frames are put together for one write until it has so many bytes.
const BATCH: usize = 32 << 10;

/// Writes until `GOAWAY` is written, the connection breaks, or it is stopped.
pub(super) async fn run(
    io: impl AsyncWrite + Unpin,
    frames: mpsc::Receiver<Frame>,
    activity: Activity,
    closed: CancellationToken,
    stop: CancellationToken,
) {
    if let Some(Err(error)) = stop.run_until_cancelled(write(io, frames, activity)).await {
        debug!(%error, "connection lost while writing");
        closed.cancel();
    }
}

async fn write(
    mut io: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Frame>,
    activity: Activity,
) -> std::io::Result<()> {
    let mut encoder = Encoder::new();
    let mut batch = BytesMut::with_capacity(BATCH);
    let mut last = false;
    while !last {
        let Some(mut frame) = frames.recv().await else {
            break;
        };
        let mut traffic = false;
        loop {
            last = matches!(frame, Frame::GoAway { .. });
            traffic |= !matches!(frame, Frame::Ping(_));
            encoder
                .encode(&frame, &mut batch)
                .map_err(std::io::Error::other)?;
            if last || batch.len() >= BATCH {
                break;
            }
            match frames.try_recv() {
                Ok(next) => frame = next,
                Err(_) => break,
            }
        }
        while batch.has_remaining() {
            io.write_buf(&mut batch).await?;
            if traffic {
                activity.touch();
            }
        }
        io.flush().await?;
    }
    io.shutdown().await
}
