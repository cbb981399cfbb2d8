//! Sizes of the client's terminal: JSON objects, one after the other.

use serde::Deserialize;
use tokio::sync::mpsc;
use tracing::debug;

use crate::{backend::TerminalSize, channel::Input};

/// The longest text without a whole object.
const MAX_TEXT: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Passes sizes on until their stream ends or makes no sense.
pub(super) async fn resize(from: Option<&mut Input>, to: Option<mpsc::Sender<TerminalSize>>) {
    let (Some(from), Some(to)) = (from, to) else {
        return;
    };
    let mut text = Vec::new();
    while let Ok(Some(bytes)) = from.recv().await {
        text.extend_from_slice(&bytes);
        let Some(sizes) = parse(&mut text) else {
            debug!("sizes of the terminal make no sense");
            return;
        };
        for size in sizes {
            if to.send(size).await.is_err() {
                return;
            }
        }
    }
}

/// Takes whole objects from the text; none when it is no JSON, or has no end.
fn parse(text: &mut Vec<u8>) -> Option<Vec<TerminalSize>> {
    let mut sizes = Vec::new();
    let mut objects = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    loop {
        match objects.next() {
            // A terminal that has no size yet.
            Some(Ok(Size { width: 0, .. } | Size { height: 0, .. })) => {}
            Some(Ok(Size { width, height })) => sizes.push(TerminalSize {
                columns: width,
                rows: height,
            }),
            Some(Err(error)) if !error.is_eof() => return None,
            Some(Err(_)) | None => break,
        }
    }
    let done = objects.byte_offset();
    text.drain(..done);
    (text.len() <= MAX_TEXT).then_some(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_in_any_pieces_and_empty_ones_ignored() {
        let wire = b"{\"Width\":80,\"Height\":24}\n{\"Width\":0,\"Height\":0}\n{\"Width\":132,\"Height\":43}";
        for piece in 1..wire.len() {
            let mut text = Vec::new();
            let mut sizes = Vec::new();
            for bytes in wire.chunks(piece) {
                text.extend_from_slice(bytes);
                sizes.extend(parse(&mut text).unwrap());
            }
            let sizes: Vec<_> = sizes.iter().map(|s| (s.columns, s.rows)).collect();
            assert_eq!(sizes, [(80, 24), (132, 43)]);
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        assert!(parse(&mut b"[80,24]x".to_vec()).is_none());
        assert!(parse(&mut b"{\"Width\":70000,\"Height\":1}".to_vec()).is_none());
        assert!(parse(&mut vec![b' '; 10_000]).is_some());
        assert!(parse(&mut format!("{{\"{}", "x".repeat(10_000)).into_bytes()).is_none());
    }
}
