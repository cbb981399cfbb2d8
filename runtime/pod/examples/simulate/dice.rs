//! The simulation's own chances, apart from those of the code that it runs.

use std::{cell::Cell, ops::Range, time::Duration};

thread_local! {
    static STATE: Cell<u64> = const { Cell::new(0) };
    /// Whether anything may go wrong.
    static CHAOS: Cell<bool> = const { Cell::new(true) };
}

/// The next number of splitmix64.
pub fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Begins with a seed.
pub fn seed(seed: u64) {
    STATE.set(seed ^ 0x5eed_5eed_5eed_5eed);
}

/// From now on nothing goes wrong.
pub fn be_quiet() {
    CHAOS.set(false);
}

/// Whether something may go wrong.
pub fn is_chaos() -> bool {
    CHAOS.get()
}

/// A number of the range.
pub fn within(range: Range<u64>) -> u64 {
    let mut state = STATE.get();
    let word = mix(&mut state);
    STATE.set(state);
    range.start + word % (range.end - range.start).max(1)
}

/// Happens in `of` cases once.
pub fn one_in(of: u64) -> bool {
    within(0..of) == 0
}

/// Goes wrong in `of` cases once, while anything may.
pub fn fault_in(of: u64) -> bool {
    is_chaos() && one_in(of)
}

/// A time of the range, in milliseconds.
pub fn ms(range: Range<u64>) -> Duration {
    Duration::from_millis(within(range))
}

/// One of them.
pub fn pick<T: Clone>(all: &[T]) -> T {
    all[within(0..all.len() as u64) as usize].clone()
}
