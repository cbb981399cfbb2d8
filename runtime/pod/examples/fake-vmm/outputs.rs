//! What a process wrote and nobody has acknowledged yet.

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// One output. Readers follow it through the watch channel.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct OutputState {
    /// Offset of the first byte kept.
    pub first: u64,
    /// Bytes from there on.
    pub kept: Vec<u8>,
    pub ended: bool,
}

/// One output of a process.
#[derive(Debug)]
pub struct OutputBuffer(watch::Sender<OutputState>);

impl Default for OutputBuffer {
    fn default() -> Self {
        Self(watch::channel(OutputState::default()).0)
    }
}

impl OutputBuffer {
    pub fn write(&self, bytes: &[u8]) {
        self.0
            .send_modify(|state| state.kept.extend_from_slice(bytes));
    }

    /// Waits until fewer bytes are kept.
    pub async fn wait_for_room(&self, most: usize) {
        let mut state = self.0.subscribe();
        let _ = state.wait_for(|state| state.kept.len() < most).await;
    }

    pub fn end(&self) {
        self.0.send_modify(|state| state.ended = true);
    }

    pub fn total(&self) -> u64 {
        let state = self.0.borrow();
        state.first + state.kept.len() as u64
    }

    pub fn acknowledge(&self, total: u64) {
        self.0.send_modify(|state| {
            let gone = total.saturating_sub(state.first) as usize;
            state.kept.drain(..gone.min(state.kept.len()));
            state.first += gone as u64;
        });
    }

    /// What is kept of it in a snapshot.
    pub fn saved(&self) -> OutputState {
        self.0.borrow().clone()
    }

    /// One that goes on from there.
    pub fn restored(state: OutputState) -> Self {
        Self(watch::channel(state).0)
    }

    pub fn subscribe(&self) -> watch::Receiver<OutputState> {
        self.0.subscribe()
    }
}
