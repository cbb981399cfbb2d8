//! Frames on the wire.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use crate::{
    DecodeError, Decoder, Encoder, Frame, Headers, MAX_CONTROL_FRAME,
    dictionary::{ADLER32, DICTIONARY},
};

fn headers() -> impl Strategy<Value = Headers> {
    let name = prop_oneof![
        Just("streamtype".to_owned()),
        Just("port".to_owned()),
        "[a-z-]{1,20}",
    ];
    prop::collection::vec((name, any::<String>()), 0..8).prop_map(Headers)
}

fn frame() -> impl Strategy<Value = Frame> {
    let stream = || 0..=crate::MAX_STREAM;
    prop_oneof![
        (
            stream(),
            stream(),
            0..8_u8,
            headers(),
            any::<bool>(),
            any::<bool>()
        )
            .prop_map(
                |(stream, associated, priority, headers, fin, unidirectional)| {
                    Frame::SynStream {
                        stream,
                        associated,
                        priority,
                        headers,
                        fin,
                        unidirectional,
                    }
                }
            ),
        (stream(), headers(), any::<bool>()).prop_map(|(stream, headers, fin)| Frame::SynReply {
            stream,
            headers,
            fin
        }),
        (stream(), headers(), any::<bool>()).prop_map(|(stream, headers, fin)| Frame::Headers {
            stream,
            headers,
            fin
        }),
        (stream(), any::<u32>()).prop_map(|(stream, status)| Frame::RstStream { stream, status }),
        Just(Frame::Settings),
        any::<u32>().prop_map(Frame::Ping),
        (stream(), any::<u32>()).prop_map(|(last_stream, status)| Frame::GoAway {
            last_stream,
            status
        }),
        (stream(), stream()).prop_map(|(stream, delta)| Frame::WindowUpdate { stream, delta }),
        (
            stream(),
            prop::collection::vec(any::<u8>(), 0..300),
            any::<bool>()
        )
            .prop_map(|(stream, payload, fin)| Frame::Data {
                stream,
                payload: payload.into(),
                fin
            }),
    ]
}

fn decode(wire: &[u8], chunk: usize) -> Result<Vec<Frame>, DecodeError> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for chunk in wire.chunks(chunk) {
        decoder.buffer().extend_from_slice(chunk);
        while let Some(frame) = decoder.frame()? {
            frames.push(frame);
        }
    }
    Ok(frames)
}

proptest! {
    #[test]
    fn frames_survive_the_wire_in_any_chunks(
        frames in prop::collection::vec(frame(), 0..20),
        chunk in 1..400_usize,
    ) {
        let (mut encoder, mut wire) = (Encoder::new(), BytesMut::new());
        for frame in &frames {
            encoder.encode(frame, &mut wire).unwrap();
        }
        // Whole, a data frame is one frame.
        prop_assert_eq!(&decode(&wire, wire.len().max(1)).unwrap(), &frames);
        // In chunks, what was split adds up to the same bytes per stream.
        let split = decode(&wire, chunk).unwrap();
        prop_assert_eq!(flat(&split), flat(&frames));
    }

    #[test]
    fn arbitrary_bytes_never_panic(input in prop::collection::vec(any::<u8>(), 0..2000)) {
        crate::fuzz::decode(&input);
    }

    #[test]
    fn broken_frames_never_panic(
        frames in prop::collection::vec(frame(), 1..6),
        broken in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        chunk in any::<u8>(),
    ) {
        let (mut encoder, mut wire) = (Encoder::new(), BytesMut::new());
        for frame in &frames {
            encoder.encode(frame, &mut wire).unwrap();
        }
        for (index, byte) in broken {
            let index = index.index(wire.len());
            wire[index] = byte;
        }
        crate::fuzz::decode(&[&[chunk], wire.as_ref()].concat());
    }
}

