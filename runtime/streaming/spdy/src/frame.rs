//! What travels.

use bytes::Bytes;

/// Codes in `RST_STREAM`.
pub mod status {
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// The stream is not wanted.
    pub const REFUSED_STREAM: u32 = 3;
    /// The stream is not needed any more.
    pub const CANCEL: u32 = 5;
}

/// One frame; of a data frame perhaps a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// The new stream.
        stream: u32,
        /// The stream that it belongs to, or 0.
        associated: u32,
        /// 0 (highest) to 7.
        priority: u8,
        /// What it is for.
        headers: Headers,
        /// Its sender sends nothing on it.
        fin: bool,
        /// Its receiver sends nothing on it.
        unidirectional: bool,
    },
    /// Accepts a stream.
    SynReply {
        /// The stream.
        stream: u32,
        /// Mostly empty.
        headers: Headers,
        /// Its sender sends nothing on it.
        fin: bool,
    },
    /// Ends a stream at once, in both directions.
    RstStream {
        /// The stream.
        stream: u32,
        /// Why; see [`status`].
        status: u32,
    },
    /// Settings; nobody cares what they say.
    Settings,
    /// To be sent back as it is.
    Ping(u32),
    /// No stream after this one is accepted.
    GoAway {
        /// The last stream that was accepted.
        last_stream: u32,
        /// 0: all is well.
        status: u32,
    },
    /// More headers.
    Headers {
        /// The stream.
        stream: u32,
        /// The headers.
        headers: Headers,
        /// Its sender sends no more.
        fin: bool,
    },
    /// More may be sent; ignored.
    WindowUpdate {
        /// The stream, or 0 for all.
        stream: u32,
        /// How much more.
        delta: u32,
    },
    /// Bytes of a stream. A decoder gives them as they come: a data frame on the wire may be
    /// several of these, `fin` then is in the last.
    Data {
        /// The stream.
        stream: u32,
        /// The bytes.
        payload: Bytes,
        /// Its sender sends no more.
        fin: bool,
    },
}

/// Names and values. Names are lower case; several values of one name are joined by NUL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// Headers from pairs.
    #[must_use]
    pub fn new(pairs: &[(&str, &str)]) -> Self {
        let pairs = pairs.iter();
        Self(
            pairs
                .map(|(name, value)| (name.to_ascii_lowercase(), (*value).to_owned()))
                .collect(),
        )
    }

    /// The first value of a name, in whatever case the name was sent.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name))?;
        found.1.split('\0').next()
    }
}
