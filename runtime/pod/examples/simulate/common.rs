//! Networks and images of the other tests.

#![expect(dead_code, reason = "tests of one thing at a time use more of it")]

#[path = "../../tests/pods/common/images.rs"]
pub mod images;
#[path = "../../tests/pods/common/network.rs"]
pub mod network;
