//! How a VM ends by itself.

use std::{fs, panic::resume_unwind, path::Path};

use hull_proto_vmm::{ExitReason, ExitReport};

use crate::kernel;

/// Ends the VM whose code calls this, with a report.
pub fn end(report: &Path, reason: ExitReason, message: &str) -> ! {
    let report_text = serde_json::to_vec(&ExitReport {
        reason,
        message: message.into(),
    });
    // The directory may be gone.
    let _ = fs::write(report, report_text.unwrap());
    kernel::exit();
    // Ends the task that called, and no hook is told.
    resume_unwind(Box::new(()))
}
