//! A container: what it is made of, how it is made, and how all of it ends.

pub(crate) mod apparmor;
pub(crate) mod create;
pub(crate) mod find;
pub(crate) mod request;
pub(crate) mod restored;
pub(crate) mod unmake;
