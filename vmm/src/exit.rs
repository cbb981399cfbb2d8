//! The exit report: why the VM ended.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hull_proto_vmm::{ExitReason, ExitReport};

use crate::kvm::vcpu::End;

/// Makes a report of how the guest ended.
#[must_use]
pub fn report(end: End, panic: Option<String>) -> ExitReport {
    let (reason, message) = match (end, panic) {
        (End::Kvm(details), _) => (ExitReason::KvmError, details),
        (End::Shutdown(_), Some(message)) => (
            ExitReason::GuestPanic,
            format!("guest kernel panic: {message}"),
        ),
        (End::Shutdown(how), None) => (ExitReason::GuestShutdown, how.to_owned()),
    };
    ExitReport { reason, message }
}

/// Writes the report so that a reader sees all of it or nothing.
///
/// # Errors
/// When the directory can't be written.
pub fn write(report: &ExitReport, path: &Path) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(report)?)?;
    fs::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_the_reason() {
        let panic = report(End::Shutdown("reset"), Some("no init".into()));
        assert_eq!(
            (panic.reason, panic.message.as_str()),
            (ExitReason::GuestPanic, "guest kernel panic: no init")
        );
        assert_eq!(
            report(End::Shutdown("reset"), None).reason,
            ExitReason::GuestShutdown
        );
        assert_eq!(
            report(End::Kvm("x".into()), Some("y".into())).reason,
            ExitReason::KvmError
        );
    }

    #[test]
    fn the_file_is_complete_and_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("exit.json");
        let written = ExitReport {
            reason: ExitReason::Stopped,
            message: "as asked".into(),
        };
        write(&written, &path).unwrap();
        write(&written, &path).unwrap();
        let read: ExitReport = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, written);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
