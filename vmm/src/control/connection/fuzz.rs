//! Bytes of a daemon on the control socket.

use hull_proto_vmm::MAX_MESSAGE;

use super::*;

/// Bytes in pieces, as the first one says: what is a request is the same when it is written again, and what
/// comes after a message that can't be framed is not read.
pub(crate) fn messages(input: &[u8]) {
    let Some((&size, input)) = input.split_first() else {
        return;
    };
    let (ours, mut theirs) = UnixStream::pair().expect("make a socket");
    let mut connection = Connection::new(ours).expect("make a connection");
    for piece in input.chunks(usize::from(size).max(1)) {
        theirs.write_all(piece).expect("there is room");
        loop {
            match connection.receive() {
                Ok(Some(Incoming::Request(request, _))) => round_trip(&request),
                Ok(Some(Incoming::Garbage(error))) => drop(error.to_string()),
                Ok(None) => break,
                Err(ConnectionError::Frame(CodecError::TooLarge(length))) => {
                    assert!(length > MAX_MESSAGE);
                    return;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn round_trip(request: &Request) {
    let again = encode(request).expect("a request that was read can be written");
    let again: Request = decode(&again[PREFIX..]).expect("and be read again");
    assert_eq!(again, *request);
}
