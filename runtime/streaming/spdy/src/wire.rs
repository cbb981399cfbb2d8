//! Numbers of the wire format (SPDY/3, section 2.2).

/// The largest payload of a data frame that the format can tell.
pub const MAX_DATA: usize = (1 << 24) - 1;
/// The largest stream id.
pub const MAX_STREAM: u32 = (1 << 31) - 1;

/// The protocol version in control frames.
pub(crate) const VERSION: u16 = 3;

/// Types of control frames.
pub(crate) mod kind {
    pub(crate) const SYN_STREAM: u16 = 1;
    pub(crate) const SYN_REPLY: u16 = 2;
    pub(crate) const RST_STREAM: u16 = 3;
    pub(crate) const SETTINGS: u16 = 4;
    pub(crate) const PING: u16 = 6;
    pub(crate) const GOAWAY: u16 = 7;
    pub(crate) const HEADERS: u16 = 8;
    pub(crate) const WINDOW_UPDATE: u16 = 9;
}

/// Flags of frames.
pub(crate) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const UNIDIRECTIONAL: u8 = 2;
}
