//! The connection of the agent's calls, bounded.
//!
//! ttrpc takes messages of 4 MiB, which decode to a multiple of that, and keeps what comes for a stream
//! until somebody asks for it. So a guest could fill the host's memory: with answers that are longer than any
//! has to be, and with events that come faster than they are handled. Here a message that is too long is a
//! fault of the guest, and while [`WINDOW`] events wait to be handled no more is read.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use hull_proto_agent::agent::Event;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Semaphore,
};
use tokio_util::sync::PollSemaphore;
use ttrpc::{
    asynchronous::ClientStreamReceiver,
    proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MessageHeader},
};

use crate::agent::{error::GuestError, fault::Fault};

/// How many events may wait.
const WINDOW: usize = 64;
/// Longest event, in bytes: two ids and some numbers.
const EVENT_MAX: u32 = 1 << 10;
/// Longest answer, in bytes: the counters of a hundred containers with dozens of disks each.
const ANSWER_MAX: u32 = 1 << 20;
/// Bytes that are read at a time.
const PIECE: usize = 4 << 10;

/// Room for the events of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Window(Arc<Semaphore>);

/// A connection to the agent of a guest.
#[derive(Debug)]
pub(crate) struct Wire<S> {
    stream: S,
    fault: Fault,
    window: PollSemaphore,
    /// The header of the message that comes.
    header: [u8; MESSAGE_HEADER_LENGTH],
    /// How many bytes of it are there.
    filled: usize,
    /// How many bytes of the message come after it.
    body: u32,
    /// Whether room for it has yet to be found.
    waits: bool,
}

impl<S> Wire<S> {
    /// A new connection; what can't be is told as the guest's fault.
    pub(crate) fn new(stream: S, fault: Fault) -> (Self, Window) {
        let window = Arc::new(Semaphore::new(WINDOW));
        let wire = Self {
            stream,
            fault,
            window: PollSemaphore::new(Arc::clone(&window)),
            header: [0; MESSAGE_HEADER_LENGTH],
            filled: 0,
            body: 0,
            waits: false,
        };
        (wire, Window(window))
    }

