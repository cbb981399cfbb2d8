//! CRI messages to the terms of `hull-pod` and `hull-image`, and back.
//!
//! Requests are checked here as far as their form goes (fields that are missing,
//! numbers out of range, unknown enum values), so that what follows can't be
//! malformed. What a pod may ask for is decided in `hull-pod`.

pub(crate) mod container;
pub(crate) mod image;
pub(crate) mod metrics;
mod mount;
pub(crate) mod resources;
pub(crate) mod sandbox;
mod security;
mod signal;
pub(crate) mod stats;
#[cfg(test)]
mod testing;

use super::error::CriError;

/// A message field that must be set.
pub(crate) fn required<T>(field: &str, value: Option<T>) -> Result<T, CriError> {
    value.ok_or_else(|| CriError::missing(field))
}

/// An enum field.
pub(crate) fn enumeration<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T, CriError> {
    T::try_from(value).map_err(|_| CriError::invalid(field, format!("{value} is no known value")))
}

/// A user or group id.
fn unix_id(field: &str, value: i64) -> Result<u32, CriError> {
    u32::try_from(value)
        .ok()
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| CriError::invalid(field, format!("{value} is no user or group id")))
}
