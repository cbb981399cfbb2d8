//! Exec and attach over SPDY: a stream each, named by `streamtype`.

use tokio::{sync::mpsc, time::timeout};
use tracing::debug;

use super::session::{Client, run};
use crate::{
    channel::{Input, Lost},
    mux::Incoming,
    negotiate::RemoteCommand,
    output::Output,
    request::{Command, Streams},
    shared::Shared,
};

/// The streams that the client has opened so far.
#[derive(Debug, Default)]
struct Opened {
    error: Option<(Output, Input)>,
    stdin: Option<(Output, Input)>,
    stdout: Option<(Output, Input)>,
    stderr: Option<(Output, Input)>,
    resize: Option<(Output, Input)>,
}

/// Waits for the client's streams and serves them.
pub(crate) async fn over_spdy(
    shared: &Shared,
    command: Command,
    protocol: RemoteCommand,
    mut incoming: mpsc::Receiver<Incoming>,
) {
    let streams = command.streams();
    let resize = streams.tty && protocol.resize;
    let mut opened = Opened::default();
    let wait = async {
        while !opened.has(streams, resize) {
            let stream = incoming.recv().await.ok_or(Lost)?;
            opened.add(stream).await?;
        }
        Ok::<_, Lost>(())
    };
    match timeout(shared.config.creation_timeout, wait).await {
        Ok(Ok(())) => {}
        Ok(Err(Lost)) => return,
        Err(_) => return debug!("the client did not open its streams in time"),
    }
    // From now on a new stream is reset.
    drop(incoming);
    let Some((error, _)) = opened.error else {
        return;
    };
    // A client waits for the other direction of a stream and ends its own then: what is not used
    // stays open.
    let (mut unused_out, mut unused_in) = (Vec::new(), Vec::new());
    let mut inward = |stream: Option<(Output, Input)>, wanted: bool| {
        let (output, input) = stream?;
        unused_out.push(output);
        wanted.then_some(input)
    };
    let stdin = inward(opened.stdin, streams.stdin);
    let resize = inward(opened.resize, true);
    let mut outward = |stream: Option<(Output, Input)>, wanted: bool| {
        let (output, input) = stream?;
        unused_in.push(input);
        wanted.then_some(output)
    };
    let client = Client {
        stdin,
        stdout: outward(opened.stdout, streams.stdout),
        stderr: outward(opened.stderr, streams.stderr),
        resize,
        error,
        json_status: protocol.json_status,
    };
    // Nobody reads these: what comes is dropped at once.
    drop(unused_in);
    run(shared.backend.as_ref(), &command, client).await;
    drop(unused_out);
}

impl Opened {
    /// Whether all is there that the request asks for; the client may have opened more.
    fn has(&self, wanted: Streams, resize: bool) -> bool {
        self.error.is_some()
            && self.stdin.is_some() >= wanted.stdin
            && self.stdout.is_some() >= wanted.stdout
            && self.stderr.is_some() >= wanted.stderr
            && self.resize.is_some() >= resize
    }

    async fn add(&mut self, stream: Incoming) -> Result<(), Lost> {
        let slot = match stream.headers.get("streamtype") {
            Some("error") => &mut self.error,
            Some("stdin") => &mut self.stdin,
            Some("stdout") => &mut self.stdout,
            Some("stderr") => &mut self.stderr,
            Some("resize") => &mut self.resize,
            _ => {
                debug!(headers = ?stream.headers, "a stream of unknown type is refused");
                stream.reject().await;
                return Ok(());
            }
        };
        if slot.is_some() {
            debug!(headers = ?stream.headers, "a second stream of its type is refused");
            stream.reject().await;
            return Ok(());
        }
        // The client sends nothing before it has the reply.
        let (output, input) = stream.accept().await?;
        *slot = Some((output.into(), input));
        Ok(())
    }
}