    /// Takes note of bytes that came; none of them is behind the end of what was expected.
    fn came(&mut self, bytes: &[u8]) -> io::Result<()> {
        let rest = self.header.get_mut(self.filled..).unwrap_or_default();
        if rest.is_empty() {
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            self.body = self.body.saturating_sub(length);
        } else {
            for (to, from) in rest.iter_mut().zip(bytes) {
                *to = *from;
                self.filled = self.filled.saturating_add(1);
            }
            if self.filled < MESSAGE_HEADER_LENGTH {
                return Ok(());
            }
            let header = MessageHeader::from(self.header);
            let is_event = header.type_ == MESSAGE_TYPE_DATA;
            let (what, most) = if is_event {
                ("an event", EVENT_MAX)
            } else {
                ("an answer", ANSWER_MAX)
            };
            if header.length > most {
                let what = format!("it sent {what} of {} bytes", header.length);
                let error = GuestError::Misbehaved { what };
                self.fault.tell(&error);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            (self.body, self.waits) = (header.length, is_event);
        }
        if self.body == 0 {
            self.filled = 0;
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.waits {
            // The semaphore is never closed.
            if let Some(permit) = ready!(self.window.poll_acquire(context)) {
                permit.forget();
            }
            self.waits = false;
        }
        let expected = match MESSAGE_HEADER_LENGTH.saturating_sub(self.filled) {
            0 => usize::try_from(self.body).unwrap_or(PIECE),
            header => header,
        };
        let mut piece = [0; PIECE];
        let room = expected.min(buffer.remaining()).min(PIECE);
        let mut piece = ReadBuf::new(piece.get_mut(..room).unwrap_or_default());
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut piece))?;
        self.came(piece.filled())?;
        buffer.put_slice(piece.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The events of a connection.
pub(crate) struct EventStream {
    receiver: ClientStreamReceiver<Event>,
    window: Window,
}

impl EventStream {
    pub(crate) fn new(receiver: ClientStreamReceiver<Event>, window: Window) -> Self {
        Self { receiver, window }
    }

    /// The next event; none: the agent ended the stream. The one before counts as handled.
    pub(crate) async fn recv(&mut self) -> ttrpc::Result<Option<Event>> {
        let event = self.receiver.recv().await;
        self.window.0.add_permits(1);
        event
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hull_proto_agent::{
        agent::{EventsRequest, HelloRequest},
        rpc::AgentClient,
    };
    use protobuf::Message;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };
    use ttrpc::{
        asynchronous::{Client, transport::Socket},
        context::Context,
        proto::MESSAGE_TYPE_RESPONSE,
    };

    use super::*;

    /// A client, and the guest's end of its connection.
    fn connected(fault: &Fault) -> (AgentClient, Window, DuplexStream) {
        let (ours, theirs) = duplex(256);
        let (wire, window) = Wire::new(ours, fault.clone());
        (
            AgentClient::new(Client::new(Socket::new(wire))),
            window,
            theirs,
        )
    }

    /// Takes a request; returns the number of its stream.
    async fn request(guest: &mut DuplexStream) -> u32 {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        guest.read_exact(&mut header).await.unwrap();
        let header = MessageHeader::from(header);
        let mut body = vec![0; header.length as usize];
        guest.read_exact(&mut body).await.unwrap();
        header.stream_id
    }

    fn message(type_: u8, stream_id: u32, body: &[u8]) -> Vec<u8> {
        let header = MessageHeader {
            length: body.len() as u32,
            stream_id,
            type_,
            flags: 0,
        };
        [Vec::from(header).as_slice(), body].concat()
    }

    fn event(seq: u64) -> Vec<u8> {
        let event = Event {
            seq,
            ..Event::default()
        };
        event.write_to_bytes().unwrap()
    }

    #[tokio::test]
    async fn events_are_read_as_fast_as_they_are_handled() {
        let (client, window, mut guest) = connected(&Fault::default());
        let asked = EventsRequest::default();
        let (events, stream) = tokio::join!(
            async { client.events(Context::default(), &asked).await.unwrap() },
            request(&mut guest)
        );
        let mut events = EventStream::new(events, window);
        let (told, mut count) = tokio::sync::watch::channel(0_u64);
        tokio::spawn(async move {
            for seq in 1.. {
                let event = message(MESSAGE_TYPE_DATA, stream, &event(seq));
                if guest.write_all(&event).await.is_err() {
                    break;
                }
                told.send_replace(seq);
            }
        });
        // What waits, and what is in the connection: 256 bytes.
        let most = WINDOW as u64 + 30;
        let mut handled = 0;
        for _ in 0..3 {
            let halt = count.wait_for(|count| *count > handled + most);
            assert!(timeout(Duration::from_millis(100), halt).await.is_err());
            assert!(*count.borrow() >= handled + WINDOW as u64);
            for _ in 0..1000 {
                handled += 1;
                assert_eq!(events.recv().await.unwrap().unwrap().seq, handled);
            }
        }
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_a_fault_and_never_read() {
        for (type_, most, what) in [
            (MESSAGE_TYPE_DATA, EVENT_MAX, "an event of 1025 bytes"),
            (
                MESSAGE_TYPE_RESPONSE,
                ANSWER_MAX,
                "an answer of 1048577 bytes",
            ),
            (0, ANSWER_MAX, "an answer of 1048577 bytes"),
        ] {
            let fault = Fault::default();
            let (client, _window, mut guest) = connected(&fault);
            let call = client.clone();
            let hello = HelloRequest::default();
            let (answer, ()) = tokio::join!(call.hello(Context::default(), &hello), async {
                let stream = request(&mut guest).await;
                // As long as it may be, to nobody.
                let long = message(type_, stream + 2, &vec![0; most as usize]);
                guest.write_all(&long).await.unwrap();
                let mut header = message(type_, stream, &[]);
                header[..4].copy_from_slice(&(most + 1).to_be_bytes());
                guest.write_all(&header).await.unwrap();
            });
            assert!(matches!(answer, Err(ttrpc::Error::Socket(_))), "{answer:?}");
            assert!(fault.told().await.ends_with(what));
        }
    }

    #[tokio::test]
    async fn answers_come_in_any_order_and_strangers_and_repetitions_are_dropped() {
        let (client, _window, mut guest) = connected(&Fault::default());
        let hello = HelloRequest::default();
        let (first, second, ()) = tokio::join!(
            client.hello(Context::default(), &hello),
            client.hello(Context::default(), &hello),
            async {
                let (one, two) = (request(&mut guest).await, request(&mut guest).await);
                for stream in [77, two, two, 0, one, u32::MAX, one] {
                    let empty = message(MESSAGE_TYPE_RESPONSE, stream, &[]);
                    guest.write_all(&empty).await.unwrap();
                }
            }
        );
        assert!(first.is_ok() && second.is_ok());
    }
}