/// Frames with runs of data flattened to single bytes and ends.
fn flat(frames: &[Frame]) -> Vec<Frame> {
    let mut flat = Vec::new();
    for frame in frames {
        match frame {
            Frame::Data {
                stream,
                payload,
                fin,
            } => {
                for byte in payload {
                    flat.push(Frame::Data {
                        stream: *stream,
                        payload: Bytes::copy_from_slice(&[*byte]),
                        fin: false,
                    });
                }
                if *fin || payload.is_empty() {
                    flat.push(Frame::Data {
                        stream: *stream,
                        payload: Bytes::new(),
                        fin: *fin,
                    });
                }
            }
            other => flat.push(other.clone()),
        }
    }
    flat
}

#[test]
fn the_dictionary_is_the_specifications() {
    let adler = DICTIONARY.iter().fold((1_u32, 0_u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (a + b) % 65521)
    });
    assert_eq!(adler.1 << 16 | adler.0, ADLER32);
    assert_eq!(DICTIONARY.len(), 1423);
}

/// Two frames whose headers were compressed by C's zlib: an error and a data stream.
#[test]
fn a_frame_of_another_implementation_is_read() {
    let wire: &[u8] = include_bytes!("tests/syn_stream.bin");
    let frames = decode(wire, 7).unwrap();
    let read: Vec<_> = frames
        .iter()
        .map(|frame| match frame {
            Frame::SynStream {
                stream, headers, ..
            } => (*stream, headers.get("streamtype"), headers.get("port")),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        read,
        [(1, Some("error"), None), (3, Some("data"), Some("80"))]
    );
}

#[test]
fn header_names_are_found_in_any_case_and_give_their_first_value() {
    let headers = Headers::new(&[("StreamType", "data\0error")]);
    assert_eq!(headers.get("streamtype"), Some("data"));
    assert_eq!(headers.get("port"), None);
}

#[test]
fn a_control_frame_that_is_too_large_is_refused_by_its_prefix() {
    let mut wire = vec![0x80, 3, 0, 1, 0];
    wire.extend(&(MAX_CONTROL_FRAME as u32 + 1).to_be_bytes()[1..]);
    assert!(matches!(decode(&wire, 8), Err(DecodeError::TooLarge(_))));
}

#[test]
fn a_header_block_that_expands_without_end_is_refused() {
    let headers = Headers(vec![("a".into(), "x".repeat(1 << 20))]);
    let frame = Frame::SynReply {
        stream: 1,
        headers,
        fin: false,
    };
    let mut wire = BytesMut::new();
    Encoder::new().encode(&frame, &mut wire).unwrap();
    assert!(wire.len() < MAX_CONTROL_FRAME);
    assert!(matches!(
        decode(&wire, wire.len()),
        Err(DecodeError::Headers { .. })
    ));
}

#[test]
fn a_data_frame_of_16_mib_needs_no_buffer() {
    let mut decoder = Decoder::new();
    decoder
        .buffer()
        .extend_from_slice(&[0, 0, 0, 1, 1, 0xff, 0xff, 0xff]);
    let mut total = 0;
    for _ in 0..(1 << 24) / 4096 {
        decoder.buffer().extend_from_slice(&[0; 4096]);
        while let Ok(Some(Frame::Data { payload, fin, .. })) = decoder.frame() {
            total += payload.len();
            assert_eq!(fin, total == (1 << 24) - 1);
            if fin {
                return;
            }
        }
        assert!(decoder.buffer().is_empty());
    }
    panic!("no end after {total} bytes");
}

#[test]
fn http_is_not_spdy() {
    // The first bit of a letter is 0: a data frame, of a stream that nobody opened.
    let frames = decode(b"GET / HTTP/1.1\r\n\r\n", 100).unwrap();
    assert!(matches!(frames[..], [Frame::Data { .. }]));
    assert!(matches!(
        decode(&[0x80, 2, 0, 1, 0, 0, 0, 0], 8),
        Err(DecodeError::Version(2))
    ));
}
