//! What devices count.

use std::iter::Sum;

use serde::{Deserialize, Serialize};

/// What a device counts about itself since it was attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Guest notifications handled.
    pub notifications: u64,
    /// Descriptor chains completed.
    pub requests: u64,
    /// Bytes that the guest sent or wrote.
    pub bytes_out: u64,
    /// Bytes that the guest received or read.
    pub bytes_in: u64,
    /// Requests answered with an error, or malformed.
    pub errors: u64,
}

impl Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |all, part| Self {
            notifications: all.notifications + part.notifications,
            requests: all.requests + part.requests,
            bytes_out: all.bytes_out + part.bytes_out,
            bytes_in: all.bytes_in + part.bytes_in,
            errors: all.errors + part.errors,
        })
    }
}
