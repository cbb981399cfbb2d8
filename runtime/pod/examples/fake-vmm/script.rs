//! What goes wrong.

use hull_proto_vmm::ErrorKind;
use serde::{Deserialize, Serialize};

/// The content of the "kernel" file, JSON; empty for a VM without faults.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Script {
    /// `Configure` fails with this.
    pub refuse_configure: Option<ErrorKind>,
    /// `Start` fails with this.
    pub refuse_start: Option<ErrorKind>,
    /// The VM ends right after `Start`.
    pub die_at_start: bool,
    /// The agent never listens.
    pub no_agent: bool,
    /// Answers of the agent may go astray, as containers say ([`crate::wire`]).
    pub astray: bool,
    /// The agent's version of the contract, when it is another one.
    pub version: Option<u32>,
    /// The agent listens after so many attempts.
    pub attempts: u32,
    /// Agent calls that are refused, by name (`configure`, `attach_storage`, `create`, `start`).
    pub refuse: Vec<String>,
    /// Agent calls whose first one is never answered, by name (`hello`, `configure`, `attach_storage`, `create`).
    pub hang_once: Vec<String>,
    /// `Attach` fails with this.
    pub refuse_attach: Option<ErrorKind>,
}
