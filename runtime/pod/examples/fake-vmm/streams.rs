//! Byte streams, as `hull_proto_agent::stream` describes them.

use std::{io, sync::Arc, time::Duration};

use hull_proto_agent::stream::{
    END_OF_OUTPUT, StreamHeader, StreamKind, StreamReply, body_length, decode, encode, encode_chunk,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{guest::Guest, process::Process};

pub async fn serve(mut stream: UnixStream, guest: Arc<Guest>) -> io::Result<()> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let mut body = vec![0; body_length(prefix)?];
    stream.read_exact(&mut body).await?;
    let header: StreamHeader = decode(&body)?;
    if let StreamKind::Dial { port } = header.kind {
        return dial(stream, port).await;
    }
    if let StreamKind::Shell { terminal } = header.kind {
        return shell(stream, terminal, &guest).await;
    }
    let Some(process) = guest.process(&header.container, &header.exec) else {
        let reply = StreamReply::Error {
            message: "no such process".into(),
        };
        return stream.write_all(&encode(&reply)?).await;
    };
    if header.kind == StreamKind::Stdin {
        return input(stream, &process).await;
    }
    // A line for each connection, beside the exit report.
    guest.note("outputs", &header.container);
    output(stream, &process, &header).await
}

/// One that says what it is told, if there is a file `shell` beside the exit report.
async fn shell(
    mut stream: UnixStream,
    terminal: Option<(u16, u16)>,
    guest: &Guest,
) -> io::Result<()> {
    if !guest.report.with_file_name("shell").exists() {
        let message = "start a shell: the pod was started without one".into();
        let reply = StreamReply::Error { message };
        return stream.write_all(&encode(&reply)?).await;
    }
    let reply = StreamReply::Ok { offset: 0 };
    stream.write_all(&encode(&reply)?).await?;
    if let Some((rows, columns)) = terminal {
        let size = format!("{columns}x{rows}\r\n");
        stream.write_all(size.as_bytes()).await?;
    }
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await?;
    Ok(())
}

/// An echo server is at port 7.
async fn dial(mut stream: UnixStream, port: u16) -> io::Result<()> {
    if port != 7 {
        let reply = StreamReply::Error {
            message: "connection refused".into(),
        };
        return stream.write_all(&encode(&reply)?).await;
    }
    accepted(&mut stream).await?;
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

async fn accepted(stream: &mut UnixStream) -> io::Result<()> {
    let reply = StreamReply::Ok { offset: 0 };
    stream.write_all(&encode(&reply)?).await
}

async fn input(mut stream: UnixStream, process: &Process) -> io::Result<()> {
    accepted(&mut stream).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = stream.read(&mut buffer).await.unwrap_or(0);
        let mut input = process.input.lock().unwrap();
        if length == 0 {
            if process.input_closes {
                *input = None;
            }
            return Ok(());
        }
        if let Some(input) = &*input {
            let _ = input.send(buffer[..length].to_vec());
        }
    }
}

async fn output(stream: UnixStream, process: &Process, header: &StreamHeader) -> io::Result<()> {
    let buffer = match header.kind {
        StreamKind::Stderr => &process.stderr,
        _ => &process.stdout,
    };
    let mut state = buffer.subscribe();
    let mut at = header.offset.max(state.borrow().first);
    let (mut reader, mut writer) = stream.into_split();
    if process.lies().any(|lie| lie == "early-end") && at > 0 {
        // Before what was acknowledged: as if it had never been there.
        let reply = StreamReply::Ok { offset: at - 1 };
        writer.write_all(&encode(&reply)?).await?;
        writer.write_all(&END_OF_OUTPUT).await?;
        std::future::pending::<()>().await;
    }
    let lies = process.lies().any(|lie| match lie {
        "offset" => true,
        "late-offset" => at > 0,
        _ => false,
    });
    if lies {
        while process.kill.lock().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let reply = StreamReply::Ok { offset: u64::MAX };
        writer.write_all(&encode(&reply)?).await?;
        writer.write_all(b"x").await?;
        std::future::pending::<()>().await;
    }
    writer
        .write_all(&encode(&StreamReply::Ok { offset: at })?)
        .await?;
    let is_lie = |name| process.lies().any(|lie| lie == name);
    let send = async {
        loop {
            let (chunk, ended) = {
                let state = state.borrow_and_update();
                let from = at.saturating_sub(state.first) as usize;
                (
                    state.kept[from.min(state.kept.len())..].to_vec(),
                    state.ended,
                )
            };
            // In pieces, so that connections can end in between.
            for piece in chunk.chunks(10_000) {
                writer.write_all(&encode_chunk([piece, b""])?).await?;
                at += piece.len() as u64;
            }
            if is_lie("no-end") && ended && chunk.is_empty() {
                return writer.shutdown().await;
            }
            if ended && chunk.is_empty() {
                writer.write_all(&END_OF_OUTPUT).await?;
                if is_lie("ends") {
                    writer.write_all(&END_OF_OUTPUT).await?;
                } else if is_lie("after-end") {
                    writer.write_all(&encode_chunk([b"more", b""])?).await?;
                }
                std::future::pending::<()>().await;
            }
            if chunk.is_empty() && state.changed().await.is_err() {
                return io::Result::Ok(());
            }
        }
    };
    let acknowledge = async {
        loop {
            let total = reader.read_u64_le().await?;
            buffer.acknowledge(total);
        }
    };
    tokio::select! {
        result = send => result,
        result = acknowledge => result,
    }
}
