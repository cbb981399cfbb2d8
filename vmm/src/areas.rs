//! What a guest's memory consists of, for the devices that are made of it.

use std::sync::Arc;

use crate::file_regions::FileRegions;
use crate::memory::Backing;
use crate::pluggable::Pluggable;

/// All but RAM, and what is behind that.
#[derive(Debug, Clone)]
pub struct Areas {
    /// What is behind RAM.
    pub backing: Backing,
    /// Memory that comes and goes, if the VM may have more than its RAM.
    pub pluggable: Option<Arc<Pluggable>>,
    /// Files that are memory.
    pub files: Arc<FileRegions>,
}
