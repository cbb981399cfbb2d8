//! Exec and attach over a WebSocket: a channel each.

use bytes::Bytes;

use super::session::{Client, run};
use crate::{
    channel::Input, negotiate::ChannelProtocol, request::Command, shared::Shared,
    websocket::Channels,
};

/// Input of the process.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// The status at the end.
const ERROR: u8 = 3;
/// Sizes of the terminal.
const RESIZE: u8 = 4;

/// The channels that a client writes to.
pub(crate) const CLIENT_CHANNELS: [u8; 2] = [STDIN, RESIZE];

/// Serves a process over these channels.
pub(crate) async fn over_channels(
    shared: &Shared,
    command: Command,
    protocol: ChannelProtocol,
    channels: &Channels,
    inputs: Vec<Input>,
) {
    let streams = command.streams();
    let mut inputs = inputs.into_iter();
    let (stdin, resize) = (inputs.next(), inputs.next());
    let mut client = Client {
        stdin: stdin.filter(|_| streams.stdin),
        stdout: streams.stdout.then(|| channels.sender(STDOUT).into()),
        stderr: streams.stderr.then(|| channels.sender(STDERR).into()),
        resize: resize.filter(|_| streams.tty),
        error: channels.sender(ERROR).into(),
        json_status: protocol.json_status,
    };
    // Some clients wait for a first message.
    let first = [&mut client.stdout, &mut client.stderr];
    let first = first.into_iter().flatten().next();
    let first = first.unwrap_or(&mut client.error);
    if first.send(Bytes::new()).await.is_ok() {
        run(shared.backend.as_ref(), &command, client).await;
    }
}
