use std::fs::File;
use std::io::Read;

use hull_proto_vmm::{DeviceConfig, FdIndex, MAX_MESSAGE, VERSION};
use proptest::prelude::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

fn pair() -> (Connection, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    (Connection::new(ours).unwrap(), peer)
}

fn attach(slot: u8) -> Request {
    Request::Attach {
        slot,
        device: DeviceConfig::Vsock {
            cid: 3,
            listener: FdIndex(0),
        },
    }
}

fn request(connection: &mut Connection) -> (Request, Fds) {
    match connection.receive().unwrap() {
        Some(Incoming::Request(request, fds)) => (*request, fds),
        other => panic!("{other:?}"),
    }
}

#[test]
fn descriptors_come_with_their_own_message() {
    let (mut connection, mut peer) = pair();
    let null = File::open("/dev/null").unwrap();
    let zero = File::open("/dev/zero").unwrap();
    // All of it is there before the first is read.
    peer.write_all(&encode(&Request::Hello { version: VERSION }).unwrap())
        .unwrap();
    peer.send_with_fds(
        &[encode(&attach(4)).unwrap().as_slice()],
        &[null.as_raw_fd(), zero.as_raw_fd()],
    )
    .unwrap();
    peer.send_with_fds(
        &[encode(&attach(5)).unwrap().as_slice()],
        &[null.as_raw_fd()],
    )
    .unwrap();

    let (hello, fds) = request(&mut connection);
    assert_eq!(hello, Request::Hello { version: VERSION });
    assert!(fds.get(FdIndex(0)).is_err());
    let (first, fds) = request(&mut connection);
    assert_eq!(first, attach(4));
    let mut byte = [1];
    fds.file(FdIndex(1)).unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert!(fds.get(FdIndex(2)).is_err() && fds.get(FdIndex(u32::MAX)).is_err());
    let (second, fds) = request(&mut connection);
    assert_eq!(second, attach(5));
    assert!(fds.get(FdIndex(0)).is_ok() && fds.get(FdIndex(1)).is_err());
    assert!(connection.receive().unwrap().is_none());
}

#[test]
fn descriptors_are_closed_on_exec_and_with_their_request() {
    let (mut connection, peer) = pair();
    let (reader, writer) = io::pipe().unwrap();
    peer.send_with_fds(
        &[encode(&attach(4)).unwrap().as_slice()],
        &[writer.as_raw_fd()],
    )
    .unwrap();
    drop(writer);
    let (_, fds) = request(&mut connection);
    let fd = fds.get(FdIndex(0)).unwrap();
    let flags = rustix::io::fcntl_getfd(&fd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    drop((fd, fds));
    assert_eq!(
        { reader }.read(&mut [0]).unwrap(),
        0,
        "nobody has the other end"
    );
}

#[test]
fn as_many_descriptors_as_allowed_arrive() {
    let (mut connection, peer) = pair();
    let null = File::open("/dev/null").unwrap();
    let fds = vec![null.as_raw_fd(); MAX_FDS];
    peer.send_with_fds(&[encode(&attach(4)).unwrap().as_slice()], &fds)
        .unwrap();
    let (_, fds) = request(&mut connection);
    assert!(fds.get(FdIndex(MAX_FDS as u32 - 1)).is_ok());
}

#[test]
fn descriptors_in_the_middle_of_a_message_end_the_connection() {
    let (mut connection, mut peer) = pair();
    let null = File::open("/dev/null").unwrap();
    let frame = encode(&attach(4)).unwrap();
    peer.write_all(&frame[..10]).unwrap();
    peer.send_with_fds(&[&frame[10..]], &[null.as_raw_fd()])
        .unwrap();
    assert!(matches!(
        connection.receive(),
        Err(ConnectionError::Descriptors)
    ));
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let (mut connection, mut peer) = pair();
    let frame = encode(&Request::Pause).unwrap();
    for byte in &frame[..frame.len() - 1] {
        peer.write_all(&[*byte]).unwrap();
        assert!(connection.receive().unwrap().is_none());
    }
    peer.write_all(&frame[frame.len() - 1..]).unwrap();
    assert_eq!(request(&mut connection).0, Request::Pause);
}

#[test]
fn a_length_that_is_too_large_ends_the_connection_at_once() {
    let (mut connection, mut peer) = pair();
    peer.write_all(&(MAX_MESSAGE as u32 + 1).to_le_bytes())
        .unwrap();
    assert!(matches!(
        connection.receive(),
        Err(ConnectionError::Frame(CodecError::TooLarge(_)))
    ));
}

#[test]
fn garbage_of_the_right_length_is_reported_and_the_next_message_read() {
    let (mut connection, mut peer) = pair();
    for body in [
        &b"{}"[..],
        b"",
        b"\xff\xfe",
        b"{\"configure\":{}}",
        b"null",
        b"\"hello\"",
    ] {
        peer.write_all(&(body.len() as u32).to_le_bytes()).unwrap();
        peer.write_all(body).unwrap();
        assert!(
            matches!(connection.receive().unwrap(), Some(Incoming::Garbage(_))),
            "{body:?}"
        );
    }
    peer.write_all(&encode(&Request::Stop).unwrap()).unwrap();
    assert_eq!(request(&mut connection).0, Request::Stop);
}

#[test]
fn a_peer_that_leaves_is_noticed_even_inside_a_message() {
    let (mut connection, mut peer) = pair();
    peer.write_all(&[9, 0]).unwrap();
    drop(peer);
    assert!(matches!(connection.receive(), Err(ConnectionError::Closed)));
}

#[test]
fn answers_wait_for_a_slow_peer() {
    let (mut connection, mut peer) = pair();
    let message = "x".repeat(900_000);
    let response = Response::Error {
        kind: hull_proto_vmm::ErrorKind::Internal,
        message,
    };
    connection.send(&response).unwrap();
    assert!(connection.is_congested());
    let frame = encode(&response).unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; frame.len()];
        peer.read_exact(&mut received).unwrap();
        (received == frame, peer)
    });
    while connection.is_congested() {
        connection.flush().unwrap();
    }
    assert!(reader.join().unwrap().0);
}

proptest! {
    /// Any bytes in any pieces: messages, garbage or the end, but nothing worse.
    #[test]
    fn no_bytes_break_a_connection(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
        let (mut connection, mut peer) = pair();
        for chunk in chunks {
            if peer.write_all(&chunk).is_err() {
                break;
            }
            loop {
                match connection.receive() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }
}
