//! What goes wrong.

use hull_proto_vmm::ErrorKind;
use serde::{Deserialize, Serialize};

/// The content of the "kernel" file, JSON; empty for a VM without faults.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Script {
    /// `Configure`, or `Restore`, fails with this.
    pub refuse_configure: Option<ErrorKind>,
    /// `Pause` fails with this.
    pub refuse_pause: Option<ErrorKind>,
    /// `Pause` has its effect, and the first one is never answered.
    pub lose_pause: bool,
    /// `Resume` fails with this the first time.
    pub refuse_resume: Option<ErrorKind>,
    /// `Copy` fails with this.
    pub refuse_copy: Option<ErrorKind>,
    /// `Save` fails with this.
    pub refuse_save: Option<ErrorKind>,
    /// `Save` is never answered.
    pub hang_save: bool,
    /// What goes wrong in VMs that are restored of this one's snapshot; none: the same.
    pub clone: Option<Box<Self>>,
    /// It is a clone: it does nothing before it was woken.
    pub asleep: bool,
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
    /// Agent calls that are refused, by name (`create`).
    pub refuse: Vec<String>,
    /// Agent calls whose first one has no effect and is never answered, by name.
    pub hang_once: Vec<String>,
    /// Agent calls whose first one has its effect and is never answered, by name.
    pub lose_once: Vec<String>,
    /// The longest that an agent call takes, so that answers come in another order than their requests.
    pub slow_ms: u64,
    /// How far the guest's clock is ahead of the host's.
    pub clock_ahead_ns: i64,
    /// `Plug` fails with this.
    pub refuse_plug: Option<ErrorKind>,
    /// `Attach` fails with this.
    pub refuse_attach: Option<ErrorKind>,
    /// The guest's kernel has AppArmor on, as the VM's command line says.
    pub apparmor: bool,
}
