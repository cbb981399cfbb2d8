//! The connection of the agent's calls, on which answers go astray if the script has it so.
//!
//! `lie:wire:WORD`, from the start of the container on: `twice` (each answer comes again, and to calls that
//! nobody made), `late` (each comes after the next), `crossed` (each is that of the next call),
//! `mute` (none comes), `abuse` (each is a refusal in many words), `long` (one is announced that is longer than
//! any can be), `zeros` (nothing but zeros comes, without an end), `long-event`.

use std::{io, sync::Arc, time::Duration};

use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, copy},
    net::UnixStream,
    time::timeout,
};
use ttrpc::proto::{
    Code, MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader, Response,
};

use crate::guest::Guest;

/// How long an answer is held back.
const LATE: Duration = Duration::from_millis(300);
/// Longer than any answer.
const LONG: u32 = 1 << 30;

#[derive(Debug, Clone)]
struct Frame {
    header: MessageHeader,
    body: Vec<u8>,
}

impl Frame {
    async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Self> {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        stream.read_exact(&mut header).await?;
        let header = MessageHeader::from(header);
        let mut body = vec![0; header.length as usize];
        stream.read_exact(&mut body).await?;
        Ok(Self { header, body })
    }

    async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        stream.write_all(&Vec::from(self.header)).await?;
        stream.write_all(&self.body).await
    }

    fn to(&self, stream_id: u32) -> Self {
        let mut frame = self.clone();
        frame.header.stream_id = stream_id;
        frame
    }
}

/// The agent's end of a connection, with what makes answers go astray between the daemon and it.
pub fn relayed(daemon: UnixStream, guest: &Arc<Guest>) -> UnixStream {
    let (agent, relay) = UnixStream::pair().unwrap();
    let (mut calls, mut daemon) = daemon.into_split();
    let (mut answers, mut relay) = relay.into_split();
    tokio::spawn(async move { copy(&mut calls, &mut relay).await });
    let guest = Arc::clone(guest);
    // Ends with the daemon, or its connection.
    tokio::spawn(async move { told(&mut answers, &mut daemon, &guest).await });
    agent
}

async fn told(
    agent: &mut (impl AsyncReadExt + Unpin),
    daemon: &mut (impl AsyncWrite + Unpin),
    guest: &Guest,
) -> io::Result<()> {
    loop {
        let frame = Frame::read(agent).await?;
        let lies = guest.lies();
        let lie = lies.iter().find_map(|lie| lie.strip_prefix("wire:"));
        let lie = lie.unwrap_or_default();
        if frame.header.type_ != MESSAGE_TYPE_RESPONSE {
            if lie == "long-event" {
                announce(daemon, MESSAGE_TYPE_DATA, frame.header.stream_id).await?;
            }
            frame.write(daemon).await?;
            continue;
        }
        let own = frame.header.stream_id;
        match lie {
            "twice" => {
                for stream_id in [own, own, own + 2, 0, u32::MAX] {
                    frame.to(stream_id).write(daemon).await?;
                }
            }
            "late" | "crossed" => {
                let Ok(next) = timeout(LATE, Frame::read(agent)).await else {
                    frame.write(daemon).await?;
                    continue;
                };
                let next = next?;
                let other = next.header.stream_id;
                if lie == "late" {
                    next.write(daemon).await?;
                    frame.write(daemon).await?;
                } else {
                    next.to(own).write(daemon).await?;
                    frame.to(other).write(daemon).await?;
                }
            }
            "mute" => {}
            "abuse" => {
                let mut response = Response::new();
                let words = "\u{1b}[2J no, ".repeat(50_000);
                response.set_status(ttrpc::get_status(Code::INTERNAL, words));
                let body = response.write_to_bytes()?;
                let mut header = frame.header;
                header.length = body.len() as u32;
                Frame { header, body }.write(daemon).await?;
            }
            "long" => announce(daemon, MESSAGE_TYPE_RESPONSE, own).await?,
            "zeros" => loop {
                daemon.write_all(&[0; 4096]).await?;
            },
            _ => frame.write(daemon).await?,
        }
    }
}

/// Announces a message that never ends.
async fn announce(
    daemon: &mut (impl AsyncWrite + Unpin),
    type_: u8,
    stream_id: u32,
) -> io::Result<()> {
    let header = MessageHeader {
        length: LONG,
        stream_id,
        type_,
        flags: 0,
    };
    daemon.write_all(&Vec::from(header)).await?;
    loop {
        daemon.write_all(&[7; 4096]).await?;
    }
}
