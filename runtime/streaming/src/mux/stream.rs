//! Streams of a connection.

use std::sync::Arc;

use bytes::Bytes;
use hull_spdy::{Frame, Headers, status};
use tokio_util::sync::CancellationToken;

use super::shared::Shared;
use crate::channel::{Input, Lost};

/// A stream that the peer wants to open.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(super) sender: StreamSender,
    pub(super) input: Input,
    /// Its id.
    pub(crate) id: u32,
    /// What it is for.
    pub(crate) headers: Headers,
}

impl Incoming {
    /// Tells the peer that its stream is accepted.
    pub(crate) async fn accept(self) -> Result<(StreamSender, Input), Lost> {
        let reply = Frame::SynReply {
            stream: self.id,
            headers: Headers::default(),
            fin: false,
        };
        self.sender.queue(reply).await?;
        Ok((self.sender, self.input))
    }

    /// Tells the peer that its stream is not wanted.
    pub(crate) async fn reject(mut self) {
        self.sender.end_with(status::PROTOCOL_ERROR).await;
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub struct StreamSender {
    stream: u32,
    shared: Arc<Shared>,
    reset: CancellationToken,
    /// Nothing may be sent any more.
    pub(super) finished: bool,
}

impl StreamSender {
    pub(super) fn new(stream: u32, shared: Arc<Shared>, reset: CancellationToken) -> Self {
        Self {
            stream,
            shared,
            reset,
            finished: false,
        }
    }

    async fn queue(&self, frame: Frame) -> Result<(), Lost> {
        tokio::select! {
            biased;
            () = self.reset.cancelled() => Err(Lost),
            sent = self.shared.frames.send(frame) => sent.map_err(|_| Lost),
        }
    }

    pub(crate) async fn send(&mut self, payload: Bytes) -> Result<(), Lost> {
        if self.finished {
            return Err(Lost);
        }
        self.queue(Frame::Data {
            stream: self.stream,
            payload,
            fin: false,
        })
        .await
    }

    pub(crate) async fn finish(&mut self) -> Result<(), Lost> {
        if self.finished {
            return Ok(());
        }
        self.queue(Frame::Data {
            stream: self.stream,
            payload: Bytes::new(),
            fin: true,
        })
        .await?;
        self.finished = true;
        self.shared.sent_end(self.stream);
        Ok(())
    }

    pub(crate) async fn reset(&mut self) {
        self.end_with(status::CANCEL).await;
    }

    async fn end_with(&mut self, status: u32) {
        self.finished = true;
        let stream = self.stream;
        if self.shared.forget(stream) {
            let _ = self
                .shared
                .frames
                .send(Frame::RstStream { stream, status })
                .await;
        }
    }
}

impl Drop for StreamSender {
    fn drop(&mut self) {
        let stream = self.stream;
        if !self.finished && self.shared.forget(stream) {
            let status = status::CANCEL;
            // When the queue is full, the peer hears of it at the connection's end.
            let _ = self
                .shared
                .frames
                .try_send(Frame::RstStream { stream, status });
        }
    }
}
