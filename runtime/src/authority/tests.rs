use loona_hpack::Encoder;

use super::*;

type Fields = Vec<Field>;

/// The headers of a call, as gRPC's clients order them.
fn call(authority: Option<&[u8]>, more: usize) -> Fields {
    let mut fields: Vec<(&[u8], &[u8])> = vec![
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/runtime.v1.RuntimeService/Version"),
    ];
    fields.extend(authority.map(|value| (&b":authority"[..], value)));
    fields.push((b"te", b"trailers"));
    let mut fields: Fields = fields
        .into_iter()
        .map(|(name, value)| (name.to_vec(), value.to_vec()))
        .collect();
    fields.push((b"x-more".to_vec(), vec![b'm'; more]));
    fields
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8], to: &mut Vec<u8>) {
    let head = Head {
        length: payload.len(),
        kind,
        flags,
        stream,
    };
    let mut bytes = BytesMut::new();
    head.write(&mut bytes);
    to.extend_from_slice(&bytes);
    to.extend_from_slice(payload);
}

/// A client's bytes: settings, two calls that share a table, each with data.
fn connection(fields: &Fields) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    let mut encoder = Encoder::new();
    frame(4, 0, 0, &[], &mut bytes);
    for stream in [1, 3] {
        let pairs = fields.iter().map(|(name, value)| (&name[..], &value[..]));
        let block = encoder.encode(pairs);
        frame(HEADERS, END_HEADERS, stream, &block, &mut bytes);
        frame(0, 1, stream, b"message", &mut bytes);
    }
    bytes
}

/// What the server gets, when the bytes come in pieces of this length.
fn filtered(bytes: &[u8], piece: usize) -> io::Result<Vec<u8>> {
    let mut filter = Filter::new();
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    for piece in bytes.chunks(piece) {
        input.extend_from_slice(piece);
        filter.advance(&mut input, &mut output)?;
    }
    output.unsplit(input);
    Ok(output.to_vec())
}

/// The fields of all blocks, as a server's decoder understands them, and what other frames hold.
fn understood(mut bytes: &[u8]) -> (Vec<Fields>, Vec<Vec<u8>>) {
    let mut decoder = Decoder::new();
    let (mut blocks, mut others) = (Vec::new(), Vec::new());
    bytes = bytes.strip_prefix(PREFACE).unwrap();
    let mut block = Vec::new();
    while let Some(head) = Head::read(bytes) {
        assert!(head.length <= MAX_FRAME);
        let payload = &bytes[HEADER..HEADER + head.length];
        bytes = &bytes[HEADER + head.length..];
        if ![HEADERS, CONTINUATION].contains(&head.kind) {
            others.push(payload.to_vec());
            continue;
        }
        block.extend_from_slice(fragment(head, payload).unwrap());
        if head.flags & END_HEADERS != 0 {
            blocks.push(decoder.decode(&block).unwrap());
            block.clear();
        }
    }
    assert!(bytes.is_empty());
    (blocks, others)
}

#[test]
fn what_is_usual_is_passed_on_as_it_is() {
    for authority in [
        None,
        Some(&b"localhost"[..]),
        Some(b"localhost:443"),
        Some(b"[::1]:1"),
        Some(b"hull.sock"),
    ] {
        let bytes = connection(&call(authority, 10));
        for piece in [1, 7, bytes.len()] {
            assert_eq!(filtered(&bytes, piece).unwrap(), bytes, "{authority:?}");
        }
    }
}

#[test]
fn paths_and_what_else_is_no_authority_become_localhost() {
    for authority in [
        &b""[..],
        b"/run/hull/hull.sock",
        b"%2Frun%2Fhull.sock",
        b"unix:///run/hull.sock",
        b"a b\xff",
    ] {
        // The last takes more than one frame, and more than one byte for its length.
        for more in [10, 300, 40_000] {
            let bytes = connection(&call(Some(authority), more));
            if bytes.len() > MAX_FRAME * 2 {
                continue;
            }
            for piece in [1, 7, bytes.len()] {
                let (blocks, others) = understood(&filtered(&bytes, piece).unwrap());
                let expected = call(Some(b"localhost"), more);
                assert_eq!(blocks, [expected.clone(), expected], "{authority:?}");
                assert_eq!(others, [&b""[..], b"message", b"message"]);
            }
        }
    }
}

#[test]
fn a_block_in_several_frames_with_padding_and_priority_is_one() {
    let fields = call(Some(b"/run/hull.sock"), 30_000);
    let pairs = fields.iter().map(|(name, value)| (&name[..], &value[..]));
    let block = Encoder::new().encode(pairs);
    let (first, rest) = block.split_at(9);
    let mut padded = vec![4, 0, 0, 0, 0, 16];
    padded.extend_from_slice(first);
    padded.extend_from_slice(&[0; 4]);
    let mut bytes = PREFACE.to_vec();
    frame(HEADERS, PADDED | PRIORITY | 1, 1, &padded, &mut bytes);
    let mut pieces = rest.chunks(MAX_FRAME).peekable();
    while let Some(piece) = pieces.next() {
        let flags = if pieces.peek().is_none() {
            END_HEADERS
        } else {
            0
        };
        frame(CONTINUATION, flags, 1, piece, &mut bytes);
    }
    let sent = filtered(&bytes, 1000).unwrap();
    let (blocks, _) = understood(&sent);
    assert_eq!(blocks, [call(Some(b"localhost"), 30_000)]);
    let head = Head::read(&sent[PREFACE.len()..]).unwrap();
    assert_eq!(head.flags, 1, "the end of the stream is told");
}

#[test]
fn what_is_no_http2_is_the_servers_business() {
    let with = |frames: &[u8]| [PREFACE, frames].concat();
    let mut broken = Vec::new();
    frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff], &mut broken);
    let mut padding = Vec::new();
    frame(HEADERS, END_HEADERS | PADDED, 1, &[9, 0], &mut padding);
    let mut large = Vec::new();
    frame(HEADERS, END_HEADERS, 1, &vec![0; MAX_FRAME + 1], &mut large);
    let mut within = Vec::new();
    frame(HEADERS, 0, 1, &[0x82], &mut within);
    frame(0, 0, 1, b"data", &mut within);
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"PRI".to_vec(),
        with(&broken),
        with(&padding),
        with(&large),
        with(&within),
        with(&[0, 0]),
    ] {
        assert_eq!(filtered(&bytes, 5).unwrap(), bytes);
    }
}

#[test]
fn a_client_that_is_rewritten_has_to_send_blocks() {
    for frames in [
        // An entry that is not in the table.
        &[0, 0, 1, HEADERS, END_HEADERS, 0, 0, 0, 5, 0xfe][..],
        &[
            0, 0, 1, HEADERS, 0, 0, 0, 0, 5, 0x82, 0, 0, 0, 6, 0, 0, 0, 0, 0,
        ],
    ] {
        let mut bytes = connection(&call(Some(b"/run/hull.sock"), 10));
        bytes.extend_from_slice(frames);
        let error = filtered(&bytes, 50).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}

/// Each byte of it stands for an entry of 4 KB.
#[test]
fn a_block_that_unfolds_is_not_kept() {
    let mut bytes = connection(&call(Some(b"/run/hull.sock"), 3900));
    let block = vec![0xbe; 16_000];
    frame(HEADERS, END_HEADERS, 5, &block, &mut bytes);
    assert!(filtered(&bytes, 1000).is_err());
}
