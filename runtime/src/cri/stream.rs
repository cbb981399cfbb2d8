//! Answers in parts: the streaming forms of the list calls.
//!
//! Each item is in exactly one batch, no batch is empty, and the end of the stream is the end
//! of the list. A batch is bounded in number and in bytes, so that no list is too long for a
//! client's limit on messages.

use futures::{StreamExt, stream, stream::BoxStream};
use prost::Message;
use tonic::Status;

/// Most items of a batch.
const ITEMS: usize = 256;
/// Bytes after which a batch is full. Clients take 4 MiB when nobody told them otherwise.
const BYTES: usize = 1 << 20;

/// What a streaming call answers with.
pub(crate) type Answer<T> = BoxStream<'static, Result<T, Status>>;

/// Sends a list in batches.
pub(crate) fn batches<T, R>(items: Vec<T>, wrap: fn(Vec<T>) -> R) -> Answer<R>
where
    T: Message + 'static,
    R: 'static,
{
    stream::iter(split(items))
        .map(move |batch| Ok(wrap(batch)))
        .boxed()
}

fn split<T: Message>(items: Vec<T>) -> Vec<Vec<T>> {
    let mut batches: Vec<Vec<T>> = Vec::new();
    // As if the batch before the first were full.
    let mut bytes = BYTES;
    for item in items {
        let length = item.encoded_len();
        match batches.last_mut() {
            Some(batch) if batch.len() < ITEMS && bytes + length <= BYTES => {
                batch.push(item);
                bytes += length;
            }
            _ => {
                batches.push(vec![item]);
                bytes = length;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use hull_proto_cri::v1::PodSandbox;

    use super::*;

    fn pod(id: usize, ballast: usize) -> PodSandbox {
        PodSandbox {
            id: id.to_string(),
            runtime_handler: "x".repeat(ballast),
            ..Default::default()
        }
    }

    fn check(pods: &[PodSandbox]) -> usize {
        let batches = split(Vec::from(pods));
        assert_eq!(batches.concat(), pods);
        for batch in &batches {
            let bytes: usize = batch.iter().map(Message::encoded_len).sum();
            assert!((1..=ITEMS).contains(&batch.len()));
            assert!(bytes <= BYTES || batch.len() == 1);
        }
        batches.len()
    }

    #[test]
    fn each_item_is_in_one_batch_and_none_is_empty_or_too_large() {
        assert_eq!(check(&[]), 0);
        let many: Vec<_> = (0..600).map(|id| pod(id, 0)).collect();
        assert_eq!(check(&many), 3);
        let large: Vec<_> = (0..10).map(|id| pod(id, 300 << 10)).collect();
        assert_eq!(check(&large), 4);
        // One that is too large for any batch still has to come.
        assert_eq!(check(&[pod(0, 2 << 20), pod(1, 0)]), 2);
    }
}
