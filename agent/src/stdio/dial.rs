//! Relays a connection to a server inside the guest.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::{io::copy_bidirectional, net::TcpStream};

use super::Connection;

/// Connects to `port` of this machine: 127.0.0.1, then ::1.
pub(crate) async fn connect(port: u16) -> io::Result<TcpStream> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    match TcpStream::connect(v4).await {
        Ok(stream) => Ok(stream),
        Err(first) => TcpStream::connect(v6).await.map_err(|_| first),
    }
}

/// Moves bytes both ways until both sides closed; each half-close is passed on.
pub(crate) async fn relay(mut connection: Connection, mut server: TcpStream) -> io::Result<()> {
    copy_bidirectional(&mut connection, &mut server).await?;
    Ok(())
}
