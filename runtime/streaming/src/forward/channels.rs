//! Port-forward over a WebSocket without SPDY: two channels for each port of the request.

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};

use super::relay::Pair;
use crate::{
    channel::Input,
    shared::Shared,
    websocket::{Channels, Codec},
};

/// The channel of a port's bytes; that of its errors is the next one.
fn data_channel(index: usize) -> u8 {
    // Bounded by `check_ports`.
    u8::try_from(2 * index).unwrap_or(u8::MAX)
}

/// Whether there are channels for so many ports.
pub(crate) fn check_ports(ports: &[u16], codec: Codec) -> Result<(), &'static str> {
    // A channel is a digit in base64.
    let most = if codec.base64 { 5 } else { 127 };
    if ports.is_empty() {
        return Err("the port-forward request names no ports, which this protocol needs");
    }
    if ports.len() > most {
        return Err("the port-forward request names more ports than there are channels");
    }
    Ok(())
}

/// The channels that a client writes to.
pub(crate) fn data_channels(ports: &[u16]) -> Vec<u8> {
    (0..ports.len()).map(data_channel).collect()
}

/// Serves one connection for each port, until all have ended.
pub(crate) async fn over_channels(
    shared: &Shared,
    pod: &str,
    ports: &[u16],
    channels: &Channels,
    inputs: Vec<Input>,
) {
    let pairs: FuturesUnordered<_> = ports
        .iter()
        .zip(inputs)
        .enumerate()
        .map(|(index, (&port, input))| {
            let channel = data_channel(index);
            let mut pair = Pair {
                input,
                output: channels.sender(channel).into(),
                error: channels.sender(channel + 1).into(),
            };
            async move {
                // Tells which port the channels are for.
                let first = Bytes::copy_from_slice(&port.to_le_bytes());
                if pair.output.send(first.clone()).await.is_ok()
                    && pair.error.send(first).await.is_ok()
                {
                    pair.relay(shared.backend.as_ref(), pod, port).await;
                }
            }
        })
        .collect();
    pairs.collect::<()>().await;
}
