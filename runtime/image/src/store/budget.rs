//! The memory that the store's work takes, all of it together: images come from strangers, and
//! any number of them may be wanted at the same time.
//!
//! | share | of | what it bounds |
//! |---|---|---|
//! | pulls | each pull, import and export | a manifest and a configuration, an archive's index |
//! | transfers | each layer in transfer | chunks, windows of decompressors, one file's attributes |
//! | trees | bytes of memory | the trees of images that are merged and written |
//!
//! Who finds a share used up waits in turn. The shares are apart so that nobody who waits for a
//! registry holds what others need for work that ends by itself, and they are taken in the order
//! of the table, so that no two wait for each other. A permit goes with the work that it is for,
//! into a thread that nobody waits for any more too.

use std::io;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Limits;
use crate::error::StoreError;

/// What one permit of the trees' share stands for, bytes.
const UNIT: u64 = 1 << 10;

/// The shares.
#[derive(Debug)]
pub(crate) struct Budget {
    pulls: Arc<Semaphore>,
    transfers: Arc<Semaphore>,
    trees: Arc<Semaphore>,
    tree_memory: u64,
}

/// Memory for a tree; it is given back with the value.
#[derive(Debug)]
pub(crate) struct TreeMemory {
    bytes: u64,
    _permit: OwnedSemaphorePermit,
}

impl TreeMemory {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Budget {
    pub(crate) fn new(limits: &Limits) -> Self {
        let share = |count: usize| Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)));
        // The most that can be asked for at once.
        let units = (limits.tree_memory / UNIT).clamp(1, u64::from(u32::MAX >> 3));
        Self {
            pulls: share(limits.parallel_pulls),
            transfers: share(limits.parallel_transfers),
            trees: share(usize::try_from(units).unwrap_or(1)),
            tree_memory: units * UNIT,
        }
    }

    /// A place for a pull, an import or an export.
    pub(crate) async fn pull(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        taken(Arc::clone(&self.pulls).acquire_owned().await)
    }

    /// A place for a layer in transfer.
    pub(crate) async fn transfer(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        taken(Arc::clone(&self.transfers).acquire_owned().await)
    }

    /// Memory for a tree of so many bytes, or all that there is if that is less.
    pub(crate) async fn tree(&self, bytes: u64) -> Result<TreeMemory, StoreError> {
        let units = bytes.min(self.tree_memory).div_ceil(UNIT);
        let permits = u32::try_from(units).unwrap_or(u32::MAX >> 3);
        let trees = Arc::clone(&self.trees);
        Ok(TreeMemory {
            bytes: units * UNIT,
            _permit: taken(trees.acquire_many_owned(permits).await)?,
        })
    }
}

#[cfg(test)]
impl Budget {
    /// Permits of each share that nobody has.
    pub(crate) fn free(&self) -> [usize; 3] {
        [&self.pulls, &self.transfers, &self.trees].map(|share| share.available_permits())
    }
}

fn taken<T>(result: Result<T, tokio::sync::AcquireError>) -> Result<T, StoreError> {
    // The semaphores are never closed.
    result.map_err(|e| StoreError::io("take memory of the image store", io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn memory_is_taken_in_turn_and_comes_back() {
        let budget = Budget::new(&Limits {
            tree_memory: 100 * UNIT,
            ..Limits::default()
        });
        // More than there is, is all that there is.
        let all = budget.tree(u64::MAX).await.unwrap();
        assert_eq!(all.bytes(), 100 * UNIT);
        drop(all);
        let most = budget.tree(80 * UNIT).await.unwrap();
        let mut large = Box::pin(budget.tree(60 * UNIT));
        let mut small = Box::pin(budget.tree(1));
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, &mut large).await.is_err());
        // There is room for it, but not before the one that came first.
        assert!(tokio::time::timeout(soon, &mut small).await.is_err());
        drop(most);
        let (_large, _small) = (large.await.unwrap(), small.await.unwrap());
    }
}
