//! Fuzz targets: bytes of plugins. `make fuzz` runs them (tests/fuzz), and the test below over kept inputs.

use crate::mux;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[("nri-mux", mux::fuzz)];

#[test]
fn bytes_of_plugins_do_no_harm() {
    hull_corpus::replay(TARGETS);
}
