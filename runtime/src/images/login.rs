//! `hull login` and `hull logout`.

use std::{
    io::{self, BufRead, IsTerminal, Read, Write},
    thread,
};

use anyhow::{Context, Result, bail};
use hull_proto_images::v1::LoginRequest;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use tokio::sync::oneshot;

use super::{credentials::File, secret};
use crate::{
    client::{self, refused},
    config::Settings,
    signals::until_signal,
    table::print,
};

/// What `hull login` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LoginArgs {
    /// Registry: a host, with a port if it has one
    #[arg(default_value = "docker.io", value_parser = host)]
    registry: String,
    /// User at the registry; asked for at a terminal
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,
    /// Read the password from standard input, without a terminal too
    #[arg(long, requires = "user")]
    password_stdin: bool,
}

/// What `hull logout` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LogoutArgs {
    /// Registry: a host, with a port if it has one
    #[arg(default_value = "docker.io", value_parser = host)]
    registry: String,
}

/// A host out of an address, as people copy it.
fn host(text: &str) -> Result<String, String> {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    match host {
        "" => Err("it names no host".into()),
        host => Ok(hull_image::canonical_registry(host).into()),
    }
}

/// Has the registry look at name and password, and keeps them if it takes them; its exit code.
pub(crate) async fn login(settings: Settings, arguments: LoginArgs) -> Result<u8> {
    until_signal(async {
        log_in(settings, arguments).await?;
        Ok(0)
    })
    .await
}

async fn log_in(settings: Settings, arguments: LoginArgs) -> Result<()> {
    // Found out before anything is typed.
    let file = File::find()?.context("neither HOME nor DOCKER_CONFIG tells where to keep it")?;
    file.read()?;
    let username = match arguments.user {
        Some(user) => user,
        None => ask("user: ", Echo::On).await?,
    };
    let password = if arguments.password_stdin {
        apart(|| secret(io::stdin())).await?
    } else {
        ask("password: ", Echo::Off).await?
    };
    if username.is_empty() || username.contains(':') || password.is_empty() {
        bail!("there must be a name, without a colon, and a password");
    }
    let daemon = client::connect(settings).await?;
    let request = LoginRequest {
        registry: arguments.registry,
        username: username.clone(),
        password: password.clone(),
    };
    let answer = daemon.client().images.login(request).await;
    daemon.close().await;
    let registry = answer.map_err(refused("log in"))?.into_inner().registry;
    file.put(&registry, &username, &password)?;
    print(&format!(
        "logged in to {registry}; kept in {}\n",
        file.path().display()
    ))
}

/// Forgets what was kept.
pub(crate) fn logout(arguments: &LogoutArgs) -> Result<()> {
    let registry = &arguments.registry;
    let removed = match File::find()? {
        Some(file) => file.remove(registry)?,
        None => false,
    };
    if removed {
        print(&format!("logged out of {registry}\n"))
    } else {
        print(&format!("not logged in to {registry}\n"))
    }
}

/// Whether what is typed is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Echo {
    On,
    Off,
}

async fn ask(prompt: &str, echo: Echo) -> Result<String> {
    if !io::stdin().is_terminal() {
        bail!("standard input is no terminal: use --user and --password-stdin");
    }
    // Before somebody answers: what was typed until then is dropped.
    let hidden = (echo == Echo::Off).then(Hidden::set).transpose()?;
    let mut stderr = io::stderr();
    let asked = stderr
        .write_all(prompt.as_bytes())
        .and_then(|()| stderr.flush());
    asked.context("ask")?;
    let read = apart(|| {
        let mut line = String::new();
        let mut input = io::stdin().lock().take(super::LONGEST_SECRET);
        let read = input.read_line(&mut line);
        read.context("read standard input")?;
        Ok(line)
    });
    let read = read.await;
    if hidden.is_some() {
        // The line end was hidden too.
        let _ = writeln!(stderr);
    }
    Ok(read?.trim_end_matches(['\r', '\n']).to_owned())
}

/// What `read` gives, by a thread that nobody waits for: a read can't be given up when a signal comes.
async fn apart<T: Send + 'static>(read: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || sender.send(read()));
    receiver.await.context("read standard input")?
}

/// A terminal that does not show what is typed, until this is dropped.
struct Hidden(rustix::termios::Termios);

impl Hidden {
    fn set() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("ask for the terminal's settings")?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden).context("set the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_for_their_hosts() {
        for (text, expected) in [
            ("quay.io", "quay.io"),
            ("https://quay.io:8443/v2/", "quay.io:8443"),
            ("https://index.docker.io/v1/", "docker.io"),
        ] {
            assert_eq!(host(text).unwrap(), expected);
        }
        assert!(host("https://").is_err());
    }
}
