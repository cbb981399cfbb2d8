//! From a URL to an upgraded connection.

use std::{path::Path, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::http1,
    header::{
        CONNECTION, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
        SEC_WEBSOCKET_VERSION, UPGRADE,
    },
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};

use super::error::ClientError;
use crate::{
    backend::Duplex,
    negotiate::{ACCEPTED_PROTOCOLS, SPDY, STREAM_PROTOCOL},
    websocket,
};

/// The largest message of a server that is read.
const MAX_MESSAGE: usize = 16 << 20;

/// A connection after its upgrade.
pub type Connection = TokioIo<Upgraded>;
/// A WebSocket after its handshake, without a meaning for its messages.
pub type WebSocket = WebSocketStream<Connection>;

/// Opens connections.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    roots: Vec<CertificateDer<'static>>,
}

impl Dialer {
    /// Trusts these certificates too.
    #[must_use]
    pub fn trusting(roots: Vec<CertificateDer<'static>>) -> Self {
        Self { roots }
    }

    /// Trusts the certificates of a file (PEM) too.
    ///
    /// # Errors
    /// [`ClientError::Certificates`].
    pub fn trusting_file(path: &Path) -> Result<Self, ClientError> {
        let roots = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
        let roots = roots.map_err(|source| ClientError::Certificates(path.to_owned(), source))?;
        Ok(Self { roots })
    }

    /// Upgrades to SPDY; also gives the subprotocol that the server chose.
    ///
    /// # Errors
    /// When the server can't be reached, or refuses.
    pub async fn spdy(
        &self,
        url: &str,
        protocols: &[&str],
    ) -> Result<(Connection, String), ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(UPGRADE, SPDY.parse().map_err(|_| bad(url))?);
        for protocol in protocols {
            headers.append(STREAM_PROTOCOL, protocol.parse().map_err(|_| bad(url))?);
        }
        let (io, answer) = self.upgrade(Method::POST, url, headers).await?;
        if answer.get(UPGRADE).is_none_or(|u| u != SPDY) {
            return Err(ClientError::Upgrade("not to SPDY/3.1"));
        }
        let chosen = answer.get(STREAM_PROTOCOL).and_then(|v| v.to_str().ok());
        let chosen = chosen.ok_or(ClientError::Upgrade("no subprotocol"))?;
        Ok((io, chosen.to_owned()))
    }

    /// Upgrades to a WebSocket with this subprotocol.
    ///
    /// # Errors
    /// When the server can't be reached, or refuses.
    pub async fn websocket(&self, url: &str, protocol: &str) -> Result<WebSocket, ClientError> {
        let key = BASE64.encode(rand::random::<[u8; 16]>());
        let mut headers = HeaderMap::new();
        let value = |text: &str| text.parse().map_err(|_| bad(url));
        headers.insert(UPGRADE, value("websocket")?);
        headers.insert(SEC_WEBSOCKET_VERSION, value("13")?);
        headers.insert(SEC_WEBSOCKET_KEY, value(&key)?);
        if !protocol.is_empty() {
            headers.insert(SEC_WEBSOCKET_PROTOCOL, value(protocol)?);
        }
        let (io, answer) = self.upgrade(Method::GET, url, headers).await?;
        let accept = derive_accept_key(key.as_bytes());
        if answer
            .get(SEC_WEBSOCKET_ACCEPT)
            .is_none_or(|a| *a != *accept)
        {
            return Err(ClientError::Upgrade("wrong Sec-WebSocket-Accept"));
        }
        let chosen = answer.get(SEC_WEBSOCKET_PROTOCOL);
        if chosen.map_or(&b""[..], |c| c.as_bytes()) != protocol.as_bytes() {
            return Err(ClientError::Upgrade("another subprotocol"));
        }
        Ok(websocket::open(io, Role::Client, MAX_MESSAGE).await)
    }

    async fn upgrade(
        &self,
        method: Method,
        url: &str,
        mut headers: HeaderMap,
    ) -> Result<(Connection, HeaderMap), ClientError> {
        let uri: Uri = url.parse().map_err(|_| bad(url))?;
        let host = uri.authority().ok_or_else(|| bad(url))?.as_str();
        headers.insert(CONNECTION, "Upgrade".parse().map_err(|_| bad(url))?);
        headers.insert(HOST, host.parse().map_err(|_| bad(url))?);
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = method;
        *request.uri_mut() = uri.path().parse().map_err(|_| bad(url))?;
        *request.headers_mut() = headers;

        let io = self.connect(url, &uri).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await?;
        let connection = tokio::spawn(connection.with_upgrades());
        let mut answer = sender.send_request(request).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            let refused = refused(answer).await;
            connection.abort();
            return Err(refused);
        }
        let io = hyper::upgrade::on(&mut answer).await?;
        Ok((TokioIo::new(io), answer.headers().clone()))
    }

    async fn connect(&self, url: &str, uri: &Uri) -> Result<Box<dyn Duplex>, ClientError> {
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad(url)),
        };
        let host = uri.host().ok_or_else(|| bad(url))?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let failed = |source| ClientError::Connect(url.to_owned(), source);
        let stream = TcpStream::connect((host, port)).await.map_err(failed)?;
        // As in the server.
        let _ = stream.set_nodelay(true);
        if !tls {
            return Ok(Box::new(stream));
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.roots.clone());
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(std::io::Error::other(error)))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(host.to_owned()).map_err(|_| bad(url))?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream);
        Ok(Box::new(stream.await.map_err(failed)?))
    }
}

fn bad(url: &str) -> ClientError {
    ClientError::Url(url.to_owned())
}

async fn refused(answer: Response<Incoming>) -> ClientError {
    let status = answer.status().as_u16();
    let accepted = answer.headers().get_all(ACCEPTED_PROTOCOLS);
    let accepted = accepted
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .map(str::to_owned)
        .collect();
    let body = answer.into_body().collect().await;
    let body = body.map_or_else(|_| Bytes::new(), |body| body.to_bytes());
    ClientError::Refused {
        status,
        body: String::from_utf8_lossy(&body).trim().to_owned(),
        accepted,
    }
}
