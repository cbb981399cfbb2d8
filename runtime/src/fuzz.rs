//! Fuzz targets: bytes of a client, and requests of the CRI, up to where something would be done. `make fuzz` runs them
//! (tests/fuzz), and the test below over kept inputs.

use crate::{
    authority,
    cri::fuzz::{container, sandbox, update},
};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("cri-authority", authority::fuzz),
    ("cri-container", container),
    ("cri-sandbox", sandbox),
    ("cri-update", update),
];

#[test]
fn requests_do_no_harm() {
    hull_corpus::replay(TARGETS);
}
