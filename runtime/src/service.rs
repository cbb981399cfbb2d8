//! What the daemon tells the service manager that started it (sd_notify(3)): that it serves, that it is well,
//! that it ends. Started by anything else, it tells nobody.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use sd_notify::NotifyState;
use tracing::{info, warn};

use crate::client;

/// Calls in the time within which the manager wants to hear of us: one that is late by chance is no harm.
const CALLS: u32 = 4;

/// The daemon serves `socket` from now on. It tells so, and that it is well, as long as it is: a call over
/// the socket that looks at all pods has to be answered. So a daemon that hangs, or whose socket somebody
/// removed, is started anew; its pods go on meanwhile.
pub(crate) fn ready(socket: PathBuf) {
    told(sd_notify::notify(&[NotifyState::Ready]));
    if let Some(limit) = sd_notify::watchdog_enabled() {
        info!(?limit, "the service manager watches this daemon");
        tokio::spawn(watch(socket, limit / CALLS));
    }
}

/// The daemon ends.
pub(crate) fn stopping() {
    told(sd_notify::notify(&[NotifyState::Stopping]));
}

async fn watch(socket: PathBuf, every: Duration) {
    loop {
        if let Err(reason) = healthy(&socket, every).await {
            warn!(
                reason,
                "this daemon does not answer itself; the service manager may end it"
            );
        } else {
            told(sd_notify::notify(&[NotifyState::Watchdog]));
        }
        tokio::time::sleep(every).await;
    }
}

/// Whether the daemon answers, or why not.
async fn healthy(socket: &Path, limit: Duration) -> Result<(), String> {
    match tokio::time::timeout(limit, client::answers(socket)).await {
        Ok(answered) => answered.map_err(|error| format!("{error:#}")),
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

/// A manager that does not listen is no reason to stop serving.
fn told(result: io::Result<()>) {
    if let Err(error) = result {
        warn!(%error, "tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_daemon_that_does_not_answer_is_not_well() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let limit = Duration::from_millis(100);
        assert!(
            healthy(&socket, limit)
                .await
                .unwrap_err()
                .contains("connect")
        );
        let _listens_and_never_answers = UnixListener::bind(&socket).unwrap();
        let reason = healthy(&socket, limit).await.unwrap_err();
        assert!(reason.starts_with("no answer within"), "{reason}");
    }
}
