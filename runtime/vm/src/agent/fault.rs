//! The fault that ends a guest's VM: the guest says what can't be, or the daemon panics while it deals
//! with the guest. Whoever finds a fault tells it here; the pod's task hears of it as an event of the
//! guest's, and ends the VM with this reason.

use tokio::sync::watch;

/// The first fault of one guest. Clones share it.
#[derive(Debug, Clone)]
pub struct Fault(watch::Sender<Option<String>>);

impl Default for Fault {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Fault {
    /// Tells why the VM has to end; no effect when that was told before.
    pub fn tell(&self, reason: &dyn std::error::Error) {
        self.0.send_if_modified(|fault| {
            let is_first = fault.is_none();
            if is_first {
                *fault = Some(reason.to_string());
            }
            is_first
        });
    }

    /// Waits until a fault is told, and returns the reason.
    pub async fn told(&self) -> String {
        let mut fault = self.0.subscribe();
        // The channel can't be closed: its sender is in `self`.
        let told = fault.wait_for(Option::is_some).await;
        told.ok()
            .and_then(|fault| fault.clone())
            .unwrap_or_default()
    }
}
