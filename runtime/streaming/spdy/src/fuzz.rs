//! Fuzz targets: bytes of a client. `make fuzz` runs them (tests/fuzz), and this crate's tests do.

use crate::{Decoder, Encoder, Frame};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[("spdy", decode)];

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

#[test]
fn bytes_of_a_client_do_no_harm() {
    hull_corpus::replay(TARGETS);
}
