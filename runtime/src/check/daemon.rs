//! What a daemon takes, and whether somebody else has it.

use std::{
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixStream,
    path::Path,
};

use crate::{client, host::Finding};

/// Who serves the CRI socket: a daemon of ours, or nobody.
pub(super) async fn socket(path: &Path) -> Finding {
    let advice = format!(
        "`ss -xlp | grep {}` tells who it is: stop it, or set `listen`",
        path.display()
    );
    match client::runtime_name(path).await {
        Ok(name) if name == env!("CARGO_PKG_NAME") => {
            Finding::Good(format!("hull serves {}", path.display()))
        }
        Ok(name) => Finding::bad(format!("{name} serves {}", path.display()), advice),
        Err(_) if UnixStream::connect(path).is_ok() => Finding::bad(
            format!("somebody serves {}, and does not speak CRI", path.display()),
            advice,
        ),
        Err(_) => Finding::Good(format!("{} is free; no daemon serves", path.display())),
    }
}

/// Whether the port of exec, attach and port-forward can be had. A daemon of ours that serves has it.
pub(super) fn streaming(address: SocketAddr, served: &Finding) -> Finding {
    if address.port() == 0 || matches!(served, Finding::Good(detail) if detail.starts_with("hull"))
    {
        return Finding::Good(address.to_string());
    }
    match TcpListener::bind(address) {
        Ok(_) => Finding::Good(format!("{address} is free")),
        Err(error) => Finding::bad(
            format!("listen on {address}: {error}"),
            format!(
                "`ss -tlnp 'sport = :{}'` tells who has it: stop it, or set `streaming.address`",
                address.port()
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_socket_that_others_serve_is_not_free() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(socket(&path).await.is_good());
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            // It hangs up on each.
            while let Ok((stream, _)) = listener.accept() {
                drop(stream);
            }
        });
        assert!(!socket(&path).await.is_good());
    }

    #[test]
    fn a_port_that_others_have_is_not_free() {
        let free = Finding::Good("free".to_owned());
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        assert!(!streaming(address, &free).is_good());
        let ours = Finding::Good("hull serves".to_owned());
        assert!(streaming(address, &ours).is_good());
        drop(other);
        assert!(streaming(address, &free).is_good());
        assert!(streaming("127.0.0.1:0".parse().unwrap(), &free).is_good());
    }
}
