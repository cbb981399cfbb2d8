//! `hull console`.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use hull_base::beneath::Directory;
use hull_proto_cri::v1::{PodSandboxState, PodSandboxStatusRequest};
use rustix::fs::OFlags;

use super::find::{self, Found};
use crate::{client::Client, table};

/// How often a console that is followed is looked at.
const POLL: Duration = Duration::from_millis(200);

/// What `hull console` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ConsoleArgs {
    /// Container
    container: String,
    /// Go on with what is written, to the end of its microVM
    #[arg(short, long)]
    follow: bool,
}

/// Prints what the guest's kernel said in the microVM of a container.
pub(super) async fn console(client: &Client, state: &Path, arguments: &ConsoleArgs) -> Result<()> {
    let found = find::one(client, &arguments.container).await?;
    let mut file = open(state, &found)?;
    let tame = io::stdout().is_terminal();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Asked before reading: what was written before the end is read after it.
        let last = !arguments.follow || !is_up(client, &found).await;
        loop {
            let count = file.read(&mut buffer).context("read the console")?;
            if count == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&buffer[..count]);
            table::print(&if tame {
                tamed(&text)
            } else {
                text.into_owned()
            })?;
        }
        if last {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The VMM may write in this directory, and its guest may have taken it over: no link is followed.
fn open(state: &Path, found: &Found) -> Result<File> {
    let name = Path::new("pods").join(&found.pod.id).join("console.log");
    let opened = Directory::open(state).and_then(|state| state.file(&name, OFlags::RDONLY));
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "no console of {} was kept: with debug_console = true that of new pods is",
            found.name()
        ),
        opened => opened.with_context(|| format!("open the console of {}", found.name())),
    }
}

async fn is_up(client: &Client, found: &Found) -> bool {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: found.pod.id.clone(),
        verbose: false,
    };
    let status = client.runtime.clone().pod_sandbox_status(request).await;
    let status = status.ok().and_then(|answer| answer.into_inner().status);
    status.is_some_and(|status| status.state() == PodSandboxState::SandboxReady)
}

/// Without what moves a terminal's cursor or sets its colours.
fn tamed(text: &str) -> String {
    let tame = |char: char| match char {
        '\n' | '\t' => char,
        '\r' => ' ',
        char if char.is_control() => char::REPLACEMENT_CHARACTER,
        char => char,
    };
    text.replace("\r\n", "\n").chars().map(tame).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_get_hold_of_the_terminal() {
        assert_eq!(tamed("a\r\nb\tc\x1b[2Jd\re"), "a\nb\tc\u{fffd}[2Jd e");
    }
}
