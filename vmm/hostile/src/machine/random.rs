//! Numbers that a seed determines.

use core::cell::Cell;

/// A generator (xorshift64*, Vigna 2016).
pub(crate) struct Random(Cell<u64>);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }

    pub(crate) fn next(&self) -> u64 {
        let mut state = self.0.get();
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.0.set(state);
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number below `end`.
    pub(crate) fn below(&self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// Returns one of these.
    pub(crate) fn one_of(&self, values: &[u64]) -> u64 {
        values[self.below(values.len() as u64) as usize]
    }
}
