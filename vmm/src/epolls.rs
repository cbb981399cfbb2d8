//! The epoll sets that devices are watched through: one for each thread that serves devices.

use std::io;
use std::sync::Arc;

use hull_proto_vmm::MAX_QUEUE_PAIRS;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

/// The sets that devices are watched through.
#[derive(Debug, Clone)]
pub struct Epolls {
    /// The set of all disks.
    pub disks: Arc<[Arc<Epoll>]>,
    /// The sets of network cards, one for each queue pair that a card may have.
    pub network: Arc<[Arc<Epoll>]>,
    /// The set of all other devices.
    pub others: Arc<[Arc<Epoll>]>,
}

impl Epolls {
    /// Creates empty sets for a VM of so many vCPUs, beside the event loop's.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(others: Arc<Epoll>, vcpus: u8) -> io::Result<Self> {
        let pairs = usize::from(vcpus).clamp(1, MAX_QUEUE_PAIRS);
        let network: io::Result<Vec<_>> = (0..pairs).map(|_| Epoll::new().map(Arc::new)).collect();
        Ok(Self {
            disks: [Arc::new(Epoll::new()?)].into(),
            network: network?.into(),
            others: [others].into(),
        })
    }
}

/// Waits for events, as long as `timeout` milliseconds say (-1: for ever).
///
/// # Errors
/// What epoll says, but for interruptions by signals.
pub fn wait(epoll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    match epoll.wait(timeout, events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        result => result,
    }
}
