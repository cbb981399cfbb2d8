//! What images were pulled with.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use hull_proto_cri::v1::AuthConfig;

/// Most images whose credentials are kept.
const KEPT: usize = 1000;

/// What images were pulled with, in memory alone: what pulls one for another runtime has no other.
#[derive(Debug, Default)]
pub(super) struct Credentials(Mutex<VecDeque<(String, AuthConfig)>>);

impl Credentials {
    pub(super) fn keep(&self, image: &str, auth: AuthConfig) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(known, _)| known != image);
        all.truncate(KEPT - 1);
        all.push_front((image.to_owned(), auth));
    }

    pub(super) fn of(&self, image: &str) -> Option<AuthConfig> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = all.iter();
        all.find_map(|(known, auth)| (known == image).then(|| auth.clone()))
    }
}
