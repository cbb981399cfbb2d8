//! How the VM ended.

use std::path::Path;

use hull_proto_vmm::{ExitReason, ExitReport};

/// Ends the process, with a report.
pub fn end(report: &Path, reason: ExitReason, message: &str) -> ! {
    let report_text = serde_json::to_vec(&ExitReport {
        reason,
        message: message.into(),
    });
    std::fs::write(report, report_text.unwrap()).unwrap();
    #[expect(clippy::disallowed_methods, reason = "ends as a killed VMM does")]
    std::process::exit(0)
}
