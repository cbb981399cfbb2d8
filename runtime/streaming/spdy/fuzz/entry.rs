//! What is fuzzed; the crate's own tests run it too.

use hull_spdy::{Decoder, Encoder, Frame};

/// Feeds bytes to a decoder, in chunks as the first byte says, and sends every frame that it found
/// through an encoder and another decoder.
pub fn decode(input: &[u8]) {
    let Some((&chunk, input)) = input.split_first() else {
        return;
    };
    let (mut decoder, mut encoder, mut again) = (Decoder::new(), Encoder::new(), Decoder::new());
    for chunk in input.chunks(usize::from(chunk).max(1)) {
        decoder.buffer().extend_from_slice(chunk);
        loop {
            match decoder.frame() {
                Ok(Some(frame)) => round_trip(&frame, &mut encoder, &mut again),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

fn round_trip(frame: &Frame, encoder: &mut Encoder, again: &mut Decoder) {
    encoder
        .encode(frame, again.buffer())
        .expect("a frame that was read can be written");
    assert_eq!(again.frame().expect("it can be read").as_ref(), Some(frame));
}
