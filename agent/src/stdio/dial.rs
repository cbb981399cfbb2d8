//! Relays a connection to a server inside the guest.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, split},
    net::TcpStream,
    time::sleep,
};

use super::connection::Connection;

/// How often a host that is gone is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a server may then take to read what the host sent.
const LINGER: Duration = Duration::from_secs(10);

/// Connects to `port` of this machine: 127.0.0.1, then ::1.
pub(crate) async fn connect(port: u16) -> io::Result<TcpStream> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    match TcpStream::connect(v4).await {
        Ok(stream) => Ok(stream),
        Err(first) => TcpStream::connect(v6).await.map_err(|_| first),
    }
}

/// Moves bytes both ways until both sides closed; each half-close is passed on. A server that takes no
/// more may have answered before; one that resets the connection ends it.
///
/// A host that is gone reads like one that sends nothing more, so a silent
/// server would hold the connection for ever; hence the look at the socket.
pub(crate) async fn relay(
    connection: Connection,
    server: impl AsyncRead + AsyncWrite,
) -> io::Result<()> {
    relay_for(connection, server, LINGER).await
}

/// The same with another time to read what the host sent.
pub(super) async fn relay_for(
    connection: Connection,
    server: impl AsyncRead + AsyncWrite,
    linger: Duration,
) -> io::Result<()> {
    let watch = connection.watch()?;
    let gone = async {
        while !watch.as_ref().is_some_and(has_hung_up) {
            sleep(LOOK).await;
        }
        sleep(linger).await;
    };
    let (mut from_host, mut to_host) = split(connection);
    let (mut from_server, mut to_server) = split(server);
    let up = async {
        if copy(&mut from_host, &mut to_server).await.is_ok() {
            let _ = to_server.shutdown().await;
        }
        Ok(())
    };
    let down = async {
        copy(&mut from_server, &mut to_host).await?;
        to_host.shutdown().await
    };
    tokio::select! {
        moved = async { tokio::try_join!(up, down) } => moved.map(drop),
        () = gone => Ok(()),
    }
}

/// Returns whether both directions of a socket are closed.
fn has_hung_up(socket: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(socket, PollFlags::empty())];
    let polled = poll(&mut asked, Some(&Timespec::default()));
    let gone = PollFlags::HUP | PollFlags::ERR;
    polled.is_ok() && asked[0].revents().intersects(gone)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, UnixStream},
    };

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_silent_server_does_not_keep_a_host_that_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = connect(port).await.unwrap();
        let (mut silent, _) = listener.accept().await.unwrap();
        let (mut host, ours) = UnixStream::pair().unwrap();
        let linger = Duration::from_secs(1);
        let relay = tokio::spawn(relay_for(Box::new(ours), server, linger));
        host.write_all(b"last words").await.unwrap();
        drop(host);
        relay.await.unwrap().unwrap();
        let mut heard = String::new();
        silent.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "last words");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reset_ends_the_connection_after_what_came_before() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = connect(port).await.unwrap();
        let (mut resets, _) = listener.accept().await.unwrap();
        let (mut host, ours) = UnixStream::pair().unwrap();
        let relay = tokio::spawn(relay(Box::new(ours), server));
        host.write_all(b"request").await.unwrap();
        resets.readable().await.unwrap();
        resets.write_all(b"too large").await.unwrap();
        // Closed with something unread: the kernel resets it.
        drop(resets);
        let mut heard = Vec::new();
        let _ = host.read_to_end(&mut heard).await;
        assert_eq!(heard, b"too large");
        drop(host);
        let _ = relay.await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_half_close_goes_through_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = connect(port).await.unwrap();
        let (mut echo, _) = listener.accept().await.unwrap();
        let (mut host, ours) = UnixStream::pair().unwrap();
        let relay = tokio::spawn(relay(Box::new(ours), server));
        host.write_all(b"question").await.unwrap();
        host.shutdown().await.unwrap();
        let mut heard = String::new();
        echo.read_to_string(&mut heard).await.unwrap();
        echo.write_all(heard.as_bytes()).await.unwrap();
        drop(echo);
        let mut answer = String::new();
        host.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "question");
        relay.await.unwrap().unwrap();
    }
}
